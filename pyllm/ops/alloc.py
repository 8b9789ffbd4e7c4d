"""Where ops take their outputs from: torch, or the arena of the plan being captured."""

import torch

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
