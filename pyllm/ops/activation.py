"""Pointwise activations, with the product of a gated unit fused (Shazeer, 2020, arXiv:2002.05202).

All compute in float32 and round once. Only the last dimension has to be contiguous, so gate and up
may be the halves of one fused projection.
"""

import math

import torch
import torch.nn.functional as F

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops._norm import FLOATS, at_most_3d, flattened
from pyllm.ops.alloc import empty_like, empty_quantized
from pyllm.ops.registry import Op

_OP = Op("activation")
_BACKWARD = Op("activation_backward")

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
    return _run("silu", gate, up, quantize, out, backend)


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
    return _run(_gelu_kind(approximate), x, None, None, out, backend)


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
    return _run(_gelu_kind(approximate), gate, up, quantize, out, backend)


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
    return _run("relu", x, None, None, out, backend)


def activation_backward(kind, dy, gate, up=None, *, backend=None):
    """The gradients of the ops above. There is no CPU kernel: the reference serves there.

    Args:
        kind: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        dy: like `gate`, the gradient of the result.
        gate: ``[..., D]`` float32, bfloat16 or float16, what was activated (`x` of the ops that
            have no gate); the last dimension contiguous.
        up: like `gate`; None if there was none.

    Returns:
        ``(dgate, dup)``, like `gate`; dup is None if `up` is. At infinity the derivatives are their
        limits, 0 and 1.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or another `kind`.
        BackendError: if `backend` cannot serve.
    """
    if kind not in _FUNCTIONS:
        raise ValueError(
            f"activation_backward: kind: expected one of {', '.join(_FUNCTIONS)}, got {kind!r}"
        )
    return _BACKWARD.implementation(gate, backend)(kind, dy, gate, up)


def _run(kind, x, up, quantize, out, backend):
    return _OP.serve(library.activation, backend, x, up)(kind, x, up, out, quantize)


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


# sqrt(2 / pi), and the factor of x^3 in gelu_tanh: sigmoid(2 u) with u = c (x + a x^3).
_C_TANH, _A_TANH = 0.7978845608028654, 0.044715


def _silu_derivative(x):
    s = torch.sigmoid(x)
    return s + x * s * torch.sigmoid(-x)


def _gelu_derivative(x):
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density


def _gelu_tanh_derivative(x):
    u = _C_TANH * (x + _A_TANH * x**3)
    s, slope = torch.sigmoid(2 * u), _C_TANH * (1 + 3 * _A_TANH * x.square())
    return s + x * s * torch.sigmoid(-2 * u) * 2 * slope


_DERIVATIVES = {
    "relu": lambda x: (~(x <= 0)).to(x.dtype),  # of NaN 1, as in PyTorch
    "silu": _silu_derivative,
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
}


@_OP.register("reference")
def _reference(kind, x, up, out, quantize=None):
    exact = torch.promote_types(x.dtype, torch.float32)
    y = _FUNCTIONS[kind](x.to(exact))
    y = (y if up is None else y * up).to(x.dtype)
    return y if out is None else out.copy_(y)


@_BACKWARD.register("reference")
def _backward_reference(kind, dy, gate, up):
    exact = torch.promote_types(gate.dtype, torch.float32)
    x, g = gate.to(exact), dy.to(exact)
    # Beyond a thousand the derivatives are 0 or 1, where inf * 0 would be NaN.
    dgate = g * (1 if up is None else up) * _DERIVATIVES[kind](x.clamp(-1000, 1000))
    dup = None if up is None else (g * _FUNCTIONS[kind](x)).to(gate.dtype)
    return dgate.to(gate.dtype), dup


@_OP.register("cpu")
def _cpu(kind, x, up, out, quantize=None):
    if quantize is not None:
        y = empty_quantized(x, quantize)
        _C.activation(kind, x, up, None, y.data, quantize)
        return y
    if x.ndim < 4:
        return _C.activation(kind, x, up, out, None, 0)
    y = empty_like(x) if out is None else out
    x, up, result, _ = flattened(x, up, y)
    _C.activation(kind, x, up, result, None, 0)
    return y


@_OP.register("triton")
def _triton(kind, x, up, out, quantize=None):
    # Group sizes are for backends whose matmul takes int8 groups.
    y = empty_like(x) if out is None else out
    _on_triton("activation", kind, {"x" if up is None else "gate": x, "up": up, "out": y})
    return y


@_BACKWARD.register("triton")
def _backward_triton(kind, dy, gate, up):
    dgate, dup = empty_like(gate), None if up is None else empty_like(gate)
    _on_triton("activation_backward", kind, {
        "dy": dy, "gate": gate, "up": up, "dgate": dgate, "dup": dup,
    })  # fmt: skip
    return dgate, dup


def _on_triton(op, kind, tensors):
    """The kernel of `op` for these tensors, which have to be alike."""
    first = next(iter(tensors.values()))
    device.check_same(op, first, **tensors)
    tensors = {name: at_most_3d(x) for name, x in tensors.items()}
    rows = "T D" if first.ndim < 3 else "T H D"
    dtypes = [FLOATS, *(first.dtype,) * (len(tensors) - 1)]
    checks = [(x, n, rows, d) for (n, x), d in zip(tensors.items(), dtypes, strict=True)]
    _C.check(op, checks)
    getattr(device.triton_kernels("activation"), op)(kind, *tensors.values())
