"""Multiplication by unquantized weights."""

import torch

from pyllm import _C
from pyllm.ops import library
from pyllm.ops.alloc import check_same_memory, empty_rows
from pyllm.ops.registry import Op

_OP = Op("matmul")


def matmul(x, weight, bias=None, *, out=None, backend=None):
    """``x @ weightᵀ + bias``, summed in float32 in an order that does not depend on other rows.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        weight: ``[N, K]``, any of those dtypes.
        bias: float32 ``[N]``.
        out: where to write the result, ``[..., N]`` of any of those dtypes.

    Returns:
        ``[..., N]`` of x's dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.serve(library.matmul, backend, x, weight, bias)(x, weight, bias, out)


@_OP.register("reference")
def _reference(x, weight, bias, out):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype) if out is None else out.copy_(y)


@_OP.register("cuda")
def _platform(x, weight, bias, out):
    """The platform's library, by PyTorch."""
    if x.dtype != weight.dtype:
        raise ValueError(f"matmul: weight: expected x's dtype, {x.dtype}, got {weight.dtype}")
    if out is None or out.dtype == x.dtype:
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return y if out is None else out.copy_(y)
    torch.ops.aten.mm.dtype_out(as_rows(x), weight.t(), out.dtype, out=as_rows(out))
    return out if bias is None else out.add_(bias)


@_OP.register("cpu")
def _cpu(x, weight, bias, out):
    if out is None and is_flat(x):
        return _C.matmul(x, weight, bias, None)
    out = empty_rows(x, weight.shape[0]) if out is None else out
    _C.matmul(flat(x), weight, bias, flat(out, writes=True))
    return out


def as_rows(x):
    """`x [..., K]` as ``[T, K]`` without a copy."""
    return x if x.ndim == 2 else x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def is_flat(x):
    """Whether a CPU kernel of rows can flatten `x` itself."""
    ndim = x.ndim
    return ndim < 3 or (ndim == 3 and x.is_contiguous())


def flat(x, *, writes=False):
    """`x` as a CPU kernel of rows takes it.

    Raises:
        ValueError: if it `writes` to x, and x could be flattened only by copying it.
    """
    if is_flat(x):
        return x
    rows = as_rows(x)
    if writes:
        check_same_memory(x, rows)
    return rows
