"""Which backend serves a call.

The choice, in this order: the ``backend=`` argument, a `use` block, ``PYLLM_BACKEND``, then
`RULES`. Several may be named, ``"emulator,triton,reference"``: the first that has the op serves. If
none of those that were asked for can serve, `BackendError` is raised; nothing falls back silently.
"""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyllm._C import DISPATCHED, PLAIN, needs_dispatcher, route, use_backend
from pyllm.ops import device

BACKENDS = ("reference", "cpu", "cuda", "triton", "emulator")


@dataclass(frozen=True)
class Rule:
    """A line of `RULES`; the first that fits a call counts.

    Attributes:
        ops: their names, or ``"*"`` for all.
        device: type of the tensors' device.
        backends: tried in this order; the first that has the op serves.
        why: ``"predicted"`` and from what, or the file with the measurement.
        dtypes: of the first tensor; None for any.
        archs: from which compute capability up to which, ``(80, 90)``; None for any.
    """

    ops: str
    device: str
    backends: tuple[str, ...]
    why: str
    dtypes: tuple[torch.dtype, ...] | None = None
    archs: tuple[int, int] | None = None

    def fits(self, x: torch.Tensor) -> bool:
        """Whether a call whose first tensor is `x` is one of those that the rule is about."""
        if self.dtypes is not None and x.dtype not in self.dtypes:
            return False
        return self.archs is None or self.archs[0] <= device.arch(x.device) <= self.archs[1]


# No rule may look at the number of rows: the bits of a token would then hang on what else is in the
# batch, and on how a prompt is cut. Our kernels keep to that. `matmul` has none for a GPU: of a
# model with plain weights cuBLAS multiplies there, which may take another algorithm, hence another
# order of sums, for another number of rows.
_NOT_HALVES = (torch.float32, torch.float8_e4m3fn)
RULES = (
    Rule("*", "cpu", ("cpu", "reference"), "bench/results"),
    Rule("flash_attention paged_attention quant_matmul", "cuda", ("triton", "reference"),
         "the CUDA kernels take halves, and int8", dtypes=_NOT_HALVES),
    Rule("flash_attention", "cuda", ("triton", "cuda", "reference"),
         "predicted: wgmma and tcgen05, where mma.sync has 60 % of the peak", archs=(90, 109)),
    Rule("*", "cuda", ("cuda", "triton", "reference"),
         "predicted: the C++ kernels were written for few bytes and launches"),
)  # fmt: skip
# Which devices a backend can read tensors of.
DEVICES = {
    "reference": None,  # any
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu"),  # on the CPU in its interpreter
    "emulator": ("cpu",),
}


class _Local(threading.local):
    backend = None


_local = _Local()
# os.environ.get takes as long as a small kernel.
_ENVIRONMENT, _VARIABLE = os.environ._data, os.environ.encodekey("PYLLM_BACKEND")


@contextmanager
def use(backend: str | None):
    """Within the block, this thread's calls go to `backend` unless they name one themselves."""
    before = _local.backend
    try:
        _set(backend)
        yield
    finally:
        _set(before)


def _set(backend):
    _local.backend = backend
    use_backend(backend is not None)  # for `route`


def default_backend() -> str | None:
    """The backend of calls that name none, or None where `RULES` decide."""
    return _local.backend or (os.environ["PYLLM_BACKEND"] if _VARIABLE in _ENVIRONMENT else None)


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call; the message says why."""


def check_names(backends: str | None) -> None:
    """Raises ValueError unless all of ``"name,name"`` are backends."""
    for name in backends.split(",") if backends else []:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")


class Op:
    """The implementations of one op, by backend. All take the same arguments."""

    def __init__(self, name: str):
        self.name = name
        self.backends: dict[str, Callable] = {}
        self._on_cpu: Callable | None = None
        OPS[name] = self

    def register(self, backend: str):
        """Decorator that adds the implementation of `backend`."""

        def add(function):
            self.backends[backend] = function
            self._on_cpu = None
            return function

        return add

    def refusal(self, backend: str, device_type: str) -> str | None:
        """Why `backend` cannot serve tensors on `device_type`, or None if it can."""
        if backend not in BACKENDS:
            return f"no such backend; expected one of {', '.join(BACKENDS)}"
        devices = DEVICES[backend]
        if devices is not None and device_type not in devices:
            return f"it reads tensors on {' or '.join(devices)}, these are on {device_type}"
        if backend not in self.backends:
            return f"this build has no {backend} kernel of it"
        return device.missing(backend, device_type)

    def choose(self, device_type: str, backend: str | None = None, x=None) -> str:
        """The name of the backend that serves, see the module's docstring.

        Args:
            x: the first tensor of the call; without it, rules about some tensors do not count.
        """
        asked = backend or default_backend()
        if asked:
            for name in asked.split(","):
                why = self.refusal(name, device_type)
                if why is None:
                    return name
            raise BackendError(f"{self.name}: backend {asked!r} was asked for, but {why}")
        for rule in _rules(self.name, device_type):
            if rule.dtypes is rule.archs is None or (x is not None and rule.fits(x)):
                for name in rule.backends:
                    if self.refusal(name, device_type) is None:
                        return name
        if "reference" in self.backends:
            return "reference"
        raise BackendError(f"{self.name}: no backend serves tensors on {device_type}")

    def implementation(self, x: torch.Tensor, backend: str | None = None) -> Callable:
        """The function that serves a call whose first tensor is `x`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_cpu:
            asked = backend or default_backend()
            if not asked:
                return self._plain()
            if asked == "cpu" and asked in self.backends:
                return self.backends[asked]
        return device.guarded(x, self.backends[self.choose(x.device.type, backend, x)])

    def serve(self, library_call: Callable, backend: str | None, *tensors) -> Callable:
        """What serves a call of the public function, given the arguments of an implementation.

        Args:
            library_call: the op as PyTorch's dispatcher knows it, for calls that it has a say in.
            backend: as the public function was given it.
            tensors: those of the call, the one that decides on the device first.
        """
        way = DISPATCHED if is_dynamo_compiling() else route(backend, *tensors)
        if way == PLAIN:
            return self._plain()
        if way == DISPATCHED:
            return functools.partial(library_call, backend=backend)
        return self.implementation(tensors[0], backend)

    def _plain(self):
        # Nothing but the device decides (no rule for the CPU looks at more): once for all.
        if self._on_cpu is None:
            self._on_cpu = self.backends[self.choose("cpu")]
        return self._on_cpu


def dispatches(*tensors) -> bool:
    """Whether a call must go through PyTorch's dispatcher.

    So it is if a tensor needs a gradient or is no plain one (fake, traced, a subclass), and under
    torch.compile, a function transform, a dispatch mode or autocast.
    """
    return is_dynamo_compiling() or needs_dispatcher(*tensors)


OPS: dict[str, Op] = {}


@functools.cache
def _rules(op, device_type):
    return [r for r in RULES if r.device == device_type and (r.ops == "*" or op in r.ops.split())]
