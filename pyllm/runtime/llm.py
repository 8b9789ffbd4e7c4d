"""`LLM`: a language model with its tokenizer, ready to generate."""

import random
import sys
from collections.abc import Iterator

import torch

from pyllm import DEFAULT_MODEL
from pyllm.collector import paused_collector
from pyllm.loading import open_checkpoint, resolve
from pyllm.models import build
from pyllm.ops.registry import check_names, default_backend, use
from pyllm.runtime.cache import cache_nbytes
from pyllm.runtime.device import find_device
from pyllm.runtime.engine import PAGE_SIZE, Engine
from pyllm.runtime.lookup import PromptLookup
from pyllm.runtime.sampling import SamplingParams
from pyllm.runtime.sequence import Completion, Sequence
from pyllm.runtime.text import TextStream

# Contexts longer than this are had by asking: the cache and the rotary table grow with them.
_DEFAULT_CONTEXT = 8192
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_context(config) -> int:
    """The context of an `LLM` that was not told one."""
    return min(config.max_context, _DEFAULT_CONTEXT)


class LLM:
    """A model that writes.

    Args:
        model: a name that `pyllm pull` knows, the path of a GGUF file or of a Hugging Face
            directory, or a hub id.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None takes ``PYLLM_DEVICE``, or else the
            processor.
        dtype: of keys and values: ``"float16"``, ``"bfloat16"`` or ``"float32"``; None is float16.
            A GPU computes in it, too: float16 or bfloat16; None is the checkpoint's own there, or
            bfloat16.
        max_context: tokens of a prompt and its answer together; by default the model's own limit,
            but not over 8192.
        max_batch: sequences that run at once; more wait their turn.
        max_tokens: tokens of all sequences in one step; longer prompts take several. None: 512, and
            2048 on a GPU.
        quantize: None keeps the weights as they are in the file; ``"int8"`` or ``"int4"`` rounds
            unquantized matrices to that many bits in groups of 32.
        head_bits: None keeps the output head as it is; 4 (or 8) rounds one of more bits. Decoding
            reads fewer bytes then, and the text is worse by what ``pyllm bench perplexity`` says.
        backend: of all ops; None chooses, see `pyllm.ops.registry`.
        replay: False runs every step from Python, for debugging; the text is the same.
        progress: called with ``(bytes done, bytes in all)`` while weights are loaded.

    Raises:
        ValueError: if the file is damaged, or needs something that this version has not.
    """

    @paused_collector()
    def __init__(
        self, model=DEFAULT_MODEL, *, device=None, dtype=None, max_context=None, max_batch=8,
        max_tokens=None, quantize=None, head_bits=None, backend=None, replay=True, progress=None,
    ):  # fmt: skip
        check_names(backend)
        where = find_device(device)
        self.path = resolve(model)
        self.checkpoint = open_checkpoint(self.path)
        dtype = _dtype(dtype, where, self.checkpoint)
        with use(backend or default_backend()):
            self.model = build(
                self.checkpoint, quantize=quantize, head_bits=head_bits, progress=progress,
                device=where.torch_device, dtype=dtype if where.halves else None,
            )  # fmt: skip
        limit = self.model.config.max_context
        self.max_context = (
            default_context(self.model.config) if max_context is None else max_context
        )
        if not isinstance(self.max_context, int) or not 1 <= self.max_context <= limit:
            raise ValueError(
                f"max_context: expected 1 to {limit} (the model's limit), got {max_context!r}"
            )
        cache_tokens = _cache_tokens(self.model.config, self.max_context, max_batch, dtype, where)
        self.engine = Engine(
            self.model, max_context=self.max_context, max_batch=max_batch,
            max_tokens=max_tokens or where.max_tokens,
            cache_tokens=cache_tokens, cache_dtype=dtype, replay=replay, backend=backend,
            device=where,
        )  # fmt: skip

    @property
    def tokenizer(self):
        """With ``encode(text)``, ``decode(ids)`` and ``apply_chat_template(messages)``."""
        return self.checkpoint.tokenizer()

    def warm_up(self) -> int:
        """On a GPU: captures what decoding replays, for all numbers of sequences up to `max_batch`,
        so that no request has to wait for it. Returns how many graphs there are then."""
        return self.engine.warm_up()

    def generate(self, prompt, **arguments) -> Completion | list[Completion]:
        """Continues a prompt, or each of several at once.

        Args:
            prompt: a text, a list of token ids, or a list of either.
            **arguments: the fields of `SamplingParams`: ``max_new_tokens``, ``temperature``, ...

        Returns:
            A `Completion`, or a list of them in the order of the prompts.

        Raises:
            ValueError: for an empty prompt, one that leaves no room in the context, or an argument
                out of its range.
            TypeError: for an unknown argument.
        """
        params = SamplingParams.from_arguments(arguments)
        several = isinstance(prompt, (list, tuple)) and not _is_ids(prompt)
        prompts = list(prompt) if several else [prompt]
        sequences = [self._sequence(p, params) for p in prompts]
        try:
            for sequence in sequences:
                self.engine.add(sequence)
            while not all(s.finished for s in sequences):
                self.engine.step()
        finally:
            for sequence in sequences:
                self.engine.drop(sequence)
        answers = [s.completion() for s in sequences]
        return answers if several else answers[0]

    def stream(self, prompt, **arguments) -> "Stream":
        """As `generate` for one prompt, but returns an iterator over pieces of its text."""
        return Stream(self, self._sequence(prompt, SamplingParams.from_arguments(arguments)))

    def chat(self, messages, *, stream=False, **arguments):
        """Answers a conversation.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, as the model's chat template
            takes it.
            stream: True returns a `Stream` instead of a `Completion`.
            **arguments: as for `generate`.
        """
        ids = self.chat_ids(messages)
        return self.stream(ids, **arguments) if stream else self.generate(ids, **arguments)

    def chat_ids(self, messages) -> list[int]:
        """The tokens of a conversation, up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def logits(self, token_ids) -> torch.Tensor:
        """float32 ``[T, vocab]``: what the model expects after each of `token_ids`."""
        return self.engine.logits(self._check_ids(token_ids, room=0))

    def _sequence(self, prompt, params):
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt: expected some text, got an empty string")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = prompt
        ids = self._check_ids(ids, room=1)
        limit = self.max_context
        if params.max_new_tokens is not None:
            limit = min(limit, len(ids) + params.max_new_tokens)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= set(self.tokenizer.eos_ids)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        text = TextStream(self.tokenizer.stream(continuation=True), params.stop_strings)
        # Penalties would have to count the guessed tokens, each row another number of them.
        k = 0 if params.penalized else params.prompt_lookup_num_tokens
        lookup = PromptLookup(k) if k else None
        sequence = Sequence(ids, params, text, stop_ids, limit, seed, lookup)
        if params.max_new_tokens == 0:
            sequence.finish_reason = "length"
        return sequence

    def _check_ids(self, ids, room):
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        vocab = self.model.config.vocab_size
        if not ids:
            raise ValueError("prompt: expected at least one token, got none")
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise ValueError(f"prompt: expected token ids from 0 to {vocab - 1}, got {token!r}")
        if len(ids) + room > self.max_context:
            raise ValueError(
                f"prompt: expected at most {self.max_context - room} tokens (max_context is "
                f"{self.max_context}), got {len(ids)}"
            )
        return ids


class Stream(Iterator[str]):
    """The pieces of an answer as they come; `completion` holds the whole when it is done.

    Leaving early (``close``, or the end of a ``with`` block) stops the request.
    """

    def __init__(self, llm, sequence):
        self._engine = llm.engine
        self._sequence = sequence
        self._shown = 0
        if not sequence.finished:
            self._engine.add(sequence)

    def __next__(self) -> str:
        while True:
            text = self._sequence.text_stream.text
            if len(text) > self._shown:
                piece, self._shown = text[self._shown :], len(text)
                return piece
            if self._sequence.finished:
                raise StopIteration
            try:
                self._engine.step()
            except BaseException:
                self.close()
                raise

    @property
    def completion(self) -> Completion:
        """The answer so far; complete once the iterator is exhausted."""
        return self._sequence.completion()

    def close(self) -> None:
        """Stops the request; what was written so far stays in `completion`."""
        self._engine.drop(self._sequence)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self.close()


def _dtype(asked, where, checkpoint) -> torch.dtype:
    """Of keys and values, and of what a GPU computes."""
    known = _DTYPES
    if where.halves:
        known = {name: dtype for name, dtype in known.items() if name != "float32"}
    name = str(asked or "float16").removeprefix("torch.")
    if where.halves and asked is None:
        # Hugging Face's configurations have it.
        own = checkpoint.metadata.get("dtype") or checkpoint.metadata.get("torch_dtype")
        name = own if own in known else "bfloat16"
    if name not in known:
        raise ValueError(f"dtype: expected {' or '.join(known)}, got {asked!r}")
    return known[name]


def _cache_tokens(config, max_context, max_batch, dtype, where) -> int:
    """How many tokens' keys and values to keep: of eight full sequences, or as memory allows."""
    token = cache_nbytes(
        n_layers=config.n_layers, n_tokens=1, page_size=1, kv_heads=config.n_kv_heads,
        head_dim=config.head_dim, dtype=dtype,
    )  # fmt: skip
    room = where.free_bytes() / token - PAGE_SIZE  # of the spare page
    if room < max_context:
        raise ValueError(
            f"max_context: {max_context} tokens take {max_context * token / 1e9:.2f} GB of keys "
            f"and values; on {where.torch_device} there is room for {max(int(room), 0)} tokens "
            "beside the weights"
        )
    return int(min(room, max_context * min(max_batch, 8)))


def _is_ids(prompt) -> bool:
    return all(isinstance(t, int) for t in prompt) and len(prompt) > 0
