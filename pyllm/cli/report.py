"""What `pyllm info` says: the machine, or a model before it is loaded."""

import importlib.util
import os
import platform
from collections import defaultdict

import torch

import pyllm
from pyllm import _C


def machine() -> dict:
    """The processor, its instruction sets, and each backend with why it is missing if it is."""
    return {
        "pyllm": pyllm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": _C.num_threads(),
        "instruction sets": {
            name: "in use" if name == _C.isa() else "available" for name in _C.available_isas()
        },
        "backends": _backends(),
    }


def model(name: str, context: int | None, batch: int) -> dict:
    """Tensors by type, bytes of weights and cache, and the kernel of each op."""
    from pyllm.loading import open_checkpoint, resolve
    from pyllm.models import describe
    from pyllm.ops.registry import BACKENDS, OPS
    from pyllm.runtime.cache import cache_nbytes
    from pyllm.runtime.engine import PAGE_SIZE
    from pyllm.runtime.llm import default_context

    path = resolve(name)
    checkpoint = open_checkpoint(path)
    config = describe(checkpoint)
    context = default_context(config) if context is None else context
    if not 1 <= context <= config.max_context:
        raise ValueError(f"--context: expected 1 to {config.max_context}, got {context}")
    if batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {batch}")
    types = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for tensor in checkpoint.tensors.values():
        types[tensor.type]["tensors"] += 1
        types[tensor.type]["bytes"] += tensor.nbytes
    cache = batch * cache_nbytes(
        n_layers=config.n_layers, n_tokens=context, kv_heads=config.n_kv_heads,
        head_dim=config.head_dim, dtype=torch.float16, page_size=PAGE_SIZE,
    )  # fmt: skip
    return {
        "model": str(path),
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "sizes": vars(config),
        "tensors by type": dict(types),
        "weights": {"bytes": sum(t["bytes"] for t in types.values())},
        "cache": {"context": context, "batch": batch, "dtype": "float16", "bytes": cache},
        "kernels": {
            op.name: {
                "backend": op.choose("cpu"),
                "refused": {b: why for b in BACKENDS if (why := op.refusal(b, "cpu"))},
            }
            for op in OPS.values()
        },
    }


def show(data: dict) -> None:
    """Prints a report for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in data.items():
        table.add_row(key, _text(key, value))
    console.print(table)


def _text(key, value) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "bytes" in value:
        rest = ", ".join(f"{k} {v}" for k, v in value.items() if k != "bytes")
        return _bytes(value["bytes"]) + (f" ({rest})" if rest else "")
    if key == "kernels":
        return _kernels(value)
    return "\n".join(f"{k}: {_text('', v)}" for k, v in value.items())


def _kernels(kernels) -> str:
    """The ops by backend, then each reason to refuse one with the ops that it holds for."""
    lines = defaultdict(list)
    for op, kernel in kernels.items():
        lines[kernel["backend"]].append(op)
        for backend, why in kernel["refused"].items():
            lines[f"not {backend}, because {why}"].append(op)
    every = list(kernels)
    return "\n".join(f"{k}: {'all' if v == every else ', '.join(v)}" for k, v in lines.items())


def _bytes(n: int) -> str:
    return f"{n:,} bytes ({n / 1e6:,.1f} MB)"


def _backends() -> dict:
    missing = "this build has no CUDA kernels"
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "reference": "plain PyTorch, for any device",
        "cpu": f"{_C.isa()}, {_C.num_threads()} threads",
        "cuda": missing,
        "triton": "this build has no Triton kernels" if has_triton else "triton is not installed",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
