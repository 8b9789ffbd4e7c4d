"""Layer normalization (Ba, Kiros and Hinton, 2016, arXiv:1607.06450)."""

import torch

from pyllm import _C
from pyllm.ops.alloc import empty_like
from pyllm.ops.registry import Op
from pyllm.ops.rms_norm import at_most_3d

_OP = Op("layer_norm")


def layer_norm(x, weight=None, bias=None, eps=1e-5, *, residual=None, out=None, backend=None):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, the residual add fused.

    Mean and (biased) variance are over the last dimension.

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        weight, bias: ``[D]``, any of those dtypes, both the same; each may be None.
        eps: added to the variance.
        residual: like `x`; if given, ``x + residual`` is normalized and returned too.
        out: where to write the result, like `x`.

    Returns:
        ``y``, or ``(y, x + residual)``.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(x, backend)(x, weight, bias, eps, residual, out)


@_OP.register("reference")
def _reference(x, weight, bias, eps, residual, out):
    # What is normalized is the sum as it is stored, in x's dtype.
    total = x if residual is None else x + residual
    exact = total.to(torch.promote_types(x.dtype, torch.float32))
    centered = exact - exact.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(x.dtype) if out is None else out.copy_(y)
    return y if residual is None else (y, total)


@_OP.register("cpu")
def _cpu(x, weight, bias, eps, residual, out):
    y = empty_like(x) if out is None else out
    total = None if residual is None else empty_like(x)
    tensors = (at_most_3d(residual), at_most_3d(y), at_most_3d(total))
    _C.layer_norm(at_most_3d(x), weight, bias, eps, *tensors)
    return y if residual is None else (y, total)
