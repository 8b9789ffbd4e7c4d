"""`silu_mul`, `gelu`, `gelu_mul` and `relu`.

Their derivatives are in plain PyTorch, which torch.compile fuses with what is around them.
"""

import torch

from pyllm.ops._norm import wide
from pyllm.ops.library.define import define, implementation, into, named

_aten = torch.ops.aten


def _silu_backward(g, x):
    # aten's has no derivative itself
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


# kind -> the gradient of the activation from that of its result, and the activation
_FUNCTIONS = {
    "relu": (lambda g, x: _aten.threshold_backward(g, x, 0), torch.relu),
    "silu": (_silu_backward, torch.nn.functional.silu),
    "gelu": (_aten.gelu_backward, torch.nn.functional.gelu),
    "gelu_tanh": (
        lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
}


def activation(kind, x, up, out, quantize, backend):
    """As the op's backends are called; groups to quantize to are not followed."""
    if up is None:
        return into("activation", out, _plain(kind, x, named(backend)), x)
    return into("activation", out, _gated(kind, x, up, named(backend)), x, up)


def _run(kind, x, *rest):
    up, backend = rest if len(rest) == 2 else (None, *rest)
    return implementation("activation", x, backend)(kind, x, up, None).contiguous()


def _fake(kind, x, *_):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    ctx.kind, *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    gradient, _ = _FUNCTIONS[ctx.kind]
    return None, gradient(wide(dy), wide(x)).to(x.dtype), None


def _backward_gated(ctx, dy):
    gate, up = ctx.saved_tensors
    gradient, function = _FUNCTIONS[ctx.kind]
    dy, x, factor = wide(dy), wide(gate), wide(up)
    dgate = gradient(dy * factor, x).to(gate.dtype)
    return None, dgate, (dy * function(x)).to(up.dtype), None


def _same_dtype(dtype, kind, gate, up, backend):
    wider = torch.promote_types(gate.dtype, up.dtype)
    return kind, gate.to(wider), up.to(wider), backend


_plain = define(
    "activation(str kind, Tensor x, str? backend) -> Tensor",
    _run, _fake, setup=_setup, backward=_backward, rows=("x",),
)  # fmt: skip
_gated = define(
    "gated_activation(str kind, Tensor gate, Tensor up, str? backend) -> Tensor",
    _run, _fake, setup=_setup, backward=_backward_gated, rows=("gate", "up"),
    autocast=_same_dtype,
)  # fmt: skip
