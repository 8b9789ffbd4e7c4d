"""What a call costs beside its kernel: ``pyllm bench overhead``.

Every op is called on one row, whose kernel takes next to nothing. That next to nothing, timed by
replaying a plan of the same launches on one thread, is subtracted; what is left is Python, the
allocation of the result, the binding and the launch. PyTorch's call of the same, whole, takes turns
with ours.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from pyllm import _C, ops
from pyllm.quant import QuantTensor
from pyllm.runtime.graph import Arena, capture

from . import timing

LIMIT_US = 4.0  # what we hold ourselves to
REPEATS = 200


def cases(width=64) -> dict[str, tuple]:
    """``(ours, PyTorch's)`` of each op on one row of `width` values."""
    x, y, weight, bias = torch.randn(4, 1, width).unbind()
    weight, bias, matrix = weight[0], bias[0], torch.randn(width, width)
    quantized = QuantTensor.from_float(matrix)
    q, shape = torch.randn(1, 1, 1, width), (width,)
    return {
        "rms_norm": (lambda: ops.rms_norm(x, weight), lambda: F.rms_norm(x, shape, weight)),
        "rms_norm, residual": (
            lambda: ops.rms_norm(x, weight, residual=y),
            lambda: F.rms_norm(x + y, shape, weight),
        ),
        "layer_norm": (
            lambda: ops.layer_norm(x, weight, bias),
            lambda: F.layer_norm(x, shape, weight, bias),
        ),
        "layer_norm, residual": (
            lambda: ops.layer_norm(x, weight, bias, residual=y),
            lambda: F.layer_norm(x + y, shape, weight, bias),
        ),
        "silu_mul": (lambda: ops.silu_mul(x, y), lambda: F.silu(x) * y),
        "gelu": (lambda: ops.gelu(x), lambda: F.gelu(x)),
        "matmul": (lambda: ops.matmul(x, matrix), lambda: F.linear(x, matrix)),
        "quant_matmul": (lambda: ops.quant_matmul(x, quantized), lambda: F.linear(x, matrix)),
        "flash_attention": (
            lambda: ops.flash_attention(q, q, q),
            lambda: F.scaled_dot_product_attention(q, q, q),
        ),
    }


def measure(threads=None, rounds=15, progress=lambda text: None) -> dict:
    """Microseconds of each op's call, of its kernel, and of what is beside it."""
    before = _C.num_threads()
    rows = []
    with torch.inference_mode():
        for name, (ours, torchs) in cases().items():
            progress(name)
            _C.set_num_threads(1)
            kernel = _kernel_seconds(ours, rounds)
            _C.set_num_threads(threads or before)
            contenders = {"pyllm": [ours], "torch": [torchs]}
            times = timing.measure(contenders, device="cpu", rounds=rounds)
            call = times["pyllm"].summary()
            us = {"call": call["seconds"], "low": call["low"], "high": call["high"]}
            us |= {"kernel": kernel, "overhead": call["seconds"] - kernel}
            us["torch"] = times["torch"].summary()["seconds"]
            ratio = timing.ratio(times["pyllm"], times["torch"])
            rows.append({"op": name, **{f"{k}_us": 1e6 * v for k, v in us.items()}, **ratio})
    _C.set_num_threads(before)
    return {"rows": rows, "rounds": rounds, "limit_us": LIMIT_US}


def _kernel_seconds(call, rounds):
    """Of one of `REPEATS` such calls, replayed."""
    graph = capture(lambda: [call() for _ in range(REPEATS)], Arena())
    graph.replay()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        graph.replay()
        seconds.append((time.perf_counter() - begin) / REPEATS)
    return statistics.median(seconds)


HEAD = ("op on one row", "call, µs", "10 to 90 %", "kernel", "beside it", "PyTorch's call", "ratio")


def cells(data) -> list[tuple[str, ...]]:
    """The table's rows, as text."""
    return [
        (
            r["op"], f"{r['call_us']:.2f}", f"{r['low_us']:.2f} to {r['high_us']:.2f}",
            f"{r['kernel_us']:.2f}", f"{r['overhead_us']:.2f}", f"{r['torch_us']:.2f}",
            f"{r['ratio']:.2f}" if r["meaningful"] else "noisy",
        )
        for r in data["rows"]
    ]  # fmt: skip
