"""Where ops take their outputs from: torch, or the arena of the plan being captured."""

import threading
from contextlib import contextmanager

import torch

from pyllm.quant import QuantActivation

# Its `arena`, set by `use`, is something with ``empty(shape, dtype)``. Each thread has its own:
# what another one allocates while a step is captured is no part of it.
_local = threading.local()


@contextmanager
def use(arena):
    """Within the block, ops take their outputs from `arena` (see `pyllm.runtime.graph.Arena`)."""
    before, _local.arena = getattr(_local, "arena", None), arena
    try:
        yield
    finally:
        _local.arena = before


def empty(shape, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """An uninitialized contiguous tensor."""
    arena = getattr(_local, "arena", None)
    if arena is not None:
        return arena.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialized contiguous tensor of x's shape, dtype and device."""
    return empty(x.shape, x.dtype, x.device)


def empty_quantized(x: torch.Tensor, group_size: int) -> QuantActivation:
    """Room for the rows of ``x [T, K]``, quantized in groups of 16 or 32."""
    if group_size not in (16, 32) or x.ndim != 2:
        raise ValueError(
            f"expected x [T, K] and a group_size 16 or 32, got {list(x.shape)} and {group_size}"
        )
    rows, k = x.shape
    row_bytes = QuantActivation.row_bytes(k, group_size)
    return QuantActivation(empty((rows, row_bytes), torch.uint8, x.device), k, group_size)
