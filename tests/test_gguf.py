"""The GGUF reader: against the gguf package on good files, LoadError on every bad one."""

import os
import struct

import gguf
import numpy as np
import pytest
import torch
from hostile import EXTREMES, FUZZ, MUTATIONS, mutated, opened_within_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_gguf

from pyllm.loading import LoadError, open_checkpoint
from pyllm.loading.ggml_types import GGML_TYPES


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


ARCHITECTURE = pair("general.architecture", 8, string("llama"))


def tensor(name="a", dims=(32,), kind=0, offset=0, rank=None):
    dims_bytes = struct.pack(f"<{len(dims)}Q", *dims)
    rank = len(dims) if rank is None else rank
    return string(name) + struct.pack("<I", rank) + dims_bytes + struct.pack("<IQ", kind, offset)


def build(
    pairs=(ARCHITECTURE,),
    tensors=(),
    data=4096,
    magic=b"GGUF",
    version=3,
    n_tensors=None,
    n_pairs=None,
):
    """The bytes of a GGUF file; the counts can be made to lie."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def written(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_agrees_with_the_gguf_package(tmp_path, quant):
    path = tiny_gguf(tmp_path / "model.gguf", quant=quant, tied=False)
    checkpoint, oracle = open_checkpoint(path), gguf.GGUFReader(str(path))
    assert checkpoint.format == "gguf"
    assert checkpoint.architecture == "llama"
    fields = {k: f.contents() for k, f in oracle.fields.items() if not k.startswith("GGUF.")}
    assert dict(checkpoint.metadata) == fields
    assert list(checkpoint.tensors) == [t.name for t in oracle.tensors]
    for expected in oracle.tensors:
        info = checkpoint.tensors[expected.name]
        assert info.type == expected.tensor_type.name
        assert info.shape == tuple(reversed(expected.shape.tolist()))
        assert info.offset == expected.data_offset
        assert bytes(checkpoint.raw(info.name)) == expected.data.tobytes()


def test_the_type_table_agrees_with_the_gguf_package():
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never in files; ggml has made it smaller since
            assert GGML_TYPES[int(kind)] == (kind.name, block, nbytes)


def test_float_tensors_are_views_that_never_change_the_file(tmp_path):
    path = tiny_gguf(tmp_path / "model.gguf", quant="BF16")
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    norm = checkpoint.float_tensor("output_norm.weight")
    assert norm.dtype == torch.float32
    assert norm.data_ptr() == checkpoint.raw("output_norm.weight").ctypes.data
    embedding = checkpoint.float_tensor("token_embd.weight")
    assert embedding.dtype == torch.bfloat16
    assert embedding.shape == checkpoint.tensors["token_embd.weight"].shape
    norm.zero_()
    assert path.read_bytes() == before
    del checkpoint
    assert torch.isfinite(embedding).all()  # the mapping lives as long as its views


def test_released_tensors_are_read_again(tmp_path):
    path = tiny_gguf(tmp_path / "model.gguf", quant="Q8_0", hidden=256)
    checkpoint = open_checkpoint(path)
    before = bytes(checkpoint.raw("token_embd.weight"))
    for name in checkpoint.tensors:
        checkpoint.release(name)
    assert bytes(checkpoint.raw("token_embd.weight")) == before


def test_release_gives_memory_back(tmp_path):
    path = written(tmp_path, build(tensors=[tensor(dims=(1 << 22,))], data=1 << 24))
    checkpoint = open_checkpoint(path)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    int(checkpoint.raw("a").sum())
    touched = resident()
    checkpoint.release("a")
    assert touched - resident() > 15 << 20


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    path = written(tmp_path, build(tensors=[tensor(dims=(1 << 38,))], data=0))
    try:
        os.truncate(path, path.stat().st_size + (1 << 40))
    except OSError as error:
        pytest.skip(f"the file system has no sparse files of 1 TiB: {error}")
    assert open_checkpoint(path).float_tensor("a")[12345] == 0


def test_unknown_tensor_and_non_float_tensor(tmp_path):
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "model.gguf"))
    with pytest.raises(LoadError, match="expected a tensor named 'nope', found none"):
        checkpoint.raw("nope")
    with pytest.raises(LoadError, match=r"expected one of F32, F16, BF16, got Q4_1"):
        checkpoint.float_tensor("token_embd.weight")


def test_values_of_every_type(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    values = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 4000000000,
        "int32": -2000000000,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "h\u00e9",
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    arrays = {"bools": [True, False], "ints": [1, -2, 3], "floats": [0.5, 2.0], "texts": ["", "x"]}
    for name, value in arrays.items():
        writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = open_checkpoint(path).metadata
    assert {k: metadata[k] for k in values} == values
    assert {k: metadata[k] for k in arrays} == arrays
    assert metadata.array_length("ints") == 3
    assert metadata.get("nope", 7) == 7


def test_version_2_scalars_and_empty_tensors_are_read(tmp_path):
    tensors = [tensor("scalar", ()), tensor("empty", (32, 0), offset=32), tensor("b", offset=32)]
    checkpoint = open_checkpoint(written(tmp_path, build(tensors=tensors, version=2)))
    assert checkpoint.float_tensor("scalar").shape == ()
    assert checkpoint.float_tensor("empty").shape == (0, 32)
    assert checkpoint.float_tensor("b").shape == (32,)


BAD = {
    "empty": (b"", "the file is empty"),
    "magic": (build(magic=b"GGML"), "expected a GGUF file, its first bytes are b'GGML'"),
    "version 1": (build(version=1), "version 2 or 3, got version 1"),
    "version 4": (build(version=4), "version 2 or 3, got version 4"),
    "big-endian": (build(version=3 << 24), "got big-endian version 3"),
    "many tensors": (build(n_tensors=2**63), r"9223372036854775808 tensors declared"),
    "many pairs": (build(n_pairs=2**40), "1099511627776 key-values declared"),
    "more pairs than there are": (build(n_pairs=9, data=64), "room|truncated|bytes long|occurs"),
    "key too long": (build([string("k" * 70000)]), "a key is 70000 bytes long, expected at most"),
    "key past the end": (build([struct.pack("<Q", 2**62)]), "a key is 4611686018427387904 bytes"),
    "key not UTF-8": (build([pair(b"\xff", 4, bytes(4))]), "a key at byte 32 is not UTF-8"),
    "text not UTF-8": (build([pair("k", 8, string(b"\xc3"))]), "value of 'k' .* is not UTF-8"),
    "key twice": (build([ARCHITECTURE] * 2), "key 'general.architecture' occurs twice"),
    "value type": (build([pair("k", 13, b"")]), "'k' has value type 13, expected 0 to 12"),
    "bool of 2": (build([pair("k", 7, b"\2")]), "'k' is a bool: expected 0 or 1, got 2"),
    "nested array": (
        build([pair("k", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]),
        "'k' is an array of arrays",
    ),
    "array type": (build([pair("k", 9, struct.pack("<IQ", 99, 1))]), "'k' has array type 99"),
    "array too long": (
        build([pair("k", 9, struct.pack("<IQ", 10, 2**61))]),
        "2305843009213693952 elements of 'k' declared",
    ),
    "string array past the end": (
        build([pair("k", 9, struct.pack("<IQQ", 8, 3, 2**63))]),
        "the strings of 'k' run past the end",
    ),
    "no architecture": (build([]), "expected 'general.architecture' to be str, got nothing"),
    "architecture a number": (
        build([pair("general.architecture", 4, bytes(4))]),
        "expected 'general.architecture' to be str, got int",
    ),
    "alignment 0": (
        build([ARCHITECTURE, pair("general.alignment", 4, bytes(4))]),
        "'general.alignment' to be a power of two, got 0",
    ),
    "alignment 24": (
        build([ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 24))]),
        "'general.alignment' to be a power of two, got 24",
    ),
    "split file": (
        build([ARCHITECTURE, pair("split.count", 2, struct.pack("<H", 3))]),
        "split over several files",
    ),
    "unknown ggml type": (build(tensors=[tensor(kind=77)]), "has ggml type 77, which is not known"),
    "withdrawn type": (build(tensors=[tensor(kind=31)]), r"ggml type 31 \(Q4_0_4_4, withdrawn\)"),
    "rank": (build(tensors=[tensor(rank=5, dims=[1] * 5)]), "'a' has 5 dimensions, expected at"),
    "rank 2^32-1": (build(tensors=[tensor(rank=2**32 - 1)]), "has 4294967295 dimensions"),
    "ragged rows": (build(tensors=[tensor(dims=(33,), kind=3)]), "multiple of 32 for Q4_1"),
    "scalar of blocks": (build(tensors=[tensor(dims=(), kind=3)]), "a scalar of block type Q4_1"),
    "name twice": (build(tensors=[tensor(), tensor()]), "the tensor name 'a' occurs twice"),
    "overlap": (
        build(tensors=[tensor(), tensor("b", offset=96)]),
        "tensors 'a' and 'b' overlap at byte",
    ),
    "misaligned": (build(tensors=[tensor(offset=4)]), "offset 4, not a multiple of 32"),
    "offset past the end": (build(tensors=[tensor(offset=2**40)]), "the file has"),
    "offset 2^64-32": (build(tensors=[tensor(offset=2**64 - 32)]), "the file has"),
    "product overflows": (build(tensors=[tensor(dims=(2**32,) * 4)]), "the file has"),
    "product overflows to 0": (build(tensors=[tensor(dims=(2**62, 4, 4))]), "the file has"),
    "huge and empty": (build(tensors=[tensor(dims=(2**63, 0))]), "the file has"),
    "data cut off": (build(tensors=[tensor(dims=(2048,))], data=4096), "the file has"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(LoadError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_not_a_file(tmp_path):
    with pytest.raises(LoadError, match="expected a file, found none"):
        open_checkpoint(tmp_path / "nope.gguf")
    with pytest.raises(LoadError, match=r"config.json or one .gguf file, found neither"):
        open_checkpoint(tmp_path)
    tiny_gguf(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).architecture == "llama"
    tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(LoadError, match=r"2 .gguf files: name one"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny_bytes(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tiny_gguf(path, tokenizer=request.param, layers=1)
    data = path.read_bytes()
    header = min(t.offset for t in open_checkpoint(path).tensors.values())
    return data, header


@given(mutations=MUTATIONS)
@FUZZ
def test_mutated_headers_give_only_load_errors(tiny_bytes, tmp_path, mutations):
    opened_within_bounds(written(tmp_path, mutated(*tiny_bytes, mutations)))


def test_truncated_anywhere(tiny_bytes, tmp_path):
    data, header = tiny_bytes
    cuts = [*range(0, 400), *range(400, header, 97), header, len(data) - 1]
    for cut in cuts:
        path = written(tmp_path, data[:cut])
        with pytest.raises(LoadError):
            open_checkpoint(path)


@given(where=st.integers(0, 1_785_000), value=st.sampled_from(EXTREMES), cut=st.booleans())
@settings(FUZZ, max_examples=40)
def test_the_real_header_mutated(smollm2, tmp_path, where, value, cut):
    real = np.fromfile(smollm2, dtype=np.uint8, count=1_800_000).tobytes()
    mutant = bytearray(real[:where] if cut else real)
    mutant[where : where + 8] = value.to_bytes(8, "little")
    # The tensors' data is missing, so that opening fails in the end; the walk there counts.
    opened_within_bounds(written(tmp_path, bytes(mutant)), tokenizer=False)


def test_the_real_file(smollm2):
    checkpoint = open_checkpoint(smollm2)
    assert len(checkpoint.tensors) == 272
    assert checkpoint.metadata["llama.block_count"] == 30
    assert checkpoint.tensors["token_embd.weight"].type == "Q8_0"
    assert checkpoint.tensors["token_embd.weight"].shape == (49152, 576)
    assert checkpoint.generation == {"bos_token_id": [1], "eos_token_id": [2]}
