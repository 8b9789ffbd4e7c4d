"""Exact attention without the matrix of scores (Dao et al., 2022, arXiv:2205.14135)."""

import torch

from pyllm import _C
from pyllm.ops import device
from pyllm.ops._attention import attend, window_sides
from pyllm.ops.alloc import empty, empty_like
from pyllm.ops.registry import Op

_OP = Op("flash_attention")


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
    return _OP.implementation(q, backend)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale or q.shape[-1] ** -0.5,
        window_sides(window, causal), softcap, alibi_slopes, _expanded(bias, q, k), sinks,
        return_lse, out,
    )  # fmt: skip


def _expanded(bias, q, k):
    """`bias` as ``[B, H, Sq, Sk]`` without a copy, if it broadcasts to that."""
    if bias is None or q.ndim != 4 or k.ndim != 4:
        return bias
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"flash_attention: bias: expected what broadcasts to {list(shape)}, got "
            f"{list(bias.shape)}"
        ) from None


@_OP.register("reference")
def _reference(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out,
):  # fmt: skip
    if cu_seqlens_q is None:
        sequences = [(q[b], k[b], v[b], b) for b in range(q.shape[0])]
    else:
        split_q, split_k = cu_seqlens_q.long().diff().tolist(), cu_seqlens_k.long().diff().tolist()
        parts = zip(q.split(split_q), k.split(split_k), v.split(split_k), strict=True)
        sequences = [(*part, b) for b, part in enumerate(parts)]
    results = [
        attend(
            *parts, scale=scale, sides=sides, softcap=softcap, alibi_slopes=alibi_slopes,
            bias=None if bias is None else bias[b], sinks=sinks,
        )
        for *parts, b in sequences
    ]  # fmt: skip
    join = torch.stack if cu_seqlens_q is None else torch.cat
    result = join([r for r, _ in results]).to(q.dtype) if results else q.clone()
    result = result if out is None else out.copy_(result)
    if not return_lse:
        return result
    return result, join([lse for _, lse in results]) if results else q[..., 0].clone()


@_OP.register("cpu")
def _cpu(
    q, k, v, cu_seqlens_q, cu_seqlens_k, scale, sides, softcap, alibi_slopes, bias, sinks,
    return_lse, out,
):  # fmt: skip
    out = empty_like(q) if out is None else out
    lse = empty(q.shape[:-1], torch.float32) if return_lse else None
    partials = None
    if cu_seqlens_q is None and q.ndim == 4 and k.ndim == 4:
        batch, queries, heads, dim = q.shape
        size = _C.attention_partials(batch, batch * queries, heads, k.shape[2], dim, k.shape[1])
        partials = empty((size,), torch.float32) if size else None
    _C.flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, *sides, softcap or 0.0, alibi_slopes, bias,
        sinks, out, lse, partials,
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
