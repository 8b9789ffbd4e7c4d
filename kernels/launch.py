"""How the kernels are launched: on which processor, or into the compiler."""

import functools
import importlib.metadata
from contextlib import contextmanager
from dataclasses import dataclass

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
    if _compiling:
        return None
    if INTERPRETED:
        return _why_no_interpreter()
    return (
        "on tensors on the CPU it runs only in Triton's interpreter: "
        "set TRITON_INTERPRET=1 before triton is imported"
    )


def _why_no_interpreter():
    # It makes integers of arrays of one element, which numpy refuses from 2.4 on.
    numpy = importlib.metadata.version("numpy")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"Triton 3.6's interpreter needs numpy below 2.4, this is {numpy}"
    return None


@contextmanager
def compile_only(target: GPUTarget):
    """Within the block nothing runs: gives the list of launches as they would be on `target`."""
    global _compiling
    _compiling = target, []
    try:
        yield _compiling[1]
    finally:
        _compiling = None


def compiling() -> bool:
    """Whether within a block of `compile_only`."""
    return _compiling is not None


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
