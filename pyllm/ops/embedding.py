"""Rows of an embedding table by token id."""

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops._norm import FLOATS
from pyllm.ops.alloc import empty
from pyllm.ops.registry import Op
from pyllm.quant import QuantTensor

_OP = Op("embedding")


def embedding(token_ids, weight, *, out=None, backend=None):
    """``weight[token_ids]``.

    Args:
        token_ids: int32 ``[T]``. On a GPU, and when a captured plan is replayed, an id that does
            not exist gives a row of NaN.
        weight: ``[V, D]`` float32, bfloat16 or float16, or a `QuantTensor`.
        out: where to write the result, ``[T, D]`` of any of those dtypes.

    Returns:
        ``[T, D]`` of the weight's dtype, float32 for a QuantTensor.

    Raises:
        ValueError: for an id that does not exist, or shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.serve(library.embedding, backend, token_ids, weight)(token_ids, weight, out)


@_OP.register("reference")
def _reference(token_ids, weight, out):
    table = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    y = table[token_ids]
    return y if out is None else out.copy_(y)


def _out(token_ids, weight):
    dtype = torch.float32 if isinstance(weight, QuantTensor) else weight.dtype
    return empty((*token_ids.shape, weight.shape[1]), dtype, token_ids.device)


@_OP.register("cpu")
def _cpu(token_ids, weight, out):
    out = _out(token_ids, weight) if out is None else out
    if isinstance(weight, QuantTensor):
        _C.quant_embedding(token_ids, *weight.kernel_arguments(), out)
    else:
        _C.embedding(token_ids, weight, out)
    return out


@_OP.register("triton")
def _triton(token_ids, weight, out):
    out = _out(token_ids, weight) if out is None else out
    quantized = isinstance(weight, QuantTensor)
    table = weight.packed if quantized else weight
    device.check_same("embedding", token_ids, weight=table, out=out)
    width = weight.shape[-1] if quantized else "D"
    _C.check("embedding", [
        (None if quantized else weight, "weight", "V D", FLOATS),
        (token_ids, "token_ids", "T", torch.int32), (out, "out", f"T {width}", FLOATS),
    ])  # fmt: skip
    kernels = device.triton_kernels("embedding")
    if quantized:
        kernels.quant_embedding(token_ids, *weight.kernel_arguments(), out)
    else:
        kernels.embedding(token_ids, weight, out)
    return out
