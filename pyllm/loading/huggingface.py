"""Hugging Face directories: config.json, generation_config.json and safetensors.

The safetensors format: https://huggingface.co/docs/safetensors (a length, a JSON header, the
tensors' bytes end to end). Pickled weights are refused: loading a pickle runs code.
"""

import math
from pathlib import Path

from .checkpoint import Checkpoint, MappedFile, TensorInfo
from .errors import LoadError
from .json_object import parse_object, read_json

# dtype in the header -> bits of an element
DTYPES = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
MAX_DIMS = 16

INDEX = "model.safetensors.index.json"


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_safetensors(file):
    """The tensors of one mapped .safetensors file: dict of name -> TensorInfo."""

    def fail(problem):
        raise LoadError(file.path, problem)

    if file.size < 8:
        fail(f"expected a safetensors file, it has only {file.size} bytes")
    length = int.from_bytes(file.mmap[:8], "little")
    if length > min(MAX_HEADER, file.size - 8):
        fail(f"expected a safetensors file, its header would be {length} bytes of {file.size - 8}")
    header = parse_object(file.path, file.mmap[8 : 8 + length], "a safetensors header")
    header.pop("__metadata__", None)
    start, tensors = 8 + length, {}
    for name, entry in header.items():
        if not isinstance(entry, dict):
            fail(f"tensor {name!r}: expected an object, got a {type(entry).__name__}")
        dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            fail(f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
            fail(f"tensor {name!r}: expected a shape of at most {MAX_DIMS} sizes, got {shape!r}")
        if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
            fail(f"tensor {name!r}: expected data_offsets [begin, end], got {span!r}")
        begin, end = span
        if end > file.size - start or begin > end:
            fail(f"tensor {name!r} is at {begin} to {end} of {file.size - start} bytes")
        bits = math.prod(shape) * DTYPES[dtype]
        if bits != 8 * (end - begin):
            fail(f"tensor {name!r}, {dtype} {shape}, is {bits // 8} bytes, got {end - begin}")
        tensors[name] = TensorInfo(name, dtype, tuple(shape), end - begin, start + begin, file.path)
    _check_layout(file, start, tensors.values(), fail)
    return tensors


def _check_layout(file, start, tensors, fail):
    """The format has the tensors end to end: no overlap, no gap, nothing after the last."""
    end = start
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            what = "overlaps the one before" if info.offset < end else "leaves a gap before it"
            fail(f"tensor {info.name!r} {what}: expected byte {end}, got {info.offset}")
        end += info.nbytes
    if end != file.size:
        fail(f"expected the tensors to end at byte {file.size}, they end at {end}")


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as `save_pretrained` writes it; see `Checkpoint`. Only headers are read."""

    format = "huggingface"

    def __init__(self, path):
        self.path = Path(path)
        self.metadata = read_json(self.path / "config.json")
        self.architecture = self.metadata.get("model_type")
        if not isinstance(self.architecture, str):
            raise LoadError(
                self.path / "config.json",
                f"expected 'model_type' to be a string, got {self.architecture!r}",
            )
        self._files, self.tensors = {}, {}
        self._weight_map = self._shards()
        for shard in dict.fromkeys(self._weight_map.values()) or self._single():
            self._open(self.path / shard)
        for name, shard in self._weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != shard:
                raise LoadError(
                    self.path / INDEX, f"expected tensor {name!r} in {shard}, not there"
                )
        self.generation = self._read_generation()

    def _shards(self):
        """Tensor name -> file name from the index; empty where there is none."""
        index = self.path / INDEX
        if not index.is_file():
            return {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadError(index, "expected a 'weight_map' of tensor names to files")
        for file in weight_map.values():
            # A plain name, so that an index cannot reach outside its directory.
            plain = isinstance(file, str) and file not in ("", ".", "..")
            if not plain or set(file) & set("/\\\0") or not file.endswith(".safetensors"):
                raise LoadError(index, f"expected the name of a .safetensors file, got {file!r}")
        return weight_map

    def _single(self):
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if "model.safetensors" in files:
            return ["model.safetensors"]
        if len(files) == 1:
            return files
        if files:
            raise LoadError(self.path, f"{len(files)} .safetensors files and no {INDEX}")
        pickled = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in self.path.glob(p))
        if pickled:
            raise LoadError(
                self.path,
                f"expected .safetensors, found {pickled[0]}: pickled weights are not loaded, since "
                "a pickle can run any code; convert with save_pretrained(safe_serialization=True)",
            )
        raise LoadError(self.path, "expected model.safetensors, found no weights")

    def _open(self, path):
        file = MappedFile(path)
        for name, info in read_safetensors(file).items():
            if name in self.tensors:
                other = self.tensors[name].file.name
                raise LoadError(path, f"tensor {name!r} is in this shard and in {other}")
            self.tensors[name] = info
        self._files[file.path] = file

    def _read_generation(self):
        path = self.path / "generation_config.json"
        given = read_json(path) if path.is_file() else {}
        generation = {key: value for key, value in given.items() if value is not None}
        for key in ("bos_token_id", "eos_token_id"):
            ids = generation.pop(key, None)
            if ids is None:
                ids = self.metadata.get(key)
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(map(_is_size, ids)):
                raise LoadError(path, f"expected {key!r} to be token ids, got {ids!r}")
            generation[key] = ids
        return generation

    def _build_tokenizer(self):
        from .tokenizer import tokenizer_from_directory

        return tokenizer_from_directory(self.path, self.generation)
