"""How the kernels are launched: on which processor, and with which configuration.

A configuration (tile sizes, warps) is, in this order: what was measured for the device and is kept
in JSON, in the user's cache or shipped in ``tuned/`` beside this file; else what the table beside
the kernel says for the arch and the shape. Nothing is measured unless ``PYLLM_AUTOTUNE=1``: then
the first call of each shape tries a few, and the user's cache keeps the fastest.
"""

import functools
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

# Whether Triton's interpreter runs the kernels: it was so decided when triton was imported.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)

_compiling = None  # the target and the launches of `compile_only`


@dataclass
class Launch:
    """A launch that `compile_only` kept instead of running it."""

    kernel: triton.JITFunction
    arguments: tuple
    options: dict


def why_not_on_cpu() -> str | None:
    """Why kernels cannot be launched on tensors on the CPU, or None if they can."""
    if INTERPRETED or _compiling:
        return None
    return (
        "on tensors on the CPU it runs only in Triton's interpreter: "
        "set TRITON_INTERPRET=1 before triton is imported"
    )


@contextmanager
def compile_only(target: GPUTarget):
    """Within the block nothing runs: gives the list of launches as they would be on `target`."""
    global _compiling
    _compiling = target, []
    try:
        yield _compiling[1]
    finally:
        _compiling = None


def target_of(device: torch.device) -> GPUTarget:
    """What kernels on `device` are compiled for: ``backend``, ``arch`` and ``warp_size``."""
    if _compiling:
        return _compiling[0]
    return GPUTarget("cuda", 90, 32) if INTERPRETED else _target_of(device.index)


@functools.cache
def _target_of(index):
    with torch.cuda.device(index):
        return triton.runtime.driver.active.get_current_target()


def precision(dtype: torch.dtype, target: GPUTarget) -> str:
    """How `tl.dot` multiplies: float32 as three products in tf32 where no unit takes float32."""
    return "tf32x3" if dtype == torch.float32 and target.backend == "cuda" else "ieee"


def knows_e4m3(target: GPUTarget) -> bool:
    """Whether kernels can use float8_e4m3fn; else they take its bits."""
    return not INTERPRETED and target.backend == "cuda" and target.arch >= 89


def launch(kernel, grid: tuple, *arguments, **options):
    """``kernel[grid](*arguments, **options)`` on the device of the first argument.

    Products and sums are fused where the compiler sees fit, unless ``enable_fp_fusion=False``."""
    options.setdefault("enable_fp_fusion", True)  # releases differ in what they take for granted
    if _compiling:
        _compiling[1].append(Launch(kernel, arguments, options))
        return
    device = arguments[0].device
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


def row_strides(x):
    """Of tokens and heads of ``[T, H, D]`` or ``[T, D]``; without a tensor nothing reads them."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1) if x.ndim == 3 else 0)


def configuration(op: str, case: str, device: torch.device, default: dict, candidates=(), run=None):
    """The configuration for `case`, a description of dtypes and shapes.

    Args:
        default: what to use where nothing was measured.
        candidates: others worth a try.
        run: called with each configuration as keywords, any number of times, when measuring.
    """
    if INTERPRETED or _compiling:
        return default
    measured = _measured(device.index)
    found = measured.get(op, {}).get(case)
    if found is not None:
        return found
    if os.environ.get("PYLLM_AUTOTUNE") != "1" or torch.cuda.is_current_stream_capturing():
        return default
    choices = [default, *(c for c in candidates if c != default)]
    times = [triton.testing.do_bench(lambda c=c: run(**c)) for c in choices]
    measured.setdefault(op, {})[case] = choices[times.index(min(times))]
    path = _cached_file(device.index)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)
    return measured[op][case]


def _name(index):
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(index)) + ".json"


def _cached_file(index):
    cache = os.environ.get("PYLLM_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pyllm"
    )
    return Path(cache, "tuned", _name(index))


@functools.cache
def _measured(index):
    """op: case: configuration; the user's own go before the shipped ones."""
    merged = {}
    for path in (Path(__file__).parent / "tuned" / _name(index), _cached_file(index)):
        if path.exists():
            for op, cases in json.loads(path.read_text()).items():
                merged.setdefault(op, {}).update(cases)
    return merged
