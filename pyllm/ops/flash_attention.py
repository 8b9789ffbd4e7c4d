"""Exact attention without the matrix of scores (Dao et al., 2022, arXiv:2205.14135)."""

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops._attention import (
    FLOATS,
    attend,
    attend_backward,
    check_triton,
    expanded,
    sinks_gradient,
    window_sides,
)
from pyllm.ops.alloc import empty
from pyllm.ops.registry import Op

_OP = Op("flash_attention")
_BACKWARD = Op("flash_attention_backward")


def flash_attention(
    q,
    k,
    v,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    causal=False,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    bias=None,
    sinks=None,
    return_lse=False,
    out=None,
    backend=None,
):
    """``softmax(scale · q kᵀ + bias) v``.

    A batch is dense, or ragged: its sequences end to end with ``cu_seqlens``. Query i of Sq stands
    at position ``i + Sk - Sq``, so that ``causal``, `window` and `alibi_slopes` are aligned to the
    end. A query that sees no key gives 0. Keys that a query does not see cannot influence it, NaN
    or not.

    Args:
        q: ``[B, Sq, H, D]``, or ragged ``[Tq, H, D]``; float32, bfloat16 or float16; D is 1 to 256;
            only the last dimension must be contiguous.
        k, v: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``, any of those dtypes; H is a multiple of Hkv,
            and query heads ``h * H / Hkv`` and up share KV head h.
        cu_seqlens_q, cu_seqlens_k: ``int32[B + 1]``: where each sequence begins, and the total.
        causal: see no key after one's own position.
        scale: by default ``1 / sqrt(D)``.
        window: an int: see key j from position i only where ``i - window < j``; or a pair
            ``(left, right)`` of how many keys to see beside one's own, -1 for all.
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2).
        alibi_slopes: ``float32[H]``; ``slope · distance`` is subtracted (arXiv:2108.12409).
        bias: ``[B|1, H|1, Sq|1, Sk]``, float, added to the logits; -inf hides a key. Dense only.
        sinks: ``float32[H]``, a logit per head that takes part in the softmax's denominator only.
        return_lse: also return the natural logarithm of that denominator.
        out: where to write the result, like `q`.

    Returns:
        ``out`` like `q`; or ``(out, lse)``, lse ``float32[B, Sq, H]`` or ``[Tq, H]``, -inf for a
        query that sees nothing.

    Raises:
        ValueError: for shapes, dtypes or lengths that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sides = (-1, 0 if causal else -1) if window is None else window_sides(window, causal)
    serve = _OP.serve(library.flash_attention, backend, q, k, v, alibi_slopes, bias, sinks)
    if bias is not None:
        bias = expanded(bias, q, k)
    return serve(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
        return_lse, out,
    )  # fmt: skip


def flash_attention_backward(
    do,
    q,
    k,
    v,
    out,
    lse,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    causal=False,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    bias=None,
    sinks=None,
    dlse=None,
    backend=None,
):
    """The gradients of `flash_attention`; where there is no kernel the reference serves.

    Args:
        do: like `q`, the gradient of the result.
        q, k, v: as they were, and all options.
        out, lse: what was returned.
        dlse: like `lse`, the gradient of that, or None where nothing depends on it.

    Returns:
        ``(dq, dk, dv, dbias, dsinks)`` of the shapes and dtypes of what they are gradients of, the
        last two None where there was none. The same bits every time.

    Raises:
        ValueError: for shapes, dtypes or lengths that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv, dlogits, delta = _BACKWARD.implementation(q, backend)(
        do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, scale,
        window_sides(window, causal), softcap, alibi_slopes, expanded(bias, q, k), bias is not None,
    )  # fmt: skip
    dbias = None if bias is None else dlogits.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias, None if sinks is None else sinks_gradient(sinks, lse, delta)


def _sequences(cu_seqlens, *tensors):
    """Of each tensor its sequences, a list; of None as many times None as the first has any."""
    if cu_seqlens is None:
        parts = [None if x is None else list(x) for x in tensors]
    else:
        lengths = cu_seqlens.long().diff().tolist()
        parts = [None if x is None else x.split(lengths) for x in tensors]
    return [[None] * len(parts[0]) if part is None else part for part in parts]


@_OP.register("reference")
def _reference(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out,
):  # fmt: skip
    sequences = *_sequences(cu_seqlens_q, q), *_sequences(cu_seqlens_k, k, v)
    results = [
        attend(
            *parts, scale=scale, sides=sides, softcap=softcap, alibi_slopes=alibi_slopes,
            bias=None if bias is None else bias[b], sinks=sinks,
        )
        for b, parts in enumerate(zip(*sequences, strict=True))
    ]  # fmt: skip
    join = torch.stack if cu_seqlens_q is None else torch.cat
    result = join([r for r, _ in results]).to(q.dtype) if results else q.clone()
    result = result if out is None else out.copy_(result)
    if not return_lse:
        return result
    return result, join([lse for _, lse in results]) if results else q[..., 0].clone()


