"""Hugging Face directories: against the safetensors package, and LoadError on every bad one."""

import json
import shutil
import struct

import pytest
import torch
from hostile import FUZZ, MUTATIONS, mutated, opened_within_bounds
from hypothesis import given
from safetensors.torch import load_file, save_file
from tiny_models import tiny_hf

from pyllm.loading import LoadError, open_checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("sharded"), "qwen2", max_shard_size="100KB")


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_agrees_with_the_safetensors_package(tmp_path, kind, dtype):
    path = tiny_hf(tmp_path, kind, dtype=dtype, layers=1)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "huggingface"
    assert checkpoint.architecture == kind
    assert checkpoint.metadata == json.loads((path / "config.json").read_text())
    assert checkpoint.generation["bos_token_id"] == [1]
    assert checkpoint.generation["eos_token_id"] == [2, 0]
    expected = load_file(path / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        ours = checkpoint.float_tensor(name)
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)


def test_shards_hold_the_same_model(sharded, tmp_path):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    checkpoint = open_checkpoint(sharded)
    expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.float_tensor(name), tensor)


def test_every_dtype_and_an_unaligned_file(tmp_path):
    tensors = {
        "f": torch.randn(3, 5),
        "h": torch.randn(7).half(),
        "b": torch.randn(2, 2).bfloat16(),
        "i": torch.arange(5),
        "u": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "e": torch.empty(0, 4),
        "s": torch.tensor(1.5),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # One more space in the header moves every tensor to an odd address.
    data = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    data = struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    for name in ("f", "h", "b", "e", "s"):
        assert torch.equal(checkpoint.float_tensor(name), tensors[name])
    for name, tensor in tensors.items():
        flat = (
            tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.flatten()
        )
        assert bytes(checkpoint.raw(name)) == bytes(flat.tolist())
    assert checkpoint.generation == {}


def header(**entries):
    body = json.dumps(entries).encode()
    return struct.pack("<Q", len(body)) + body


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
TWICE += b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
DEEP = b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"
BIG = b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,8]}}'
HUGE_NUMBER = b'{"a":' + b"9" * 5000 + b"}"


def raw_header(body):
    return struct.pack("<Q", len(body)) + body


