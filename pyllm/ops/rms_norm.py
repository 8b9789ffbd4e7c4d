"""Root mean square layer normalization (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

import functools

import torch

from pyllm import _C
from pyllm.ops import _norm, library
from pyllm.ops._norm import flattened
from pyllm.ops.alloc import empty_quantized
from pyllm.ops.registry import Op
from pyllm.quant import QuantRows

_OP = Op("rms_norm")
_BACKWARD = Op("rms_norm_backward")


def rms_norm(x, weight, eps=1e-6, *, residual=None, quantize=None, out=None, backend=None):
    """``x / sqrt(mean(x², -1) + eps) * weight``, the residual add fused.

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        weight: ``[D]``, any of those dtypes.
        eps: added to the mean square.
        residual: like `x`; if given, ``x + residual`` is normalized and returned too.
        quantize: ``torch.int8`` or ``torch.float8_e4m3fn`` to return `y` as `QuantRows`, rounded
            once, from float32. Or the group size, 16 or 32, of a `quant_matmul` that follows: a
            backend that multiplies in int8 groups returns `y` as a `QuantActivation`; x is
            ``[T, D]`` then.
        out: where to write the result, like `x`; not with `quantize`.

    Returns:
        ``y``, or ``(y, x + residual)``.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    if quantize is not None:
        _norm.check_quantize("rms_norm", quantize, out)
    serve = _OP.serve(library.rms_norm, backend, x, weight, residual)
    return serve(x, weight, eps, residual, quantize, out)


def rms_norm_backward(
    dy, x, weight, eps=1e-6, *, residual_grad=None, out=None, backend=None
):  # fmt: skip
    """The gradients of `rms_norm`.

    Args:
        dy: like `x`, the gradient of the result.
        x: ``[..., D]``, what was normalized: with a residual, the sum that was returned.
        weight, eps: as they were.
        residual_grad: like `x`, the gradient of the sum that was returned; it is added to dx.
        out: where to write dx, like `x`.

    Returns:
        ``(dx, dweight)``; dx, in x's dtype, is the gradient of `x` and of `residual` alike, dweight
        is in weight's dtype. The same bits every time.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _BACKWARD.implementation(x, backend)(dy, x, weight, eps, residual_grad, out)


@_OP.register("reference")
def _reference(x, weight, eps, residual, quantize, out):
    # What is normalized is the sum as it is stored, in x's dtype.
    total = x if residual is None else x + residual
    exact = _norm.wide(total)
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight.to(exact.dtype)
    return _norm.finish(y, total, x, residual, quantize, out)


@_BACKWARD.register("reference")
def _backward_reference(dy, x, weight, eps, residual_grad, out):
    wide_x, wide_dy = _norm.wide(x), _norm.wide(dy)
    scale = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    h, g = wide_x * scale, wide_dy * weight
    dx = (g - h * (g * h).mean(-1, keepdim=True)) * scale
    if residual_grad is not None:
        dx = dx + residual_grad
    dweight = (wide_dy * h).flatten(0, -2).sum(0)
    return dx.to(x.dtype) if out is None else out.copy_(dx), dweight.to(weight.dtype)


@_OP.register("cpu")
def _cpu(x, weight, eps, residual, quantize, out):
    if quantize is not None:
        if quantize in QuantRows.LIMITS:
            # There is no kernel for one scale a row: nothing on the CPU multiplies it.
            raise ValueError(
                f"rms_norm: quantize: expected a group size on the CPU, got {quantize}"
            )
        y = empty_quantized(x, quantize)
        results = _C.rms_norm(x, weight, eps, residual, None, None, y.data, quantize)
        return y if residual is None else (y, results[1])
    if x.ndim < 4:
        return _C.rms_norm(x, weight, eps, residual, out, None, None, 0)
    y, total = _norm.outputs(x, residual, out)
    x, residual, rows, sums = flattened(x, residual, y, total)
    _C.rms_norm(x, weight, eps, residual, rows, sums, None, 0)
    return y if total is None else (y, total)


@_BACKWARD.register("cpu")
def _backward_cpu(*arguments):
    return _norm.backward_cpu(_C.rms_norm_backward, *arguments, n_parameters=1)


def _device(backend, x, weight, eps, residual, quantize, out):
    return _norm.forward(backend, "rms_norm", x, weight, None, eps, residual, quantize, out)


def _backward_device(backend, dy, x, weight, eps, residual_grad, out):
    arguments = (dy, x, weight, eps, residual_grad, out)
    return _norm.backward(backend, "rms_norm_backward", *arguments, n_parameters=1)


for _backend in ("cuda", "emulator", "triton"):
    _OP.register(_backend)(functools.partial(_device, _backend))
    _BACKWARD.register(_backend)(functools.partial(_backward_device, _backend))
