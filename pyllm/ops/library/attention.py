"""`flash_attention` and its derivative."""

import torch

from pyllm.ops._attention import expanded, sinks_gradient
from pyllm.ops.library.define import (
    backward_implementation,
    define,
    implementation,
    into,
    named,
)

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? alibi_slopes, Tensor? bias, Tensor? sinks"
)
_OPTIONS = "float scale, SymInt left, SymInt right, float softcap, str? backend"


def flash_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out, backend,
):  # fmt: skip
    """As the op's backends are called."""
    result, lse = _forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks, scale, *sides,
        softcap or 0.0, named(backend),
    )  # fmt: skip
    result = into("flash_attention", out, result, q, k, v, bias, sinks)
    return (result, lse) if return_lse else result


def _run(
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks, scale, left, right, softcap,
    backend,
):  # fmt: skip
    out, lse = implementation("flash_attention", q, backend)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, (left, right), softcap, alibi_slopes,
        expanded(bias, q, k), sinks, True, None,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


def _fake(q, *_):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=dtype)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale, ctx.left, ctx.right, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, dlse):
    *tensors, out, lse = ctx.saved_tensors
    if ctx.needs_input_grad[5]:
        raise NotImplementedError("flash_attention: no derivative by alibi_slopes")
    if do is None:
        do = torch.zeros_like(out)
    options = (ctx.scale, ctx.left, ctx.right, ctx.softcap, ctx.backend)
    needed = ctx.needs_input_grad
    dq, dk, dv, dbias, dsinks = _differentiate(do, *tensors, out, lse, dlse, needed[6], *options)
    return (
        dq, dk, dv, None, None, None, dbias if needed[6] else None, dsinks if needed[7] else None,
        *[None] * len(options),
    )  # fmt: skip


def _run_backward(
    do, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks, out, lse, dlse,
    needs_dbias, scale, left, right, softcap, backend,
):  # fmt: skip
    dq, dk, dv, dlogits, delta = backward_implementation("flash_attention_backward", q, backend)(
        do.contiguous(), q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, scale,
        (left, right), softcap, alibi_slopes, expanded(bias, q, k), needs_dbias,
    )  # fmt: skip
    dbias, dsinks = q.new_empty(0), q.new_empty(0)
    if needs_dbias:
        dbias = dlogits.sum_to_size(bias.shape).to(bias.dtype)
    if sinks is not None:
        dsinks = sinks_gradient(sinks, lse, delta)
    return tuple(x.contiguous() for x in (dq, dk, dv, dbias, dsinks))


def _fake_backward(
    do, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks, out, lse, dlse,
    needs_dbias, *_,
):  # fmt: skip
    none = q.new_empty(0)
    of = (q, k, v, bias if needs_dbias else None, sinks)
    return tuple(none.clone() if x is None else x.new_empty(x.shape) for x in of)


def _lower(dtype, *arguments):
    """As scaled_dot_product_attention under autocast: q, k and v in `dtype`."""
    cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in arguments[:3])
    return *cast, *arguments[3:]


def _rows(arguments):
    """A dense batch grows; ragged ones are run one after another."""
    return ("q", "k", "v", "bias") if arguments[3] is None else ()


def _fold(size, arguments):
    """What is mapped over becomes a part of the batch."""
    q, k, v, *others, bias, sinks, scale, left, right, softcap, backend = arguments
    batch = q.shape[1]
    if bias is not None:
        bias = bias.expand(size, batch, *bias.shape[2:]).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    arguments = (q, k, v, *others, bias, sinks, scale, left, right, softcap, backend)
    return arguments, lambda x: x.unflatten(0, (size, batch))


_differentiate = define(
    f"flash_attention_backward(Tensor do, {_TENSORS}, Tensor out, Tensor lse, Tensor? dlse, "
    f"bool needs_dbias, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip
_forward = define(
    f"flash_attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _run, _fake, setup=_setup, backward=_backward, rows=_rows, fold=_fold, autocast=_lower,
)  # fmt: skip
