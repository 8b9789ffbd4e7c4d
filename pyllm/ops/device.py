"""What runs on a device: libraries with the CUDA kernels, one for the device and one for the
emulator of it on the CPU, and the Triton kernels."""

import functools
import importlib
import importlib.util
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from pyllm import _C

_FILES = {"cuda": "libpyllm_cuda.so", "emulator": "libpyllm_cuda_emulated.so"}


def path(backend: str) -> Path:
    """Where the library of `backend` is, if this build has it."""
    return Path(_C.__file__).with_name(_FILES[backend])


def missing(backend: str, device_type: str) -> str | None:
    """What `backend` lacks to serve tensors on `device_type`, or None."""
    if backend == "triton":
        return _missing_for_triton(device_type)
    if backend not in _FILES or path(backend).exists():
        return None
    return f"this build has no {backend} kernels: there is no {path(backend)}"


_installed = functools.cache(importlib.util.find_spec)


def _missing_for_triton(device_type):
    if _installed("triton") is None:
        return "Triton is not installed: pip install triton (on Linux)"
    # Only on the CPU does the answer need Triton, which takes a moment to import.
    return triton_kernels("launch").why_not_on_cpu() if device_type == "cpu" else None


@functools.cache
def triton_kernels(stem: str):
    """The module of the Triton kernels of an op, imported on first use."""
    return importlib.import_module(f"pyllm.kernels.{stem}")


@functools.cache
def library(backend: str):
    """The table of launchers of `backend`, ``"cuda"`` or ``"emulator"``, loaded on first use."""
    kernels = _C.DeviceLibrary(str(path(backend)), emulated=backend == "emulator")
    if backend == "emulator":
        kernels.configure(int(os.environ.get("PYLLM_EMULATOR_SEED", "1")), os.cpu_count())
    return kernels


_local = threading.local()


@contextmanager
def own_graph():
    """Within the block, a graph that is captured will be replayed on this same stream only."""
    _local.own_graph = True
    try:
        yield
    finally:
        _local.own_graph = False


def in_foreign_graph() -> bool:
    """Whether a graph is being captured that may be replayed on any stream: beside itself, too."""
    if getattr(_local, "own_graph", False):
        return False
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def stream(x: torch.Tensor) -> int:
    """The stream that PyTorch would launch on now; 0 for tensors on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def guarded(x: torch.Tensor, function):
    """`function`, called with the device of `x` as the current one: kernels are launched there."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return function

    def call(*args, **kwargs):
        with torch.cuda.device(x.device):
            return function(*args, **kwargs)

    return call


def check_same(op: str, first: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless the tensors are on the device of `first`."""
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{op}: {name}: expected it on {first.device}, got {x.device}")


@functools.cache
def arch(device: torch.device) -> int:
    """The compute capability of a CUDA device: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; the emulator pretends to an odd few."""
    if device.type == "cpu":
        return 7
    return torch.cuda.get_device_properties(device).multi_processor_count


def emulator_report() -> list[dict]:
    """What the launches on the emulator since the last call did: bytes, requests, instructions."""
    return json.loads(library("emulator").report())
