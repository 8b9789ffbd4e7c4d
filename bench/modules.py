"""Modules of `pyllm.nn` beside those of torch that they replace: ``pyllm bench modules``.

Called as a model calls them, Python and all, at sizes from one row to a prompt. With a residual,
torch adds first.
"""

import torch
from torch import nn

import pyllm.nn
from pyllm import _C

from . import timing

SIZES = [(1, 64), (1, 576), (3, 17), (33, 576), (7, 4096), (300, 96), (2048, 768)]  # rows, width
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORMS = ("LayerNorm", "RMSNorm")


def calls(name, rows, width, dtype, residual):
    """``(ours, torch's)`` with the same parameters and input."""
    theirs = getattr(nn, name)(width, eps=1e-5, dtype=dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = getattr(pyllm.nn, name)(width, eps=1e-5, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(2, rows, width, dtype=dtype).unbind()
    if residual:
        return lambda: ours(x, residual=y), lambda: theirs(x + y)
    return lambda: ours(x), lambda: theirs(x)


@torch.inference_mode()
def measure(threads, rounds=15, progress=lambda text: None) -> dict:
    """Microseconds of each module, size and dtype, and how many times as long torch takes."""
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(threads)
    _C.set_num_threads(threads)
    torch.manual_seed(0)
    data = []
    try:
        for name in NORMS:
            for residual in (False, True):
                what = f"{name}, residual" if residual else name
                for rows, width in SIZES:
                    progress(f"{what} {rows} x {width}")
                    for dtype in DTYPES:
                        ours, theirs = calls(name, rows, width, DTYPES[dtype], residual)
                        contenders = {"pyllm": [ours], "torch": [theirs]}
                        times = timing.measure(contenders, device="cpu", rounds=rounds)
                        us = {n: 1e6 * t.summary()["seconds"] for n, t in times.items()}
                        ratio = timing.ratio(times["pyllm"], times["torch"])
                        case = {"module": what, "size": [rows, width], "dtype": dtype}
                        data.append(case | {"us": us["pyllm"], "torch_us": us["torch"], **ratio})
    finally:
        torch.set_num_threads(before[0])
        _C.set_num_threads(before[1])
    return {"rows": data, "rounds": rounds, "threads": threads}


HEAD = ("module", "rows x width", "dtype", "µs", "torch takes, µs", "ratio")


def cells(data) -> list[tuple[str, ...]]:
    """The table's rows, as text."""
    return [
        (
            r["module"], " x ".join(map(str, r["size"])), r["dtype"], f"{r['us']:.1f}",
            f"{r['torch_us']:.1f}", f"{r['ratio']:.2f}" if r["meaningful"] else "noisy",
        )
        for r in data["rows"]
    ]  # fmt: skip
