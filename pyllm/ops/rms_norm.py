"""Root mean square layer normalization (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

import torch

from pyllm import _C
from pyllm.ops import device
from pyllm.ops.alloc import empty_like, empty_quantized
from pyllm.ops.registry import Op

_OP = Op("rms_norm")


def rms_norm(x, weight, eps=1e-6, *, residual=None, quantize=None, out=None, backend=None):
    """``x / sqrt(mean(x², -1) + eps) * weight``, the residual add fused.

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        weight: ``[D]``, any of those dtypes.
        eps: added to the mean square.
        residual: like `x`; if given, ``x + residual`` is normalized and returned too.
        quantize: the group size, 16 or 32, of a `quant_matmul` that follows. A backend that
            multiplies in int8 returns `y` as a `QuantActivation`; x is ``[T, D]`` then.
        out: where to write the result, like `x`; not with `quantize`.

    Returns:
        ``y``, or ``(y, x + residual)``.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(x, backend)(x, weight, eps, residual, quantize, out)


@_OP.register("reference")
def _reference(x, weight, eps, residual, quantize, out):
    # What is normalized is the sum as it is stored, in x's dtype.
    total = x if residual is None else x + residual
    exact = total.double() if x.dtype == torch.float64 else total.float()
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight.to(exact.dtype)
    y = y.to(x.dtype) if out is None else out.copy_(y)
    return y if residual is None else (y, total)


@_OP.register("cpu")
def _cpu(x, weight, eps, residual, quantize, out):
    total = None if residual is None else empty_like(x)
    if quantize is not None:
        y = empty_quantized(x, quantize)
        _C.rms_norm(x, weight, eps, residual, None, total, y.data, quantize)
    else:
        y = empty_like(x) if out is None else out
        arguments = (at_most_3d(t) for t in (residual, y, total))
        _C.rms_norm(at_most_3d(x), weight, eps, *arguments, None, 0)
    return y if residual is None else (y, total)


def _device(backend):
    def run(x, weight, eps, residual, quantize, out):
        if quantize is not None:
            raise ValueError(f"rms_norm: backend {backend!r} does not quantize its output")
        total = None if residual is None else torch.empty_like(x)
        y = torch.empty_like(x) if out is None else out
        device.library(backend).rms_norm(
            at_most_3d(x), weight, eps, *map(at_most_3d, (residual, y, total)), device.stream(x)
        )
        return y if residual is None else (y, total)

    return run


for _backend in ("cuda", "emulator"):
    _OP.register(_backend)(_device(_backend))


def at_most_3d(x):
    """`x` as ``[T, D]`` or ``[T, H, D]`` without a copy; None stays None."""
    if x is None or 2 <= x.ndim <= 3:
        return x
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -3)
