"""``python -m bench --emulate OP``: the memory traffic of the CUDA kernels, with no GPU.

The emulator counts the sectors of 32 bytes that each buffer's requests move between L2 and the
multiprocessors, wavefronts of shared memory, and instructions. The numbers do not depend on the
machine, so they are a contract: ``traffic.json`` keeps them, ``tests/test_traffic.py`` compares.
"""

import json
from collections import Counter
from pathlib import Path

import torch

from pyllm import ops
from pyllm.ops import device
from pyllm.quant import QuantRows, QuantTensor

TABLE = Path(__file__).with_name("traffic.json")


def _norm(op, rows, width, dtype=torch.float16, residual=False, **options):
    x = torch.randn(rows, width).to(dtype)
    added = torch.randn(rows, width).to(dtype) if residual else None
    weight = torch.ones(width, dtype=dtype)
    getattr(ops, op)(x, weight, residual=added, backend="emulator", **options)


def _norm_backward(op, rows, width, dtype=torch.float16):
    x, dy = (torch.randn(rows, width).to(dtype) for _ in range(2))
    getattr(ops, op)(dy, x, torch.ones(width, dtype=dtype), backend="emulator")


def _norm_cases(op):
    return {
        "fp16 8 x 4096": lambda: _norm(op, 8, 4096),
        "fp16 8 x 4096 residual": lambda: _norm(op, 8, 4096, residual=True),
        "fp16 8 x 4096 to int8": lambda: _norm(op, 8, 4096, quantize=torch.int8),
        "fp32 3 x 1024": lambda: _norm(op, 3, 1024, torch.float32),
        "fp16 64 x 64": lambda: _norm(op, 64, 64),
        "fp32 1 x 65536": lambda: _norm(op, 1, 65536, torch.float32),
        "fp16 2 x 4097": lambda: _norm(op, 2, 4097),
    }


def _norm_backward_cases(op):
    return {
        "fp16 2048 x 96": lambda: _norm_backward(op, 2048, 96),
        "fp16 300 x 2048": lambda: _norm_backward(op, 300, 2048),
        "fp16 40 x 16384": lambda: _norm_backward(op, 40, 16384),
    }


def _quant_matmul(rows, n=1024, k=2048, **format):
    weight = QuantTensor.from_float(torch.randn(n, k), **format)
    x = torch.randn(rows, k).half()
    ops.quant_matmul(x, ops.pack_fragments(weight, backend="cpu"), backend="emulator")


def _quant_rows_matmul(rows, n=1024, k=2048):
    x, weight = (QuantRows.from_float(torch.randn(m, k), torch.int8) for m in (rows, n))
    ops.quant_matmul(x, weight, backend="emulator")


# Op: case: what runs it. Sizes are small, as the emulator is slow, but large enough to be typical.
CASES = {
    "layer_norm": _norm_cases("layer_norm"),
    "layer_norm_backward": _norm_backward_cases("layer_norm_backward"),
    "quant_matmul": {
        "4 bits, 1 x 896 x 2048": lambda: _quant_matmul(1, 896),
        "4 bits in 128, 1 x 1024 x 2048": lambda: _quant_matmul(1, group_size=128),
        "4 bits in 128, 16 x 1024 x 2048": lambda: _quant_matmul(16, group_size=128),
        "4 bits in 128, 128 x 512 x 1024": lambda: _quant_matmul(128, 512, 1024, group_size=128),
        "8 bits, 1 x 896 x 2048": lambda: _quant_matmul(1, 896, bits=8, symmetric=True),
        "8 bits in rows, 1 x 1024 x 2048": lambda: _quant_matmul(
            1, bits=8, symmetric=True, group_size=None
        ),
        "int8 by int8, 1 x 1024 x 2048": lambda: _quant_rows_matmul(1),
        "int8 by int8, 16 x 1024 x 2048": lambda: _quant_rows_matmul(16),
        "int8 by int8, 128 x 896 x 1024": lambda: _quant_rows_matmul(128, 896, 1024),
        "int8 by int8, 256 x 1792 x 256": lambda: _quant_rows_matmul(256, 1792, 256),
    },
    "rms_norm": _norm_cases("rms_norm"),
    "rms_norm_backward": _norm_backward_cases("rms_norm_backward"),
}


def measure(op: str) -> dict:
    """What each case of `op` moves: by case, the sum over its launches.

    For each buffer ``minimum``, the bytes of all sectors that were touched at all, and ``moved``,
    32 times the sectors that requests moved; reads and writes together. ``shared`` has wavefronts
    and how few would do; ``instructions`` those that a warp executes as one.
    """
    return {case: measure_case(run) for case, run in CASES[op].items()}


def measure_case(run) -> dict:
    """The same of one case."""
    device.emulator_report()  # forget what was before
    run()
    buffers, shared, instructions = {}, Counter(), Counter()
    for launch in device.emulator_report():
        for name, b in launch["buffers"].items():
            total = buffers.setdefault(name, {"minimum": 0, "moved": 0})
            total["minimum"] += b["distinct_read"] + b["distinct_written"]
            total["moved"] += 32 * (b["read_sectors"] + b["written_sectors"])
        instructions.update(launch["instructions"])
        for site in launch["sites"]:
            if site["space"] == "shared":
                shared.update(wavefronts=site["transactions"], ideal=site["ideal"])
            else:
                instructions["global " + ("stores" if site["write"] else "loads")] += site[
                    "requests"
                ]
    return {
        "buffers": buffers,
        "shared": dict(shared),
        "instructions": dict(sorted(instructions.items())),
    }


def table(op: str, cases: dict):
    """The traffic of one op as a table for the terminal."""
    from rich.table import Table

    t = Table(title=f"{op}: bytes between L2 and the multiprocessors", title_justify="left")
    for name in ("case", "buffer", "minimum", "moved", "x"):
        t.add_column(name, justify="left" if name in ("case", "buffer") else "right")
    for case, counted in cases.items():
        rows = [(name, b["minimum"], b["moved"]) for name, b in counted["buffers"].items()]
        rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
        for i, (name, minimum, moved) in enumerate(rows):
            ratio = f"{moved / minimum:.2f}" if minimum else "-"
            t.add_row("" if i else case, name, f"{minimum:,}", f"{moved:,}", ratio)
        shared = counted["shared"]
        if shared:
            ratio = f"{shared['wavefronts'] / shared['ideal']:.2f}"
            t.add_row(
                "", "shared, wavefronts", f"{shared['ideal']:,}", f"{shared['wavefronts']:,}", ratio
            )
        counts = ", ".join(f"{name} {n:,}" for name, n in counted["instructions"].items())
        t.add_row("", f"[dim]{counts}[/dim]", end_section=True)
    return t


def write(cases: dict) -> Path:
    """Commits the numbers of all ops as what the tests hold the kernels to."""
    TABLE.write_text(json.dumps(cases, indent=1) + "\n")
    return TABLE
