"""Multiplication by quantized weights, and the int8 activations that it works on."""

import torch

from pyllm import _C
from pyllm.ops.alloc import empty, empty_quantized
from pyllm.ops.matmul import as_rows
from pyllm.ops.registry import Op
from pyllm.quant import QuantActivation, QuantTensor

_OP = Op("quant_matmul")
_QUANTIZE = Op("quantize_activation")


def quant_matmul(x, weight: QuantTensor, bias=None, *, out=None, backend=None):
    """``x @ dequantize(weight)ᵀ + bias``.

    The CPU kernel rounds each row of `x` to int8 in the weight's groups (`quantize_activation`)
    unless it comes quantized already, which several matmuls of one input can share. A row's result
    does not depend on the other rows.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16, or a `QuantActivation` ``[T, K]`` of the
            weight's group size.
        weight: `QuantTensor` ``[N, K]``.
        bias: float32 ``[N]``.
        out: where to write the result, ``[..., N]``; with a QuantActivation any float dtype.

    Returns:
        ``[..., N]`` of x's dtype, float32 for a QuantActivation.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"quant_matmul: expected a QuantTensor, got {type(weight).__name__}")
    tensor = x.data if isinstance(x, QuantActivation) else x
    return _OP.implementation(tensor, backend)(x, weight, bias, out)


def quantize_activation(x, group_size=32, *, backend=None) -> QuantActivation:
    """Rounds ``x [..., K]`` to int8: ``d = max|x| / 127`` per row and group, ties to even.

    Groups in which no value exceeds 1e-30 become zero. A group with NaN or inf gets a NaN scale, so
    that it makes every result NaN.

    Args:
        x: ``[..., K]`` float; the leading dimensions are flattened.
        group_size: 16 or 32, a divisor of K.

    Returns:
        A `QuantActivation`, for `quant_matmul`.

    Raises:
        ValueError: if `group_size` is not 16 or 32, or does not divide K.
        BackendError: if `backend` cannot serve.
    """
    return _QUANTIZE.implementation(x, backend)(x, group_size)


@_OP.register("reference")
def _reference(x, weight, bias, out):
    x = x.dequantize() if isinstance(x, QuantActivation) else x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.dequantize().to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype) if out is None else out.copy_(y)


@_OP.register("cpu")
def _cpu(x, weight, bias, out):
    n = weight.shape[0]
    if isinstance(x, QuantActivation):
        if x.group_size != weight.group_size or x.k != weight.shape[1]:
            raise ValueError(
                f"quant_matmul: x: expected [T, {weight.shape[1]}] in groups of "
                f"{weight.group_size}, got [T, {x.k}] in groups of {x.group_size}"
            )
        if out is None:
            out = empty((x.data.shape[0], n), torch.float32)
        _C.quant_matmul(x.data, *weight.kernel_arguments(), bias, out)
        return out
    if out is None:
        out = empty((*x.shape[:-1], n), x.dtype)
    # While capturing, what is between the two launches belongs to the plan like any output.
    rows = as_rows(x)
    q = empty_quantized(rows, weight.group_size).data
    _C.quantize_matmul(rows, q, *weight.kernel_arguments(), bias, as_rows(out))
    return out


@_QUANTIZE.register("reference")
def _quantize_reference(x, group_size):
    groups = as_rows(x).float().unflatten(1, (-1, group_size))
    top = groups.abs().amax(2, keepdim=True)
    tiny = ~(top > 1e-30)
    finite = groups.isfinite().all(2, keepdim=True)
    # Not 127 / top, for which torch multiplies by the rounded reciprocal of top.
    inverse = torch.where(tiny | ~finite, 0, torch.full_like(top, 127).div(top))
    q = (groups.nan_to_num(0, 0, 0) * inverse).round()
    d = torch.where(tiny, 0, top / 127).masked_fill(~finite, float("nan"))[..., 0]
    total = q.sum(2)
    k = x.shape[-1]
    data = torch.zeros(q.shape[0], QuantActivation.row_bytes(k, group_size), dtype=torch.uint8)
    words = torch.cat([d, d * total, (-8 * total).int().view(torch.float32)], dim=1)
    row = torch.cat([q.to(torch.int8).flatten(1).view(torch.uint8), words.view(torch.uint8)], dim=1)
    data[:, : row.shape[1]] = row
    return QuantActivation(data, k, group_size)


@_QUANTIZE.register("cpu")
def _quantize_cpu(x, group_size):
    rows = as_rows(x)
    quantized = empty_quantized(rows, group_size)
    _C.quantize_activation(rows, quantized.data, group_size)
    return quantized
