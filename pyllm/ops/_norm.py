"""What `rms_norm` and `layer_norm` share."""

import torch

from pyllm import _C
from pyllm.ops import device
from pyllm.ops.alloc import check_same_memory, empty, empty_like
from pyllm.quant import QuantRows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# On the CPU, sums over rows are first over blocks of so many rows and about so many values: work
# for some microseconds, sums short enough to lose no digits, and few bytes beside the rows'.
_BLOCK_ROWS, _BLOCK_VALUES = (16, 64), 16384


def at_most_3d(x):
    """`x` as ``[T, D]`` or ``[T, H, D]`` without a copy; None stays None."""
    if x is None or 2 <= x.ndim <= 3:
        return x
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -3)


def flattened(x, other, out, total=None):
    """All as `at_most_3d`; the last two are written to.

    Raises:
        ValueError: if `out` could be flattened only by copying it.
    """
    flat = at_most_3d(out)
    if out is not None:
        check_same_memory(out, flat)
    return at_most_3d(x), at_most_3d(other), flat, at_most_3d(total)


def outputs(x, residual, out):
    """What a CPU kernel writes to: the result, and the sum if there is a residual."""
    return empty_like(x) if out is None else out, None if residual is None else empty_like(x)


def wide(x):
    """`x` in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finish(y, total, x, residual, quantize, out):
    """What the reference returns, from `y` in float32."""
    if quantize in QuantRows.LIMITS:
        y = QuantRows.from_float(y, quantize)
    else:
        y = y.to(x.dtype) if out is None else out.copy_(y)
    return y if residual is None else (y, total)


def check_quantize(op, quantize, out):
    """Raises unless `quantize` is a group size or a dtype that rows can be quantized to."""
    rows = isinstance(quantize, torch.dtype)
    if rows and quantize not in QuantRows.LIMITS:
        raise ValueError(f"{op}: quantize: expected int8 or float8_e4m3fn, got {quantize}")
    if rows and out is not None:
        raise ValueError(f"{op}: out: expected None with quantize, got a tensor")


def forward(backend, op, x, weight, bias, eps, residual, quantize, out):
    """The kernel of `op` in CUDA, on the device or on the emulator, or in Triton."""
    device.check_same(op, x, weight=weight, bias=bias, residual=residual, out=out)
    total = None if residual is None else torch.empty_like(x)
    scale = None
    if quantize in QuantRows.LIMITS:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        y = QuantRows(torch.empty_like(x, dtype=quantize), scale)
        # The kernels know e4m3 by its bits.
        out = y.q if quantize == torch.int8 else y.q.view(torch.uint8)
        scale = scale.flatten()
    else:
        # Group sizes are for backends whose matmul takes int8 groups; this one's takes y.
        y = out = torch.empty_like(x) if out is None else out
    x, residual, out, total = flattened(x, residual, out, total)
    weight, bias = _as(weight, x), _as(bias, x)
    arguments = (x, weight, bias, eps, residual, out, total, scale)
    if backend == "triton":
        rows, parameter = "T D" if x.ndim == 2 else "T H D", (x.dtype, torch.float32)
        to = x.dtype if scale is None else out.dtype
        _C.check(op, [
            (x, "x", rows, FLOATS), (weight, "weight", "D", parameter),
            (bias, "bias", "D", parameter), (residual, "residual", rows, x.dtype),
            (out, "out", rows, to),
        ])  # fmt: skip
        getattr(device.triton_kernels(op), op)(*arguments)
    else:
        getattr(device.library(backend), op)(*arguments, device.stream(x))
    return y if residual is None else (y, total)


def backward(backend, op, dy, x, weight, eps, residual_grad, out, n_parameters):
    """The kernels of `op` in CUDA or Triton: ``(dx, dweight)``, and dbias of two parameters."""
    device.check_same(op, x, dy=dy, weight=weight, residual_grad=residual_grad, out=out)
    dx = torch.empty_like(x) if out is None else out
    like, width = x if weight is None else weight, x.shape[-1]
    if x.numel() == 0:
        return dx, *(like.new_zeros(width) for _ in range(n_parameters))
    gradients = [like.new_empty(width) for _ in range(n_parameters)]
    dbias = gradients[1] if n_parameters > 1 else None
    tensors = (at_most_3d(dy), at_most_3d(x), weight, eps, at_most_3d(residual_grad))
    results = (at_most_3d(dx), gradients[0], dbias)
    if backend == "triton":
        rows = "T D" if tensors[0].ndim == 2 else "T H D"
        _C.check(op, [
            (tensors[1], "x", rows, FLOATS), (tensors[0], "dy", rows, x.dtype),
            (weight, "weight", "D", FLOATS), (tensors[4], "residual_grad", rows, x.dtype),
            (results[0], "out", rows, x.dtype),
        ])  # fmt: skip
        stem = op.removesuffix("_backward")
        getattr(device.triton_kernels(stem), op)(*tensors, *results)
    else:
        library = device.library(backend)
        floats = library.norm_backward_scratch(x.numel() // width, width)
        scratch = x.new_empty(floats, dtype=torch.float32)
        getattr(library, op)(*tensors, *results, scratch, device.stream(x))
    return dx, *gradients


def backward_cpu(kernel, dy, x, weight, eps, residual_grad, out, n_parameters):
    """The CPU kernel's: ``(dx, dweight)``, and dbias of two parameters."""
    dx = empty_like(x) if out is None else out
    width = x.shape[-1]
    like = empty((width,), x.dtype) if weight is None else weight
    gradients = [empty_like(like) for _ in range(n_parameters)]
    least, most = _BLOCK_ROWS
    block = width * min(max(_BLOCK_VALUES // max(width, 1), least), most)
    partial = empty((n_parameters, x.numel() // max(block, 1) + 1, width), torch.float32)
    dx_rows = dx
    if x.ndim > 3:
        dy = at_most_3d(dy)
        x, residual_grad, dx_rows, _ = flattened(x, residual_grad, dx)
    dweight, dbias = gradients[0], gradients[1] if n_parameters > 1 else None
    kernel(dy, x, weight, eps, residual_grad, dx_rows, dweight, dbias, partial)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
    return dx, *gradients


def _as(parameter, x):
    """`parameter` in float32 unless it is of x's dtype: the kernels take these two."""
    if parameter is None or parameter.dtype in (x.dtype, torch.float32):
        return parameter
    if parameter.dtype in (torch.float16, torch.bfloat16):
        return parameter.float()
    return parameter
