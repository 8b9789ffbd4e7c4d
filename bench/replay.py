"""Repeats recorded calls of the compiled part and imports nothing else: what `instructions` runs
under valgrind, where importing torch takes minutes. ``python -I -S replay.py _C.so calls``"""

import ctypes
import importlib.machinery
import importlib.util
import marshal
import sys

ALIGNMENT = 64  # as torch's allocator
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # of what bindings allocate


class Tensor:
    """What the bindings read of a torch.Tensor."""

    is_cpu = True

    def __init__(self, dtype, shape, stride, data):
        self.dtype, self.shape, self.strides = getattr(torch, dtype), shape, stride
        self.memory = bytearray(len(data) + ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        skip = -address % ALIGNMENT
        self.used = slice(skip, skip + len(data))
        self.memory[self.used] = data
        self.address = address + skip

    def stride(self):
        return self.strides

    def data_ptr(self):
        return self.address

    def new_empty(self, *shape):
        strides, n = [], 1
        for size in reversed(shape):
            strides.insert(0, n)
            n *= size
        return Tensor(self.dtype, shape, tuple(strides), bytes(n * ITEMSIZE[self.dtype]))


def content(tensor) -> bytes:
    """The bytes of a tensor, gaps between its rows included."""
    return bytes(tensor.memory[tensor.used])


# The bindings look up torch's types, and its dtypes, and compare them by identity.
torch = type(sys)("torch")
torch.Tensor, torch.nn = Tensor, type("nn", (), {"Parameter": Tensor})
torch.empty_like = lambda x: x.new_empty(*x.shape)
torch.__getattr__ = lambda name: torch.__dict__.setdefault(name, name)


def main(library, calls):
    """Returns the arguments of the last call, and what it returned."""
    sys.modules["torch"] = torch
    loader = importlib.machinery.ExtensionFileLoader("_C", library)
    compiled = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(compiled)
    with open(calls, "rb") as file:
        recorded = marshal.load(file)
    for name, arguments in recorded:
        arguments = [Tensor(*a) if type(a) is tuple else a for a in arguments]
        returned = getattr(compiled, name)(*arguments)
    return *arguments, *(returned if type(returned) is tuple else (returned,))


if __name__ == "__main__":
    main(*sys.argv[1:])
