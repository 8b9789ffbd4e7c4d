"""What this machine can do at most: ``python -m bench.limits``.

Measured by our own kernels with all of the pool's threads, so that a share of a limit is never a
share of a data sheet. Bandwidth is of reading memory that is larger than the caches; arithmetic is
on registers, a multiplication and an addition counted as two operations.
"""

import time

from pyllm import _C
from pyllm.quant import memory

ARITHMETIC = ("int8", "float32", "bfloat16")
_buffer = None


def read_bandwidth(repeats=3) -> float:
    """The best of `repeats` reads of 512 MB, in bytes per second."""
    global _buffer
    if _buffer is None:  # in large pages, as weights are; touched, so that they exist
        _buffer = memory.allocate(512 << 20).fill_(1)
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        _C.read_memory(_buffer)
        best = max(best, _buffer.numel() / (time.perf_counter() - begin))
    return best


def peak_arithmetic(kind, repeats=5) -> float:
    """The best of `repeats`, in operations per second; 0 if there is no instruction."""
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        operations = _C.peak_arithmetic(kind, 1_000_000)
        best = max(best, operations / (time.perf_counter() - begin))
    return best


def measure() -> dict:
    """All limits: bytes per second read, and operations per second by kind of number."""
    return {"read": read_bandwidth(), **{kind: peak_arithmetic(kind) for kind in ARITHMETIC}}


if __name__ == "__main__":
    limits = measure()
    print(f"{_C.isa()}, {_C.num_threads()} threads")
    print(f"{'read':>9} {limits['read'] / 1e9:8.1f} GB/s")
    for kind in ARITHMETIC:
        print(f"{kind:>9} {limits[kind] / 1e9:8.1f} GOP/s")