BAD = {
    "empty": (b"", "the file is empty"),
    "short": (b"1234567", "it has only 7 bytes"),
    "header length": (struct.pack("<Q", 2**63) + b"{}", "its header would be 9223372036854775808"),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "its header would be 100 bytes of 2"),
    "not JSON": (raw_header(b"{nope"), "expected a safetensors header"),
    "not UTF-8": (raw_header(b'{"\xff": 1}'), "expected a safetensors header"),
    "not an object": (raw_header(b"[]"), "expected a safetensors header, got a list"),
    "nested deeply": (raw_header(DEEP), "expected a safetensors header"),
    "huge number": (raw_header(HUGE_NUMBER), "expected a safetensors header"),
    "name twice": (raw_header(TWICE) + bytes(8), "the key 'a' occurs twice"),
    "entry not an object": (header(a=3), "tensor 'a': expected an object, got a int"),
    "no dtype": (header(a={"shape": [], "data_offsets": [0, 0]}), "tensor 'a' has dtype None"),
    "dtype": (header(a=entry("F33")) + bytes(8), "tensor 'a' has dtype 'F33', expected one of"),
    "dtype a list": (header(a=entry(["F32"])) + bytes(8), r"tensor 'a' has dtype \['F32'\]"),
    "shape negative": (header(a=entry(shape=[-2])) + bytes(8), "expected a shape of at most 16"),
    "shape of floats": (header(a=entry(shape=[2.0])) + bytes(8), "expected a shape of at most 16"),
    "shape of bools": (header(a=entry(shape=[True])) + bytes(8), "expected a shape of at most 16"),
    "shape with many sizes": (header(a=entry(shape=[1] * 17)) + bytes(8), "at most 16 sizes"),
    "shape overflows": (
        header(a=entry(shape=[2**62] * 16)) + bytes(8),
        r"tensor 'a', F32 \[4611686018427387904",
    ),
    "shape too big for a number": (raw_header(BIG) + bytes(8), "expected a shape of at most 16"),
    "offsets one number": (header(a=entry(span=[0])) + bytes(8), "expected data_offsets"),
    "offsets negative": (header(a=entry(span=[-8, 0])) + bytes(8), "expected data_offsets"),
    "offsets reversed": (header(a=entry(span=[8, 0])) + bytes(8), "is at 8 to 0 of 8 bytes"),
    "offsets past the end": (header(a=entry(span=[0, 2**62])) + bytes(8), "of 8 bytes"),
    "size": (header(a=entry(shape=[3])) + bytes(8), r"F32 \[3\], is 12 bytes, got 8"),
    "overlap": (
        header(a=entry(), b=entry(span=[4, 12])) + bytes(12),
        "tensor 'b' overlaps the one before",
    ),
    "the same bytes": (header(a=entry(), b=entry()) + bytes(8), "overlaps the one before"),
    "gap": (header(a=entry(span=[4, 12])) + bytes(12), "tensor 'a' leaves a gap before it"),
    "more bytes": (header(a=entry()) + bytes(9), "expected the tensors to end at byte"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_safetensors(tmp_path, data, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(LoadError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def change_index(path, change):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


NAME = "model.norm.weight"


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", 3, None, "\0"],
    ids=ascii,
)
def test_an_index_cannot_reach_outside_its_directory(copy, name):
    change_index(copy, lambda index: index["weight_map"].update({NAME: name}))
    with pytest.raises(LoadError, match=r"expected the name of a .safetensors file, got"):
        open_checkpoint(copy)


def test_bad_indexes(copy):
    file = copy / "model.safetensors.index.json"
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    good = file.read_text()
    for content in ("", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        file.write_text(content)
        with pytest.raises(LoadError, match=r"index.json: expected"):
            open_checkpoint(copy)
    file.write_text(good)
    change_index(copy, lambda index: index["weight_map"].update(nope=first.name))
    with pytest.raises(LoadError, match=r"expected tensor 'nope' in .*, not there"):
        open_checkpoint(copy)
    file.write_text(good)
    kept = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(LoadError, match="is in this shard and in"):
        open_checkpoint(copy)
    second.unlink()
    with pytest.raises(LoadError, match=f"{second.name}: expected a file, found none"):
        open_checkpoint(copy)
    second.write_bytes(kept)
    open_checkpoint(copy)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LoadError, match=r"expected model.safetensors, found no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(LoadError, match=r"found pytorch_model.bin: pickled weights are not loaded"):
        open_checkpoint(tmp_path)


def test_several_files_without_an_index(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(LoadError, match=r"2 .safetensors files and no model.safetensors.index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: expected a JSON object"),
        ("[1]", "config.json: expected a JSON object, got a list"),
        ("{}", "expected 'model_type' to be a string, got None"),
        ('{"model_type": 3}', "expected 'model_type' to be a string, got 3"),
        ('{"model_type": "a", "model_type": "b"}', "the key 'model_type' occurs twice"),
    ],
)
def test_bad_config(copy, content, message):
    (copy / "config.json").write_text(content)
    with pytest.raises(LoadError, match=message):
        open_checkpoint(copy)


def test_generation_config(copy):
    file = copy / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_p": null, "eos_token_id": 7}')
    generation = open_checkpoint(copy).generation
    assert generation == {"temperature": 0.6, "eos_token_id": [7], "bos_token_id": [1]}
    file.write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(LoadError, match="expected 'eos_token_id' to be token ids"):
        open_checkpoint(copy)


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory):
    path = tiny_hf(tmp_path_factory.mktemp("one"), layers=1) / "model.safetensors"
    data = path.read_bytes()
    return data, 8 + struct.unpack("<Q", data[:8])[0]


@given(mutations=MUTATIONS)
@FUZZ
def test_mutated_headers_give_only_load_errors(tiny_bytes, tmp_path, mutations):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(mutated(*tiny_bytes, mutations))
    opened_within_bounds(tmp_path, tokenizer=False)
