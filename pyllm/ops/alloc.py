"""Where ops take their outputs from: torch, or the arena of the plan being captured."""

import threading
from contextlib import contextmanager

import torch

from pyllm import _C
from pyllm.quant import QuantActivation


class _Local(threading.local):
    """Its `arena`, set by `use`, is something with ``empty(shape, dtype)``. Each thread has its
    own: what another one allocates while a step is captured is no part of it."""

    arena = None


_local = _Local()
_CPU = torch.device("cpu")


@contextmanager
def use(arena):
    """Within the block, ops take their outputs from `arena` (see `pyllm.runtime.graph.Arena`)."""
    before = _local.arena
    try:
        _set(arena)
        yield
    finally:
        _set(before)


def _set(arena):
    _local.arena = arena
    _C.use_arena(arena is not None)  # bindings that allocate then call `empty`


def empty(shape, dtype: torch.dtype, device=_CPU) -> torch.Tensor:
    """An uninitialized contiguous tensor."""
    arena = _local.arena
    if arena is not None:
        return arena.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialized contiguous tensor of x's shape, dtype and device."""
    arena = _local.arena
    if arena is not None:
        return arena.empty(x.shape, x.dtype)
    if x.is_contiguous():
        return torch.empty_like(x)  # without the time to parse the format
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """An uninitialized contiguous ``[..., width]`` for ``x [..., K]``, of its dtype and device."""
    *leading, _ = x.shape
    arena = _local.arena
    if arena is not None:
        return arena.empty((*leading, width), x.dtype)
    return x.new_empty(*leading, width)  # half a microsecond less than for a tuple


def empty_quantized(x: torch.Tensor, group_size: int) -> QuantActivation:
    """Room for the rows of ``x [T, K]``, quantized in groups of 16 or 32."""
    if group_size not in (16, 32) or x.ndim != 2:
        raise ValueError(
            f"expected x [T, K] and a group_size 16 or 32, got {list(x.shape)} and {group_size}"
        )
    rows, k = x.shape
    row_bytes = QuantActivation.row_bytes(k, group_size)
    return QuantActivation(empty((rows, row_bytes), torch.uint8, x.device), k, group_size)


def check_same_memory(out: torch.Tensor, flat: torch.Tensor) -> None:
    """Raises ValueError if `out` was flattened by copying it: what is written would be lost."""
    if flat.data_ptr() != out.data_ptr():
        raise ValueError(
            f"out: expected leading dimensions that can be flattened to one without a copy, got "
            f"{list(out.shape)} with strides {list(out.stride())}"
        )
