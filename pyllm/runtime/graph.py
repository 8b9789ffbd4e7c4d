"""Capture a step once, replay it for every token.

While capturing, pyllm's ops record their launches into a plan instead of running them, and take
their outputs from an arena that the plan keeps. A replay is one call with no Python in it, and runs
exactly the kernels of the eager step on exactly the same arguments; what changes from step to step
is read from the buffers that the step was captured with.
"""

import weakref
from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from pyllm import _C
from pyllm.ops import alloc


class CaptureError(RuntimeError):
    """A step did something that cannot be recorded."""


class _Loan(weakref.ref):
    """Says when the array that was lent is gone. Its callback is a builtin on purpose: Ctrl-C that
    arrives while a callback runs Python code would be swallowed with the callback's errors."""

    __slots__ = ("block",)


class Arena:
    """Memory for the tensors of captured steps, and of eager ones, which spares them page faults.

    A tensor's block is free again when its storage dies; later launches of the same plan may then
    reuse it, since a plan runs in order. Plans of one arena must not run at the same time, and what
    one returned is valid until the next one runs.
    """

    _ALIGN = 64

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lent: dict[int, _Loan] = {}  # by id: what refers to an array has no hash
        self._returned: list[_Loan] = []
        self.nbytes = 0

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous tensor."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = max(1, -(-nbytes // 1024)) * 1024
        while self._returned:
            loan = self._returned.pop()
            del self._lent[id(loan)]
            self._free[loan.block.size].append(loan.block)
        block = self._free[size].pop() if self._free[size] else self._new_block(size)
        # The storage owns this array object; when it dies, so does the array.
        array = block[:nbytes]
        loan = _Loan(array, self._returned.append)
        loan.block = block
        self._lent[id(loan)] = loan
        return torch.from_numpy(array).view(dtype).view(shape)

    def _new_block(self, size: int) -> np.ndarray:
        self.nbytes += size
        memory = np.empty(size + self._ALIGN, dtype=np.uint8)
        start = -memory.ctypes.data % self._ALIGN
        return memory[start : start + size]


# What may be called while capturing: questions about a tensor, and what may return a view of it.
_QUESTIONS = {"__get__", "data_ptr", "stride", "size", "dim", "numel", "element_size"}
_VIEWS = {
    "__getitem__", "chunk", "expand", "flatten", "from_numpy", "narrow", "permute", "reshape",
    "select", "split", "squeeze", "t", "transpose", "unflatten", "unsqueeze", "view",
}  # fmt: skip


class _OnlyViews(TorchFunctionMode):
    """Refuses every torch function that computes: it would run now and not in the replay."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name not in _QUESTIONS | _VIEWS:
            self._refuse(name)
        result = function(*args, **(kwargs or {}))
        if name in _VIEWS and name != "from_numpy":
            source = args[0].untyped_storage().data_ptr()
            for part in result if isinstance(result, (tuple, list)) else [result]:
                if part.numel() and part.untyped_storage().data_ptr() != source:
                    self._refuse(f"{name}, which had to copy,")
        return result

    def _refuse(self, what):
        raise CaptureError(
            f"{what} cannot be recorded in a plan: expected only pyllm's ops and views of their "
            "outputs while capturing"
        )


class Graph:
    """One captured step: `outputs` is what the step returned, rewritten by every `replay`."""

    def __init__(self, step, arena: Arena, check: bool):
        self.plan = _C.Plan()
        self._arena = arena  # its free blocks are in the plan too
        self.plan.begin()
        try:
            with alloc.use(arena), _OnlyViews() if check else nullcontext():
                self.outputs = step()
        finally:
            self.plan.end()

    def replay(self):
        """Runs the step on what its input buffers hold now."""
        self.plan.replay()
        return self.outputs


def capture(step, arena: Arena, *, check=True) -> Graph:
    """Captures ``step()``, which is not run.

    Args:
        check: False saves time where the same code was captured before.

    Raises:
        CaptureError: if the step does something that cannot be recorded.
    """
    return Graph(step, arena, check)
