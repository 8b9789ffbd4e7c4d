"""Layer normalization (Ba, Kiros and Hinton, 2016, arXiv:1607.06450)."""

import functools

import torch

from pyllm import _C
from pyllm.ops import _norm, library
from pyllm.ops._norm import flattened
from pyllm.ops.registry import Op

_OP = Op("layer_norm")
_BACKWARD = Op("layer_norm_backward")


def layer_norm(
    x, weight=None, bias=None, eps=1e-5, *, residual=None, quantize=None, out=None, backend=None
):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, the residual add fused.

    Mean and (biased) variance are over the last dimension.

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        weight, bias: ``[D]``, any of those dtypes, both the same; each may be None.
        eps: added to the variance.
        residual: like `x`; if given, ``x + residual`` is normalized and returned too.
        quantize: ``torch.int8`` or ``torch.float8_e4m3fn`` to return `y` as `QuantRows`, rounded
            once, from float32.
        out: where to write the result, like `x`; not with `quantize`.

    Returns:
        ``y``, or ``(y, x + residual)``.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    if quantize is not None:
        _norm.check_quantize("layer_norm", quantize, out)
    serve = _OP.serve(library.layer_norm, backend, x, weight, bias, residual)
    return serve(x, weight, bias, eps, residual, quantize, out)


def layer_norm_backward(
    dy, x, weight=None, eps=1e-5, *, residual_grad=None, out=None, backend=None
):
    """The gradients of `layer_norm`.

    Args:
        dy: like `x`, the gradient of the result.
        x: ``[..., D]``, what was normalized: with a residual, the sum that was returned.
        weight, eps: as they were.
        residual_grad: like `x`, the gradient of the sum that was returned; it is added to dx.
        out: where to write dx, like `x`.

    Returns:
        ``(dx, dweight, dbias)``; dx, in x's dtype, is the gradient of `x` and of `residual` alike,
        the others are in weight's dtype, x's without a weight. The same bits every time.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _BACKWARD.implementation(x, backend)(dy, x, weight, eps, residual_grad, out)


@_OP.register("reference")
def _reference(x, weight, bias, eps, residual, quantize, out):
    # What is normalized is the sum as it is stored, in x's dtype.
    total = x if residual is None else x + residual
    exact = _norm.wide(total)
    centered = exact - exact.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return _norm.finish(y, total, x, residual, quantize, out)


@_BACKWARD.register("reference")
def _backward_reference(dy, x, weight, eps, residual_grad, out):
    wide_x, g = _norm.wide(x), _norm.wide(dy)
    like = x if weight is None else weight
    centered = wide_x - wide_x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    h = centered * scale
    dbias, dweight = g.flatten(0, -2).sum(0), (g * h).flatten(0, -2).sum(0)
    if weight is not None:
        g = g * weight
    dx = (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)) * scale
    if residual_grad is not None:
        dx = dx + residual_grad
    dx = dx.to(x.dtype) if out is None else out.copy_(dx)
    return dx, dweight.to(like.dtype), dbias.to(like.dtype)


@_OP.register("cpu")
def _cpu(x, weight, bias, eps, residual, quantize, out):
    if quantize is not None:
        # There is no kernel for one scale a row: nothing on the CPU multiplies it.
        raise ValueError(f"layer_norm: quantize: expected None on the CPU, got {quantize}")
    if x.ndim < 4:
        return _C.layer_norm(x, weight, bias, eps, residual, out, None)
    y, total = _norm.outputs(x, residual, out)
    x, residual, rows, sums = flattened(x, residual, y, total)
    _C.layer_norm(x, weight, bias, eps, residual, rows, sums)
    return y if total is None else (y, total)


@_BACKWARD.register("cpu")
def _backward_cpu(*arguments):
    return _norm.backward_cpu(_C.layer_norm_backward, *arguments, n_parameters=2)


def _device(backend, *arguments):
    return _norm.forward(backend, "layer_norm", *arguments)


def _backward_device(backend, *arguments):
    return _norm.backward(backend, "layer_norm_backward", *arguments, n_parameters=2)


for _backend in ("cuda", "emulator", "triton"):
    _OP.register(_backend)(functools.partial(_device, _backend))
    _BACKWARD.register(_backend)(functools.partial(_backward_device, _backend))
