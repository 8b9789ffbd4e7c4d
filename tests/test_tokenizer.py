"""Tokenizers from GGUF files and Hugging Face directories, and streamed decoding."""

import itertools
import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL, byte_level_vocabulary, tiny_gguf, tiny_hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from pyllm.loading import LoadError, open_checkpoint
from pyllm.loading import tokenizer as tokenizer_module
from pyllm.loading.gguf_tokenizer import SPLITS

# What another program makes of the same texts; "source" says which.
EXPECTED = json.loads((Path(__file__).parent / "data" / "tokenization.json").read_text())
TEXTS = [text for text, _ in EXPECTED["smollm2"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tokenizers of every kind by name, none of which needs the network."""
    path = tmp_path_factory.mktemp("tokenizers")
    gpt2 = tiny_gguf(path / "gpt2.gguf")
    llama = tiny_gguf(path / "llama.gguf", tokenizer="llama")
    huggingface = tiny_hf(path / "hf", layers=1)
    return {
        "gpt2": open_checkpoint(gpt2).tokenizer(),
        "llama": open_checkpoint(llama).tokenizer(),
        "huggingface": open_checkpoint(huggingface).tokenizer(),
    }


@pytest.fixture(scope="module")
def real(smollm2):
    return open_checkpoint(smollm2).tokenizer()


def test_the_real_tokenizer_agrees_with_llama_cpp(real):
    for text, ids in EXPECTED["smollm2"]:
        assert real.encode(text) == ids, repr(text)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tiny_tokenizers_agree_with_llama_cpp(tiny, kind):
    for text, ids in EXPECTED[f"tiny_{kind}"]:
        assert tiny[kind].encode(text, add_special_tokens=False) == ids, repr(text)


def test_round_trip_of_the_real_tokenizer(real):
    for text in TEXTS:
        assert real.decode(real.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "huggingface"])
@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_round_trip(tiny, kind, text):
    text = text.replace("\u2581", "")  # SentencePiece's stand-in for a space
    ids = tiny[kind].encode(text, add_special_tokens=False)
    assert tiny[kind].decode(ids, skip_special_tokens=False) == text


def test_special_tokens(tiny, real):
    for tokenizer in (tiny["gpt2"], tiny["huggingface"]):
        assert tokenizer.encode("<|im_end|>") == [2]
        assert tokenizer.decode([2, 0]) == ""
        assert tokenizer.decode([2, 0], skip_special_tokens=False) == "<|im_end|><|endoftext|>"
        assert tokenizer.bos_id == 1
        assert tokenizer.eos_ids == {0, 2}
        assert tokenizer.vocab_size == 320
    assert tiny["llama"].encode("") == [1]
    assert tiny["llama"].encode("the") == [1, *tiny["llama"].encode("the", False)]
    assert tiny["llama"].eos_ids == {2}
    assert real.vocab_size == 49152
    assert (real.bos_id, real.eos_ids) == (1, {0, 2})


def test_a_leading_space_belongs_to_a_continuation(tiny):
    ids = tiny["llama"].encode("the world", add_special_tokens=False)
    assert tiny["llama"].decode(ids) == "the world"
    assert tiny["llama"].decode(ids, continuation=True) == " the world"
    assert tiny["gpt2"].decode(tiny["gpt2"].encode(" the")) == " the"


def test_ids_outside_the_vocabulary(tiny):
    for tokenizer in tiny.values():
        assert tokenizer.decode([100000]) == ""
        with pytest.raises(ValueError, match="token id: expected 0 or more, got -1"):
            tokenizer.decode([-1])


def test_bad_text(tiny):
    with pytest.raises(ValueError, match="text: not valid Unicode at character 1"):
        tiny["gpt2"].encode("a\udcff")
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        tiny["gpt2"].encode(b"a")


PIECES = {
    "default": "I|'|M| it|'|s| |123|45| fooBAR|();|\n\n | x|=|\u4e2d\u6587| \u00e9|/",
    "gpt-2": "I|'|M| it|'s| 12345| fooBAR|();|\n\n | x|=|\u4e2d\u6587| \u00e9|/",
    "smollm": "I|'|M| it|'s| |1|2|3|4|5| fooBAR|();|\n\n | x|=|\u4e2d\u6587| \u00e9|/",
    "llama-bpe": "I|'M| it|'s| |123|45| fooBAR|();\n\n| | x|=\u4e2d\u6587| \u00e9|/",
    "qwen2": "I|'M| it|'s| |1|2|3|4|5| fooBAR|();\n\n| | x|=\u4e2d\u6587| \u00e9|/",
    "tekken": "I|'M| it|'s| |1|2|3|4|5| foo|BAR|();\n\n| | x|=\u4e2d\u6587| \u00e9|/",
    "gpt-4o": "I'M| it's| |123|45| foo|BAR|();\n\n| | x|=\u4e2d\u6587| \u00e9|/",
    "falcon": "I|'|M| it|'|s| |123|45| fooBAR|();|\n\n | x|=|\u4e2d\u6587| \u00e9|/",
    "deepseek-llm": "I|'|M| it|'|s| |12345| fooBAR|();|\n|\n| | x|=|\u4e2d\u6587| \u00e9|/",
    "deepseek-coder": "I|'|M| it|'|s| |1|2|3|4|5| fooBAR|();|\n|\n| | x|=|\u4e2d\u6587| \u00e9|/",
    "deepseek-v3": "I|'M| it|'s| |123|45| fooBAR|();\n\n| | x|=|\u4e2d\u6587| \u00e9|/",
}


@pytest.mark.parametrize("pre", PIECES)
def test_pre_tokenizers(pre):
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    text = "I'M it's 12345 fooBAR();\n\n  x=\u4e2d\u6587 \u00e9/"
    pieces = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert [piece for piece, _ in pieces] == PIECES[pre].split("|")


@pytest.mark.parametrize("pre", SPLITS)
def test_every_pre_tokenizer_loses_nothing(pre):
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    sequence = pre_tokenizers.Sequence(splits)
    for text in TEXTS:
        assert "".join(piece for piece, _ in sequence.pre_tokenize_str(text)) == text


def test_a_directory_agrees_with_transformers(tmp_path):
    import transformers

    path = tiny_hf(tmp_path, layers=1)
    ours, theirs = (
        open_checkpoint(path).tokenizer(),
        transformers.AutoTokenizer.from_pretrained(path),
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


# Decoding


@pytest.mark.parametrize("kind", ["gpt2", "llama", "huggingface"])
def test_decode_agrees_with_the_library(tiny, kind):
    tokenizer = tiny[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", ["gpt2", "huggingface"])
@given(ids=st.lists(st.integers(0, 319), max_size=20))
@settings(max_examples=300, deadline=None)
def test_decoding_any_tokens_agrees_with_the_library(tiny, kind, ids):
    assert tiny[kind].decode(ids) == tiny[kind]._backend.decode(ids)


def assert_streams(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [*map(stream.push, ids), stream.finish()]
    assert "".join(parts) == tokenizer.decode(ids)
    return parts


@pytest.mark.parametrize("kind", ["gpt2", "llama", "huggingface"])
@given(ids=st.lists(st.integers(0, 330), max_size=30))
@settings(max_examples=300, deadline=None)
def test_streaming_any_tokens_equals_decoding(tiny, kind, ids):
    assert_streams(tiny[kind], ids)


MULTI_BYTE = [
    "\U0001f600",
    "\u4e2d\u6587",
    "e\u0301",
    "\U0001f469\u200d\U0001f467",
    "a\u00e9\U0001f1eb",
]


@pytest.mark.parametrize("text", MULTI_BYTE, ids=ascii)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_streaming_never_emits_half_a_character(tiny, kind, text):
    tokenizer = tiny[kind]
    byte = {"gpt2": byte_token, "llama": lambda value: f"<0x{value:02X}>"}[kind]
    ids = [tokenizer.token_to_id(byte(value)) for value in text.encode()]
    parts = assert_streams(tokenizer, ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)
    # The end of a text in the midst of a character is one replacement character, at the end.
    for cut in range(len(ids)):
        parts = assert_streams(tokenizer, ids[:cut])
        assert all("\ufffd" not in part for part in parts[:-1])


def byte_token(value):
    return next(c for c, b in tokenizer_module.BYTE_ALPHABET.items() if b == value)


@pytest.mark.parametrize("text", MULTI_BYTE, ids=ascii)
def test_streaming_over_every_split_of_the_bytes(text):
    data = text.encode()
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(data)), n) for n in range(4)
    ):
        edges = [0, *cuts, len(data)]
        pieces = ["".join(map(byte_token, data[a:b])) for a, b in itertools.pairwise(edges)]
        tokens = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        backend = Tokenizer(models.BPE(tokens, []))
        backend.decoder = decoders.ByteLevel()
        tokenizer = tokenizer_module.Tokenizer(
            backend, "x", bos_id=None, eos_ids=(), chat_template=None, special_tokens={}
        )
        parts = assert_streams(tokenizer, [tokens[piece] for piece in pieces])
        assert "".join(parts) == text
        assert all("\ufffd" not in part for part in parts)


def test_a_decoder_that_is_not_bytewise_streams_at_the_end():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = tokenizer_module.Tokenizer(
        backend, "x", bos_id=None, eos_ids=(), chat_template=None, special_tokens={}
    )
    assert tokenizer.decode([1, 2, 1]) == "playing play"
    assert assert_streams(tokenizer, [1, 2, 1]) == ["", "", "", "playing play"]


# Bad tokenizers


def gguf_with(path, **overrides):
    """A GGUF file with nothing but a tokenizer; keys are replaced, or left out by None."""
    tokens, merges = byte_level_vocabulary()
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides,
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


SPM = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a"], "token_type": [2, 3, 3, 1]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": None}, "expected 'tokenizer.ggml.model' to be str, got nothing"),
        ({"model": "bert"}, "tokenizer model 'bert': expected one of gpt2, llama"),
        ({"pre": "nope"}, "pre-tokenizer 'nope': expected one of .*llama-bpe"),
        ({"tokens": None}, "expected 'tokenizer.ggml.tokens' to be an array of str"),
        ({"tokens": [1, 2]}, "expected 'tokenizer.ggml.tokens' to be an array of str"),
        ({"tokens": ["a", "b", "a"], "token_type": [1] * 3}, "the token 'a' occurs twice"),
        ({"token_type": [1, 2]}, "'tokenizer.ggml.token_type' has 2 items, expected 320"),
        ({"merges": ["ab"]}, "expected each merge to be two tokens and a space"),
        ({"merges": ["ab", "a b c"]}, "expected each merge to be two tokens and a space"),
        ({"merges": ["a nope"]}, "not a tokenizer that can be used"),
        ({"bos_token_id": 320}, "bos token id 320: expected one of the 320 tokens"),
        ({"eos_token_id": "x"}, "expected 'tokenizer.ggml.eos_token_id' to be int, got str"),
        ({**SPM, "merges": None}, "expected 'tokenizer.ggml.scores' to be an array of float"),
        ({**SPM, "scores": [0.0]}, "'tokenizer.ggml.scores' has 1 items, expected 4"),
        ({**SPM, "scores": [0.0, 0.0, 0.0, float("nan")]}, "expected finite"),
        (
            {**SPM, "tokens": ["<unk>", "<s>", "</s>", "a" * 300], "scores": [0.0] * 4},
            "a token has 300 characters, expected at most 256",
        ),
    ],
)
def test_bad_gguf_tokenizers(tmp_path, overrides, message):
    path = gguf_with(tmp_path / "model.gguf", **overrides)
    with pytest.raises(LoadError, match=message):
        open_checkpoint(path).tokenizer()


def test_a_file_without_the_optional_keys(tmp_path):
    path = gguf_with(
        tmp_path / "model.gguf", pre=None, token_type=None, bos_token_id=None, eos_token_id=None
    )
    tokenizer = open_checkpoint(path).tokenizer()
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == set()
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


def test_bos_and_eos_are_added_where_the_file_says(tmp_path):
    path = tmp_path / "model.gguf"
    tokens, merges = byte_level_vocabulary()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_eos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ids = open_checkpoint(path).tokenizer().encode("a")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00\xff"], ids=ascii
)
def test_bad_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LoadError, match=r"tokenizer.json: not a tokenizer that can be used"):
        tokenizer_module.tokenizer_from_directory(tmp_path, {})


def test_missing_tokenizer_json(tmp_path):
    with pytest.raises(LoadError, match=r"expected tokenizer.json, found none"):
        tokenizer_module.tokenizer_from_directory(tmp_path, {})


def test_chat_template_of_a_directory(tiny, tmp_path):
    tiny["huggingface"]._backend.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"

    def template():
        return tokenizer_module.tokenizer_from_directory(tmp_path, {}).chat_template

    assert template() is None
    config.write_text(json.dumps({"chat_template": "a"}))
    assert template() == "a"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert template() == "d"
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(LoadError, match="expected 'chat_template' to be a str, got int"):
        template()
    (tmp_path / "chat_template.jinja").write_text("j")
    assert template() == "j"
