"""What this machine can do at most: ``python -m bench.limits``.

Measured by our own kernels with all of the pool's threads, so that a share of a limit is never a
share of a data sheet. Bandwidth is of reading memory that is larger than the caches; arithmetic is
on registers, a multiplication and an addition counted as two operations.
"""

import time

from pyllm import _C, memory

# what -> its name among the limits
ARITHMETIC = {"int8": "int8_gops", "float32": "float32_gflops", "bfloat16": "bfloat16_gflops"}


def read_bandwidth(repeats=3) -> float:
    """The best of `repeats` reads of 512 MB, in bytes per second."""
    # In large pages, as weights are; written to, so that they exist.
    data = memory.allocate(512 << 20).fill_(1)
    return data.numel() / min(_seconds(_C.read_memory, data)[0] for _ in range(repeats))


def peak_arithmetic(kind, repeats=5) -> float:
    """The best of `repeats`, in operations per second; 0 if there is no instruction."""
    runs = [_seconds(_C.peak_arithmetic, kind, 1_000_000) for _ in range(repeats)]
    return max(operations / seconds for seconds, operations in runs)


def measure(threads=None) -> dict:
    """All limits: ``read_gb_per_s``, ``int8_gops``, ``float32_gflops``, ``bfloat16_gflops``."""
    before = _C.num_threads()
    _C.set_num_threads(threads or before)
    try:
        found = {"read_gb_per_s": read_bandwidth() / 1e9}
        return found | {name: peak_arithmetic(kind) / 1e9 for kind, name in ARITHMETIC.items()}
    finally:
        _C.set_num_threads(before)


def _seconds(function, *arguments):
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    print(f"{_C.isa()}, {_C.num_threads()} threads")
    for name, value in measure().items():
        print(f"{name:>16} {value:8.1f}")
