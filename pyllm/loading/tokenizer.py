"""Text to token ids and back, by the `tokenizers` library; decoding streams without half letters.

Decoding is our own: each token is a run of bytes, a text is the bytes of its tokens as UTF-8. That
is what makes a stream equal to decoding the whole, whatever the split.
"""

import codecs
import contextlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from . import chat
from .errors import LoadError
from .json_object import read_json


def _byte_alphabet():
    """GPT-2's printable stand-in for each byte, inverted: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
SPACE = "\u2581"  # SentencePiece's stand-in for a space
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@contextlib.contextmanager
def tokenizers_errors(path):
    """What the tokenizers library raises, also where it panics, as a LoadError."""
    try:
        yield
    except (LoadError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is a BaseException
        raise LoadError(path, f"not a tokenizer that can be used: {error}") from None


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: a `tokenizers.Tokenizer`.
        path: named in errors.
        bos_id: the token that begins a text, or None.
        eos_ids: the tokens that end a generation.
        chat_template: Jinja source, or None.
        special_tokens: name -> text ("bos_token", "eos_token", ...), for the chat template.
    """

    def __init__(self, backend, path, *, bos_id, eos_ids, chat_template, special_tokens):
        self._backend, self._path = backend, path
        self.bos_id, self.eos_ids = bos_id, frozenset(eos_ids)
        self.chat_template = chat_template
        self.special_tokens = special_tokens
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self._pieces = {}

    def encode(self, text, add_special_tokens=True):
        """The token ids of `text`, as a list of int.

        Special tokens written out in the text become those tokens. `add_special_tokens` adds what
        the model wants at the beginning (and end); a chat template's text has it already.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: not valid Unicode at character {error.start}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True, *, continuation=False):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        `continuation` says that other text comes before, so that a leading space is kept where
        the tokenizer would drop it at the beginning of a text.
        """
        ids = [int(i) for i in ids]
        if self._decoding.bytewise:
            stream = self.stream(skip_special_tokens, continuation=continuation)
            return "".join([*map(stream.push, ids), stream.finish()])
        for i in ids:
            self._check(i)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens=True, *, continuation=False):
        """A `StreamDecoder`: the same text as `decode`, token by token."""
        return StreamDecoder(self, skip_special_tokens, continuation)

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """The text that the model was trained to see for a conversation.

        It contains the special tokens: encode it with `add_special_tokens=False`.

        Args:
            messages: list of dicts, "role" one of system, user, assistant, tool; "content" a str.
            add_generation_prompt: end with the beginning of the assistant's answer.

        Raises:
            ValueError: messages of another form, no chat template, or one that refuses them.
        """
        chat.check_messages(messages)
        if self.chat_template is None:
            raise ValueError(f"{self._path}: the model has no chat template")
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )

    def token_to_id(self, token):
        """The id of a token's text, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def _decoding(self):
        return _Decoding.of(self._backend.decoder)

    def _check(self, token):
        if token < 0:
            raise ValueError(f"token id: expected 0 or more, got {token}")

    def _piece(self, token, skip_special_tokens):
        """The bytes of a token; none for an id that the vocabulary does not name."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special and skip_special_tokens else added.content.encode()
        piece = self._pieces.get(token)
        if piece is None:
            self._check(token)
            text = self._backend.id_to_token(token) or ""
            piece = self._pieces[token] = self._decoding.piece(text)
        return piece


class _Decoding(NamedTuple):
    """How a token's text stands for bytes, read from the backend's decoder."""

    bytewise: bool  # False: not known, left to the backend
    byte_level: bool = False  # GPT-2's alphabet, else SentencePiece's
    byte_fallback: bool = False  # <0x0A> is the byte 10
    drops_space: bool = False  # at the beginning of a text

    @classmethod
    def of(cls, decoder):
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
        parts = state["decoders"] if state["type"] == "Sequence" else [state]
        types = {part["type"] for part in parts}
        if "ByteLevel" in types:
            return cls(True, byte_level=True)
        if types & {"WordPiece", "BPEDecoder", "CTC", None} or not types & {
            "ByteFallback",
            "Metaspace",
        }:
            return cls(False)
        drops = any(
            part["type"] == "Strip"
            or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
            for part in parts
        )
        return cls(True, byte_fallback="ByteFallback" in types, drops_space=drops)

    def piece(self, text):
        if self.byte_level:
            if all(character in BYTE_ALPHABET for character in text):
                return bytes(BYTE_ALPHABET[character] for character in text)
            return text.encode()
        if self.byte_fallback and BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace(SPACE, " ").encode()


class StreamDecoder:
    """Decodes token by token: what `push` and `finish` return adds up to `Tokenizer.decode`.

    Bytes that may be the beginning of a character wait for the rest of it.
    """

    def __init__(self, tokenizer, skip_special_tokens=True, continuation=False):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._drop_space = tokenizer._decoding.drops_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids = []  # all of them, where only the backend knows how to decode

    def push(self, token):
        """The text that this token completes; may be empty."""
        if not self._tokenizer._decoding.bytewise:
            self._ids.append(token)
            return ""
        return self._text(self._utf8.decode(self._tokenizer._piece(int(token), self._skip)))

    def finish(self):
        """The text that is left: U+FFFD for a character that was never completed."""
        if not self._tokenizer._decoding.bytewise:
            return self._tokenizer.decode(self._ids, self._skip)
        return self._text(self._utf8.decode(b"", final=True))

    def _text(self, text):
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def tokenizer_from_directory(path, generation):
    """The tokenizer of a Hugging Face directory: tokenizer.json, tokenizer_config.json and the
    chat template beside them. `generation` gives the ids that end a text, where known."""
    from tokenizers import Tokenizer as Backend

    path = Path(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise LoadError(
            path,
            "expected tokenizer.json, found none; save_pretrained of a fast tokenizer writes one",
        )
    with tokenizers_errors(file):
        backend = Backend.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    if bos is None and generation.get("bos_token_id"):
        bos = generation["bos_token_id"][0]
    eos = {*generation.get("eos_token_id", ())}
    if "eos_token" in special:
        eos |= {backend.token_to_id(special["eos_token"])} - {None}
    return Tokenizer(
        backend,
        file,
        bos_id=bos,
        eos_ids=eos,
        chat_template=_chat_template(path, config),
        special_tokens=special,
    )


def _chat_template(path, config):
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(file, f"expected a chat template: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise LoadError(
            path / "tokenizer_config.json",
            f"expected 'chat_template' to be a str, got {type(template).__name__}",
        )
    return template
