"""GGUF files, versions 2 and 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Every number in the header is checked against the file's size before it is used, so that a corrupt
or hostile file gives a LoadError and never an allocation that it chose.
"""

import math
import struct
from collections.abc import Mapping
from typing import NamedTuple

from pyllm import _C

from .checkpoint import Checkpoint, MappedFile, TensorInfo
from .errors import LoadError
from .ggml_types import GGML_TYPES, REMOVED_TYPES

SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),  # bool
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
BOOL, STRING, ARRAY = 7, 8, 9
U32, U64 = SCALARS[4], SCALARS[10]

MAX_NAME = 65535  # of a key, by the specification
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

# GGUF key -> the argument's name in Hugging Face's generation_config.json
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class _Array(NamedTuple):
    """An array in the file, checked to lie inside it but not decoded."""

    type: int
    count: int
    offset: int
    end: int


class _Reader:
    """A cursor over the mapped bytes whose every read is checked."""

    def __init__(self, file):
        self.file, self.data, self.size, self.position = file, file.mmap, file.size, 0

    def fail(self, problem):
        raise LoadError(self.file.path, problem)

    def scalar(self, layout, what):
        end = self.position + layout.size
        if end > self.size:
            self.fail(f"truncated: expected {what} at byte {self.position} of {self.size}")
        (value,) = layout.unpack_from(self.data, self.position)
        self.position = end
        return value

    def count(self, smallest, what):
        """A number of items that take at least `smallest` bytes each."""
        value = self.scalar(U64, f"the number of {what}")
        left = (self.size - self.position) // smallest
        if value > left:
            self.fail(f"{value} {what} declared, the file has room for at most {left}")
        return value

    def string(self, what, longest=None):
        length = self.scalar(U64, f"the length of {what}")
        left = self.size - self.position
        if length > left:
            self.fail(f"{what} is {length} bytes long, {left} are left in the file")
        if longest is not None and length > longest:
            self.fail(f"{what} is {length} bytes long, expected at most {longest}")
        start, self.position = self.position, self.position + length
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8")

    def value(self, key):
        kind = self.scalar(U32, f"the type of {key!r}")
        if kind in SCALARS:
            value = self.scalar(SCALARS[kind], f"the value of {key!r}")
            if kind == BOOL:
                if value > 1:
                    self.fail(f"{key!r} is a bool: expected 0 or 1, got {value}")
                return bool(value)
            return value
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind == ARRAY:
            return self.array(key)
        self.fail(f"{key!r} has value type {kind}, expected 0 to 12")

    def array(self, key):
        kind = self.scalar(U32, f"the type of the array {key!r}")
        if kind == ARRAY:
            self.fail(f"{key!r} is an array of arrays, expected scalars or strings")
        if kind != STRING and kind not in SCALARS:
            self.fail(f"{key!r} has array type {kind}, expected 0 to 12 and not 9")
        smallest = 8 if kind == STRING else SCALARS[kind].size
        count = self.count(smallest, f"elements of {key!r}")
        start = self.position
        if kind == STRING:
            self.position = _C.skip_strings(self.data, self.position, count)
            if self.position < 0:
                self.fail(f"the strings of {key!r} run past the end of the file")
        else:
            self.position += count * smallest
        return _Array(kind, count, start, self.position)


class Metadata(Mapping):
    """The key-values of a GGUF file. Arrays become lists at each access, not before."""

    def __init__(self, file, values):
        self._file, self._values = file, values

    def __getitem__(self, key):
        value = self._values[key]
        if not isinstance(value, _Array):
            return value
        if value.type == STRING:
            return self._strings(key, _C.read_strings)
        layout = f"<{value.count}{SCALARS[value.type].format[1:]}"
        items = struct.unpack_from(layout, self._file.mmap, value.offset)
        return [item != 0 for item in items] if value.type == BOOL else list(items)

    def _strings(self, key, read):
        array = self._values[key]
        try:
            return read(self._file.mmap, array.offset, array.count)
        except UnicodeDecodeError as error:
            raise LoadError(self._file.path, f"{key!r} is not UTF-8: {error}") from None

    def merges(self, key):
        """An array of strings that are two tokens and a space each, as a list of tuples.

        Raises:
            LoadError: if the value is no such array.
        """
        array = self._values.get(key)
        if not isinstance(array, _Array) or array.type != STRING:
            raise LoadError(self._file.path, f"expected {key!r} to be an array of str")
        try:
            return self._strings(key, _C.read_pairs)
        except LoadError:
            raise
        except ValueError:
            problem = "expected each merge to be two tokens and a space"
            raise LoadError(self._file.path, problem) from None

    def release(self):
        """Gives the pages that arrays were read from back to the system, once they were."""
        arrays = [v for v in self._values.values() if isinstance(v, _Array)]
        if arrays:
            begin = min(a.offset for a in arrays)
            self._file.release(begin, max(a.end for a in arrays) - begin)

    def __contains__(self, key):
        return key in self._values

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def array_length(self, key):
        """The number of elements of an array, without decoding it."""
        return self._values[key].count


