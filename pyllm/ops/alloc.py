"""Where ops take their outputs from: torch, or the arena of the plan being captured."""

import torch

from pyllm.quant import QuantActivation

# Set by pyllm.runtime.graph while it captures: (shape, dtype) -> tensor whose memory the plan owns.
_arena = None


def empty(shape, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """An uninitialized contiguous tensor."""
    if _arena is not None:
        return _arena.empty(shape, dtype)
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
