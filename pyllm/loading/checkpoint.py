"""What every checkpoint offers, whatever its format: metadata, tensors and a tokenizer."""

import mmap
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pyllm.collector import paused_collector

from .errors import LoadError

FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Without MAP_NORESERVE (not in Python's table before 3.13), a file larger than the memory could not
# be mapped copy-on-write: the system would have to promise memory for copies that nobody makes.
MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 * (sys.platform == "linux"))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it holds.

    `shape` is in PyTorch's order, `[out, in]` for a linear layer; `offset` counts from the start
    of `file`; `type` is the name in the format's own terms ("Q4_1", "F32", "BF16", ...).
    """

    name: str
    type: str
    shape: tuple
    nbytes: int
    offset: int
    file: Path


class MappedFile:
    """A file mapped copy-on-write: views are writable for PyTorch's sake, the file never changes.

    Pages are read when touched and shared with the page cache until somebody writes to them.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise LoadError(path, "expected a file, found none")
        try:
            with open(self.path, "rb") as file:
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                self.mmap = mmap.mmap(file.fileno(), 0, flags=MAP_FLAGS, prot=protection)
        except ValueError:
            raise LoadError(path, "the file is empty") from None
        except OSError as error:
            raise LoadError(path, f"cannot be read: {error.strerror}") from None
        self.bytes = np.frombuffer(self.mmap, dtype=np.uint8)
        self.size = len(self.bytes)

    def release(self, offset, nbytes):
        """Drops the pages that lie whole inside the range; they are read again when touched."""
        page = mmap.PAGESIZE
        start = -(-offset // page) * page
        length = (offset + nbytes) // page * page - start
        if length > 0 and hasattr(self.mmap, "madvise"):
            self.mmap.madvise(mmap.MADV_DONTNEED, start, length)


class Checkpoint:
    """An opened model. Subclasses fill in what is declared here; see `open_checkpoint`."""

    format: str  # "gguf" or "huggingface"
    architecture: str  # "llama", "qwen2", ...
    path: Path
    metadata: dict  # GGUF key-values, or config.json
    tensors: dict  # name -> TensorInfo
    generation: dict  # bos_token_id and eos_token_id as lists; temperature, top_k, ... where given

    _files: dict  # Path -> MappedFile

    @property
    def packed_nbytes(self):
        """Bytes that tensors of quantized types take at least, once they are packed."""
        return sum(t.nbytes for t in self.tensors.values() if t.type not in FLOAT_TYPES)

    def info(self, name):
        """The `TensorInfo` of a tensor; LoadError if there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise LoadError(self.path, f"expected a tensor named {name!r}, found none") from None

    def raw(self, name):
        """The tensor's bytes as they lie in the file: uint8 [nbytes], a view of the mapping."""
        info = self.info(name)
        return self._files[info.file].bytes[info.offset : info.offset + info.nbytes]

    def float_tensor(self, name):
        """An F32, F16 or BF16 tensor as a torch.Tensor, a view where its alignment permits."""
        import torch

        info = self.info(name)
        if info.type not in FLOAT_TYPES:
            expected = ", ".join(FLOAT_TYPES)
            raise LoadError(
                self.path, f"tensor {name!r}: expected one of {expected}, got {info.type}"
            )
        dtype = getattr(torch, FLOAT_TYPES[info.type])
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        data = torch.from_numpy(self.raw(name))
        if info.offset % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(info.shape)

    def release(self, name):
        """Gives the tensor's pages back to the system once it was packed into another form."""
        info = self.info(name)
        self._files[info.file].release(info.offset, info.nbytes)

    def tokenizer(self):
        """The model's tokenizer, built on the first call."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self):
        with paused_collector():
            return self._build_tokenizer()