class GGUFCheckpoint(Checkpoint):
    """A GGUF file; see `Checkpoint`. Only the header is read."""

    format = "gguf"

    def __init__(self, path):
        file = MappedFile(path)
        self.path = file.path
        self._files = {file.path: file}
        reader = _Reader(file)
        tensor_count, value_count = _read_preamble(reader)
        values = _read_values(reader, value_count)
        self.metadata = Metadata(file, values)
        self.tensors = _read_tensors(reader, tensor_count, values)
        self.architecture = self._get("general.architecture", str)
        self.generation = self._read_generation()

    def _get(self, key, kind, default=LoadError):
        """A metadata value of a Python type; required unless a default is given."""
        value = self.metadata.get(key)
        if value is None and default is not LoadError:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            got = "nothing" if value is None else type(value).__name__
            raise LoadError(self.path, f"expected {key!r} to be {kind.__name__}, got {got}")
        return value

    def _read_generation(self):
        generation = {}
        for name, keys in (("bos", ("bos",)), ("eos", ("eos", "eot", "eom"))):
            ids = [self._get(f"tokenizer.ggml.{key}_token_id", int, None) for key in keys]
            ids = list(dict.fromkeys(i for i in ids if i is not None))
            if ids:
                generation[f"{name}_token_id"] = ids
        for key, name in SAMPLING_KEYS.items():
            if key in self.metadata:
                generation[name] = self.metadata[key]
        return generation

    def _build_tokenizer(self):
        from .gguf_tokenizer import tokenizer_from_gguf

        try:
            return tokenizer_from_gguf(self)
        finally:
            self.metadata.release()
            _C.trim_heap()  # what the vocabulary took while it was taken apart


def _read_preamble(reader):
    magic = bytes(reader.data[:4])
    if magic != b"GGUF":
        reader.fail(f"expected a GGUF file, its first bytes are {magic!r} instead of b'GGUF'")
    reader.position = 4
    version = reader.scalar(U32, "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        came = f"big-endian version {swapped}" if swapped in (1, 2, 3) else f"version {version}"
        reader.fail(f"expected a little-endian GGUF file of version 2 or 3, got {came}")
    # A tensor's entry takes at least 24 bytes, a key-value 13.
    return reader.count(24, "tensors"), reader.count(13, "key-values")


def _read_values(reader, count):
    values = {}
    for _ in range(count):
        key = reader.string("a key", MAX_NAME)
        if key in values:
            reader.fail(f"the key {key!r} occurs twice")
        values[key] = reader.value(key)
    if values.get("split.count", 1) not in (0, 1):
        reader.fail("the model is split over several files: merge them (llama-gguf-split --merge)")
    return values


def _read_tensors(reader, count, values):
    entries = []
    names = set()
    for _ in range(count):
        name = reader.string("a tensor's name", MAX_NAME)
        if name in names:
            reader.fail(f"the tensor name {name!r} occurs twice")
        names.add(name)
        rank = reader.scalar(U32, f"the rank of tensor {name!r}")
        if rank > MAX_DIMS:
            reader.fail(f"tensor {name!r} has {rank} dimensions, expected at most {MAX_DIMS}")
        dims = [reader.scalar(U64, f"a dimension of tensor {name!r}") for _ in range(rank)]
        number = reader.scalar(U32, f"the type of tensor {name!r}")
        entries.append((name, dims, number, reader.scalar(U64, f"the offset of {name!r}")))

    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        reader.fail(f"expected 'general.alignment' to be a power of two, got {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, dims, number, offset in entries:
        kind = GGML_TYPES.get(number)
        if kind is None:
            was = f" ({REMOVED_TYPES[number]}, withdrawn)" if number in REMOVED_TYPES else ""
            reader.fail(f"tensor {name!r} has ggml type {number}{was}, which is not known")
        if dims and dims[0] % kind.block:
            reader.fail(
                f"tensor {name!r} has rows of {dims[0]} elements, "
                f"expected a multiple of {kind.block} for {kind.name}"
            )
        if not dims and kind.block != 1:
            reader.fail(f"tensor {name!r} is a scalar of block type {kind.name}")
        nbytes = math.prod(dims) // kind.block * kind.nbytes
        if offset % alignment:
            reader.fail(f"tensor {name!r} is at offset {offset}, not a multiple of {alignment}")
        if max(dims, default=0) >= 2**63 or start + offset + nbytes > reader.size:
            reader.fail(
                f"tensor {name!r} (dimensions {dims}, {kind.name}) needs bytes {start + offset} "
                f"to {start + offset + nbytes}, the file has {reader.size}"
            )
        shape = tuple(reversed(dims))
        info = TensorInfo(name, kind.name, shape, nbytes, start + offset, reader.file.path)
        tensors[name] = info
    _check_overlap(reader, tensors.values())
    return tensors


def _check_overlap(reader, tensors):
    end, before = 0, None
    for info in sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset):
        if info.offset < end:
            reader.fail(f"tensors {before!r} and {info.name!r} overlap at byte {info.offset}")
        end, before = info.offset + info.nbytes, info.name