@_BACKWARD.register("reference")
def _backward_reference(
    do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes,
    bias, needs_dbias,
):  # fmt: skip
    do_, q_, out_, lse_, dlse_ = _sequences(cu_seqlens_q, do, q, out, lse, dlse)
    k_, v_ = _sequences(cu_seqlens_k, k, v)
    results = [
        attend_backward(
            *parts, scale=scale, sides=sides, softcap=softcap, alibi_slopes=alibi_slopes,
            bias=None if bias is None else bias[b],
        )
        for b, parts in enumerate(zip(do_, q_, k_, v_, out_, lse_, dlse_, strict=True))
    ]  # fmt: skip
    if not results:
        return q.clone(), k.clone(), v.clone(), bias, lse.clone()
    join = torch.stack if cu_seqlens_q is None else torch.cat
    dq, dk, dv, dlogits, delta = zip(*results, strict=True)
    dq, dk, dv = (join(x).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, torch.stack(dlogits) if needs_dbias else None, join(delta)


@_OP.register("cpu")
def _cpu(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out,
):  # fmt: skip
    lse = empty(q.shape[:-1], torch.float32) if return_lse else None
    out = _C.flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, *sides, softcap or 0.0, alibi_slopes, bias,
        sinks, out, lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _device(backend):
    def run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
        return_lse, out,
    ):  # fmt: skip
        out = torch.empty_like(q) if out is None else out
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
        device.check_same(
            "flash_attention", q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            alibi_slopes=alibi_slopes, bias=bias, sinks=sinks, out=out,
        )  # fmt: skip
        device.library(backend).flash_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, scale, *sides, softcap or 0.0, alibi_slopes, bias,
            sinks, out, lse, device.stream(q),
        )  # fmt: skip
        return (out, lse) if return_lse else out

    return run


for _backend in ("cuda", "emulator"):
    _OP.register(_backend)(_device(_backend))


def _check_triton(
    op, tensors, of_rows, cu_seqlens_q, cu_seqlens_k, scale, softcap, alibi_slopes, bias, sinks
):  # fmt: skip
    q = tensors["q"]
    device.check_same(
        op, **{"first": q, **tensors, **of_rows}, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes, bias=bias, sinks=sinks,
    )  # fmt: skip
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k come together")
    queries, keys = "B Sq", "B Sk"
    if cu_seqlens_q is not None:
        queries, keys = "Tq", "Tk"
        if bias is not None:
            raise ValueError(
                f"{op}: bias: expected none with cu_seqlens, only a dense batch takes one"
            )
    shapes = dict.fromkeys(tensors, f"{queries} H D") | dict.fromkeys("kv", f"{keys} Hkv D")
    arguments = [
        (x, name, shapes[name], FLOATS if name == "q" else q.dtype) for name, x in tensors.items()
    ]
    arguments += [(x, name, f"{queries} H", torch.float32) for name, x in of_rows.items()]
    arguments += [
        (cu_seqlens_q, "cu_seqlens_q", "B+1", torch.int32),
        (cu_seqlens_k, "cu_seqlens_k", "B+1", torch.int32),
        (bias, "bias", "B H Sq Sk", FLOATS),
    ]
    check_triton(op, arguments, q, tensors["k"], scale, softcap, alibi_slopes, sinks)


@_OP.register("triton")
def _triton(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out,
):  # fmt: skip
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    tensors = {"q": q, "k": k, "v": v, "out": out}
    _check_triton(
        "flash_attention", tensors, {}, cu_seqlens_q, cu_seqlens_k, scale, softcap, alibi_slopes,
        bias, sinks,
    )  # fmt: skip
    if scale < 0:  # the kernel looks for the largest product
        q, scale = -q, -scale
    device.triton_kernels("flash_attention").flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, *sides, softcap or 0.0, alibi_slopes, bias,
        sinks, out, lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@_BACKWARD.register("triton")
def _backward_triton(
    do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes,
    bias, needs_dbias,
):  # fmt: skip
    do = do if do.stride(-1) == 1 else do.contiguous()
    _check_triton(
        "flash_attention_backward", {"q": q, "k": k, "v": v, "do": do, "out": out},
        {"lse": lse, "dlse": dlse}, cu_seqlens_q, cu_seqlens_k, scale, softcap, alibi_slopes, bias,
        None,
    )  # fmt: skip
    sign, dlogits = 1.0, None
    if scale < 0:
        q, scale, sign = -q, -scale, -1.0
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.zeros_like(lse)
    if needs_dbias:
        dlogits = torch.zeros(bias.shape, dtype=torch.float32, device=q.device)
    device.triton_kernels("flash_attention_backward").flash_attention_backward(
        do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, scale, *sides, softcap or 0.0,
        alibi_slopes, bias, dq, dk, dv, dlogits, delta,
    )  # fmt: skip
    return dq * sign if sign < 0 else dq, dk, dv, dlogits, delta
