"""The shapes and dtypes that tests and benchmarks share."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (rows, width) of norms and activations: size one, empty, odd, a model's, more than one chunk.
ROWS = [(1, 1), (0, 64), (1, 64), (3, 17), (5, 100), (2, 576), (33, 576), (7, 4096), (300, 96)]


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Normal random numbers that depend on the shape and the seed only."""
    generator = torch.Generator().manual_seed(seed * 1000003 + hash(shape) % 1000003)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def strided(x, extra=5):
    """A copy of `x` whose rows lie further apart than their width."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
