"""Rows of an embedding table by token id."""

import torch

from pyllm import _C
from pyllm.ops.alloc import empty
from pyllm.ops.registry import Op
from pyllm.quant import QuantTensor

_OP = Op("embedding")


def embedding(token_ids, weight, *, out=None, backend=None):
    """``weight[token_ids]``.

    Args:
        token_ids: int32 ``[T]``. In a captured plan, an id that does not exist when it is replayed
            gives a row of NaN.
        weight: ``[V, D]`` float32, bfloat16 or float16, or a `QuantTensor`.
        out: where to write the result, ``[T, D]`` of any of those dtypes.

    Returns:
        ``[T, D]`` of the weight's dtype, float32 for a QuantTensor.

    Raises:
        ValueError: for an id that does not exist, or shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(token_ids, backend)(token_ids, weight, out)


@_OP.register("reference")
def _reference(token_ids, weight, out):
    table = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    y = table[token_ids]
    return y if out is None else out.copy_(y)


@_OP.register("cpu")
def _cpu(token_ids, weight, out):
    quantized = isinstance(weight, QuantTensor)
    if out is None:
        dtype = torch.float32 if quantized else weight.dtype
        out = empty((*token_ids.shape, weight.shape[1]), dtype)
    if quantized:
        _C.quant_embedding(token_ids, *weight.kernel_arguments(), out)
    else:
        _C.embedding(token_ids, weight, out)
    return out
