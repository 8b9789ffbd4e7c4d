"""`rms_norm` and `layer_norm`, each without and with a residual, and their derivatives."""

import torch

from pyllm.ops.library.define import (
    backward_implementation,
    define,
    implementation,
    into,
    named,
)
from pyllm.quant import QuantRows


def rms_norm(x, weight, eps, residual, quantize, out, backend):
    """As the public function's arguments are; a group size to quantize to is not followed."""
    arguments = (weight, eps, named(backend))
    inputs = (x, weight, residual)
    return _call("rms_norm", _rms, _add_rms, x, residual, quantize, out, arguments, inputs)


def layer_norm(x, weight, bias, eps, residual, quantize, out, backend):
    """As the public function's arguments are."""
    arguments = (weight, bias, eps, named(backend))
    inputs = (x, weight, bias, residual)
    return _call("layer_norm", _layer, _add_layer, x, residual, quantize, out, arguments, inputs)


def _call(name, plain, add, x, residual, quantize, out, arguments, inputs):
    if quantize in QuantRows.LIMITS:
        raise ValueError(
            f"{name}: quantize: expected None or a group size where PyTorch traces or "
            f"differentiates, got {quantize}"
        )
    if residual is None:
        return into(name, out, plain(x, *arguments), *inputs)
    y, total = add(x, residual, *arguments)
    return into(name, out, y, *inputs), total


def _fake(x, *_):
    return x.new_empty(x.shape)


def _fake_add(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _same_dtype(dtype, x, residual, *rest):
    """Norms compute in float32 whatever comes; only x and the residual have to agree."""
    wider = torch.promote_types(x.dtype, residual.dtype)
    return x.to(wider), residual.to(wider), *rest


def _contiguous(*tensors):
    return tuple(x.contiguous() for x in tensors)


def _define_norm(name, parameters, defaults):
    """The four ops of a norm with these parameters: forward and backward, plain and with a sum."""
    n = len(parameters)
    rest = "".join(f", Tensor{d} {p}" for p, d in zip(parameters, defaults, strict=True))
    rest += ", float eps, str? backend"

    def run(x, *arguments):
        *arguments, backend = arguments
        return implementation(name, x, backend)(x, *arguments, None, None, None).contiguous()

    def run_add(x, residual, *arguments):
        *arguments, backend = arguments
        return _contiguous(*implementation(name, x, backend)(x, *arguments, residual, None, None))

    def run_backward(dy, x, weight, residual_grad, eps, backend):
        function = backward_implementation(f"{name}_backward", x, backend)
        if residual_grad is not None:
            residual_grad = residual_grad.contiguous()
        return _contiguous(*function(dy.contiguous(), x, weight, eps, residual_grad, None))

    def fake_backward(dy, x, weight, *_):
        like = x if weight is None else weight
        return x.new_empty(x.shape), *(like.new_empty(x.shape[-1:]) for _ in range(n))

    returns = ", ".join(["Tensor"] * (n + 1))
    differentiate = define(
        f"{name}_backward(Tensor dy, Tensor x, Tensor{defaults[0]} weight, Tensor? residual_grad, "
        f"float eps, str? backend) -> ({returns})",
        run_backward, fake_backward,
    )  # fmt: skip

    def setup(ctx, inputs, output):
        x, weight, *_, eps, backend = inputs
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend = eps, backend

    def setup_add(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _, _, weight, *_, eps, backend = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.eps, ctx.backend = eps, backend

    def gradients(ctx, dy, residual_grad):
        x, weight = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return residual_grad, [None] * n
        dx, *of_parameters = differentiate(dy, x, weight, residual_grad, ctx.eps, ctx.backend)
        needed = ctx.needs_input_grad[-2 - n : -2]
        return dx, [g if need else None for g, need in zip(of_parameters, needed, strict=True)]

    def backward(ctx, dy):
        dx, of_parameters = gradients(ctx, dy, None)
        return dx, *of_parameters, None, None

    def backward_add(ctx, dy, dtotal):
        dx, of_parameters = gradients(ctx, dy, dtotal)
        return dx, dx, *of_parameters, None, None

    return (
        define(
            f"{name}(Tensor x{rest}) -> Tensor",
            run, _fake, setup=setup, backward=backward, rows=("x",),
        ),
        define(
            f"add_{name}(Tensor x, Tensor residual{rest}) -> (Tensor, Tensor)",
            run_add, _fake_add, setup=setup_add, backward=backward_add, rows=("x", "residual"),
            autocast=_same_dtype,
        ),
    )  # fmt: skip


_rms, _add_rms = _define_norm("rms_norm", ["weight"], [""])
_layer, _add_layer = _define_norm("layer_norm", ["weight", "bias"], ["?", "?"])
