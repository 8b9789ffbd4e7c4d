"""Pointwise activations, with the product of a gated unit fused (Shazeer, 2020, arXiv:2002.05202).

All compute in float32 and round once. Only the last dimension has to be contiguous, so gate and up
may be the halves of one fused projection.
"""

import torch
import torch.nn.functional as F

from pyllm import _C
from pyllm.ops import device
from pyllm.ops._norm import FLOATS, at_most_3d
from pyllm.ops.alloc import empty_like, empty_quantized
from pyllm.ops.registry import Op

_OP = Op("activation")

# approximate= of gelu -> kind
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def silu_mul(gate, up, *, quantize=None, out=None, backend=None):
    """``gate * sigmoid(gate) * up``, the gated unit of Llama (SwiGLU).

    Args:
        gate: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        up: like `gate`.
        quantize: the group size, 16 or 32, of a `quant_matmul` that follows. A backend that
            multiplies in int8 returns a `QuantActivation`; gate and up are ``[T, D]`` then.
        out: where to write the result, like `gate`.

    Returns:
        A tensor like `gate`, or a `QuantActivation`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(gate, backend)("silu", gate, up, out, quantize)


def gelu(x, approximate="none", *, out=None, backend=None):
    """``x * Phi(x)`` (Hendrycks and Gimpel, 2016, arXiv:1606.08415).

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        approximate: ``"none"`` (the error function) or ``"tanh"``, as in PyTorch.
        out: where to write the result, like `x`.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or another `approximate`.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(x, backend)(_gelu_kind(approximate), x, None, out)


def gelu_mul(gate, up, approximate="none", *, quantize=None, out=None, backend=None):
    """``gelu(gate, approximate) * up``, the gated unit of T5 v1.1 and Gemma (GEGLU).

    Args:
        gate: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        up: like `gate`.
        approximate: ``"none"`` (the error function) or ``"tanh"``, as in PyTorch.
        quantize: the group size, 16 or 32, of a `quant_matmul` that follows. A backend that
            multiplies in int8 returns a `QuantActivation`; gate and up are ``[T, D]`` then.
        out: where to write the result, like `gate`.

    Returns:
        A tensor like `gate`, or a `QuantActivation`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or another `approximate`.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(gate, backend)(_gelu_kind(approximate), gate, up, out, quantize)


def relu(x, *, out=None, backend=None):
    """``max(x, 0)``; NaN stays NaN.

    Args:
        x: ``[..., D]`` float32, bfloat16 or float16; the last dimension contiguous.
        out: where to write the result, like `x`.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    return _OP.implementation(x, backend)("relu", x, None, out)


def _gelu_kind(approximate):
    if approximate not in _GELU:
        raise ValueError(f"gelu: approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _GELU[approximate]


_FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@_OP.register("reference")
def _reference(kind, x, up, out, quantize=None):
    exact = torch.promote_types(x.dtype, torch.float32)
    y = _FUNCTIONS[kind](x.to(exact))
    y = (y if up is None else y * up).to(x.dtype)
    return y if out is None else out.copy_(y)


@_OP.register("cpu")
def _cpu(kind, x, up, out, quantize=None):
    if quantize is not None:
        y = empty_quantized(x, quantize)
        _C.activation(kind, x, up, None, y.data, quantize)
        return y
    y = empty_like(x) if out is None else out
    _C.activation(kind, at_most_3d(x), at_most_3d(up), at_most_3d(y), None, 0)
    return y


@_OP.register("triton")
def _triton(kind, x, up, out, quantize=None):
    # Group sizes are for backends whose matmul takes int8 groups.
    y = empty_like(x) if out is None else out
    device.check_same("activation", x, up=up, out=out)
    tensors = [at_most_3d(t) for t in (x, up, y)]
    rows = "T D" if tensors[0].ndim == 2 else "T H D"
    _C.check("activation", [
        (tensors[0], "x" if up is None else "gate", rows, FLOATS),
        (tensors[1], "up", rows, x.dtype), (tensors[2], "out", rows, x.dtype),
    ])  # fmt: skip
    device.triton_kernels("activation").activation(kind, *tensors)
    return y
