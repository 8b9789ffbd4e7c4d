"""What this machine can do at most: ``pyllm bench limits``.

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


def measure_cuda() -> dict:
    """Those of the current CUDA device: of copying memory, and of PyTorch's largest matmuls."""
    import torch

    x, y = (torch.empty(1 << 28, device="cuda").normal_() for _ in range(2))
    found = {"read_gb_per_s": 2 * x.nbytes / _cuda_seconds(lambda: y.copy_(x)) / 1e9}
    n = 8192
    for name, dtype in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_gflops"] = 2 * n**3 / _cuda_seconds(lambda a=a, b=b: a @ b) / 1e9
    q, r = (torch.randint(-127, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    found["int8_gops"] = 2 * n**3 / _cuda_seconds(lambda: torch._int_mm(q, r.t())) / 1e9
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    found["float32_gflops"] = 2 * n**3 / _cuda_seconds(lambda: a @ b, 3) / 1e9
    return found


def _cuda_seconds(run, repeats=10) -> float:
    """The best of `repeats`."""
    import torch

    best = float("inf")
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


def _seconds(function, *arguments):
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result
