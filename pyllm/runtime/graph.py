"""Capture a step once, replay it for every token.

On the processor, pyllm's ops record their launches into a plan while capturing, instead of running
them, and take their outputs from an arena that the plan keeps. On a GPU a CUDA graph does the same.
A replay is one call with no Python in it, and runs exactly the kernels of the eager step on exactly
the same arguments; what changes from step to step is read from the buffers that the step was
captured with.
"""

import weakref
from bisect import bisect
from contextlib import nullcontext, suppress

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

    __slots__ = ("begin", "end")


class Arena:
    """Memory for the tensors of captured steps, and of eager ones, which spares them page faults.

    A tensor's bytes are free again when its storage dies; later launches of the same plan may then
    reuse them, since a plan runs in order. Plans of one arena must not run at the same time, and
    what one returned is valid until the next one runs.

    A tensor takes the first gap that it fits into, so that steps of all sizes share the same bytes.
    Regions are large, and only what was ever used of them takes up memory.

    Attributes:
        nbytes: how much of the regions was ever used.
    """

    _ALIGN = 64
    _REGION = 64 << 20

    def __init__(self):
        self._regions: list[tuple[int, np.ndarray]] = []  # (address, bytes), by address
        self._used: dict[int, int] = {}  # address of a region -> bytes of it ever used
        self._free: list[tuple[int, int]] = []  # addresses (begin, end) of gaps, in order
        self._lent: dict[int, _Loan] = {}  # by id: what refers to an array has no hash
        self._returned: list[_Loan] = []

    @property
    def nbytes(self) -> int:
        return sum(self._used.values())

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous tensor."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = max(1, -(-nbytes // self._ALIGN)) * self._ALIGN
        while self._returned:
            loan = self._returned.pop()
            del self._lent[id(loan)]
            self._give_back(loan.begin, loan.end)
        begin = self._take(size)
        region, memory = self._regions[bisect(self._regions, begin, key=lambda r: r[0]) - 1]
        self._used[region] = max(self._used[region], begin + size - region)
        # The storage owns this array object; when it dies, so does the array.
        array = memory[begin - region : begin - region + nbytes]
        loan = _Loan(array, self._returned.append)
        loan.begin, loan.end = begin, begin + size
        self._lent[id(loan)] = loan
        return torch.from_numpy(array).view(dtype).view(shape)

    def _take(self, size):
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        # Twice the alignment more: no two regions touch, so that no gap reaches across them.
        length = max(size, self._REGION)
        memory = np.empty(length + 2 * self._ALIGN, dtype=np.uint8)
        address = memory.ctypes.data
        memory = memory[-address % self._ALIGN :]
        address += -address % self._ALIGN
        self._regions.append((address, memory))
        self._regions.sort(key=lambda r: r[0])
        self._used[address] = 0
        self._give_back(address, address + length)
        return self._take(size)

    def _give_back(self, begin, end):
        i = bisect(self._free, (begin,))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == begin:
            i -= 1
            begin = self._free.pop(i)[0]
        self._free.insert(i, (begin, end))


# What may be called while capturing: questions about a tensor, and what may return a view of it.
_QUESTIONS = {
    "__get__", "data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "stride",
}  # fmt: skip
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
        self._arena = arena  # its free bytes are in the plan too
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


class CudaGraph:
    """One captured step of a GPU; `outputs` as of a `Graph`.

    A graph bakes in sizes and addresses. All graphs share the memory of `pool`: what one returned
    is valid until another one runs.

    Args:
        step: runs on the current stream, which is not the default one.
        pool: from ``torch.cuda.graph_pool_handle()``.
    """

    def __init__(self, step, pool):
        # Once for real first: kernels are loaded, weights packed and scratch is made on first use.
        step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may go on allocating memory.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self.outputs = step()
        except BaseException:
            with suppress(RuntimeError):  # what went wrong may have ended it
                self._graph.capture_end()
            raise
        self._graph.capture_end()

    def replay(self):
        """Begins to run the step on what its input buffers hold by then."""
        self._graph.replay()
        return self.outputs


def capture(step, arena: Arena, *, check=True) -> Graph:
    """Captures ``step()``, which is not run.

    Args:
        check: False saves time where the same code was captured before.

    Raises:
        CaptureError: if the step does something that cannot be recorded.
    """
    return Graph(step, arena, check)
