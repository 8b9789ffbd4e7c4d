"""Attention over a paged cache (Kwon et al., 2023, arXiv:2309.06180)."""

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops._attention import FLOATS, attend, check_triton, window_sides
from pyllm.ops.registry import Op

_OP = Op("paged_attention")


def paged_attention(
    q,
    k_cache,
    v_cache,
    *,
    cu_seqlens_q,
    page_table,
    context_lens,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    k_scale=None,
    v_scale=None,
    out=None,
    backend=None,
):
    """``softmax(scale · q kᵀ) v`` of new tokens over their sequences' keys and values in the cache.

    The new tokens are the last of their sequences, and their keys and values are in the cache
    already. Token i of n new ones sees the first ``context_lens[b] - n + i + 1`` keys. The result
    for a token has the same bits however the batch or the prompt is cut.

    Args:
        q: ``[T, H, D]`` float32, bfloat16 or float16, the sequences end to end; D is 1 to 256;
            only the last dimension must be contiguous.
        k_cache, v_cache: ``[pages, page_size, Hkv, D]``; H is a multiple of Hkv, and query heads
            ``h * H / Hkv`` and up share KV head h. On a CPU float32, bfloat16, float16 or int8, and
            the keys of a page may also lie side by side, so that ``k_cache.stride(1) == 1``; that
            is faster. On a device of q's dtype, int8 or float8_e4m3fn, in rows that begin on
            multiples of 16 bytes.
        cu_seqlens_q: ``int32[B + 1]``: sequence b owns tokens ``cu_seqlens_q[b]`` up to
            ``cu_seqlens_q[b + 1]``.
        page_table: ``int32[B, max_pages]``: key j of sequence b is
            ``k_cache[page_table[b, j // page_size], j % page_size]``.
        context_lens: ``int32[B]``, the keys of each sequence, the new tokens' included.
        scale: by default ``1 / sqrt(D)``.
        window: see only the last `window` keys, the token's own included; or a pair
            ``(left, right)`` of how many keys to see beside it, -1 for all.
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2).
        alibi_slopes: ``float32[H]``; ``slope · distance`` is subtracted (arXiv:2108.12409).
        sinks: ``float32[H]``, a logit per head that takes part in the softmax's denominator only.
        k_scale, v_scale: float or ``float32[Hkv]``, factors of the stored keys and values.
        out: where to write the result, like `q`.

    Returns:
        ``[T, H, D]`` in q's dtype; 0 for a token that sees no key.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, and on a CPU for lengths or pages
            outside of the tables. On a device, and when a captured plan is replayed, nobody looks
            at the integers first: the kernel clamps them, so that no memory outside of the tensors
            is touched, and the result is of other keys.
        BackendError: if `backend` cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (
        q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale,
        window_sides(window, causal=True), softcap, alibi_slopes, sinks,
        _per_head(k_scale, k_cache), _per_head(v_scale, v_cache), out,
    )  # fmt: skip
    return _OP.serve(library.paged_attention, backend, q, k_cache, v_cache)(*arguments)


def _per_head(scale, cache):
    if not isinstance(scale, float | int):
        return scale
    return torch.full((cache.shape[2],), scale, dtype=torch.float32, device=cache.device)


@_OP.register("reference")
def _reference(
    q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides, softcap,
    alibi_slopes, sinks, k_scale, v_scale, out,
):  # fmt: skip
    results = []
    for b, n_keys in enumerate(context_lens.tolist()):
        page_size = k_cache.shape[1]
        at = torch.arange(n_keys, device=q.device)
        pages = page_table[b].long()[at // page_size]
        k, v = k_cache[pages, at % page_size], v_cache[pages, at % page_size]
        k = k if k_scale is None else k.float() * k_scale[:, None]
        v = v if v_scale is None else v.float() * v_scale[:, None]
        result, _ = attend(
            q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]], k, v, scale=scale, sides=sides,
            softcap=softcap, alibi_slopes=alibi_slopes, bias=None, sinks=sinks,
        )  # fmt: skip
        results.append(result.to(q.dtype))
    result = torch.cat(results) if results else q.clone()
    return result if out is None else out.copy_(result)


@_OP.register("cpu")
def _cpu(
    q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides, softcap,
    alibi_slopes, sinks, k_scale, v_scale, out,
):  # fmt: skip
    return _C.paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides[0],
        softcap or 0.0, alibi_slopes, sinks, k_scale, v_scale, out,
    )  # fmt: skip


def _device(backend):
    def run(
        q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides, softcap,
        alibi_slopes, sinks, k_scale, v_scale, out,
    ):  # fmt: skip
        library = device.library(backend)
        out = torch.empty_like(q) if out is None else out
        partials = None
        if q.ndim == 3 and k_cache.ndim == 4 and page_table.ndim == 2:
            batch, max_pages = page_table.shape
            size = library.paged_attention_partials(
                q.shape[0], batch, q.shape[1], k_cache.shape[2], q.shape[2],
                max_pages * k_cache.shape[1],
            )  # fmt: skip
            partials = q.new_empty((size,), dtype=torch.float32) if size else None
        device.check_same(
            "paged_attention", q, k_cache=k_cache, v_cache=v_cache, cu_seqlens_q=cu_seqlens_q,
            page_table=page_table, context_lens=context_lens, alibi_slopes=alibi_slopes,
            sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
        )  # fmt: skip
        library.paged_attention(
            q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides[0],
            softcap or 0.0, alibi_slopes, sinks, k_scale, v_scale, out, partials, device.stream(q),
        )  # fmt: skip
        return out

    return run


for _backend in ("cuda", "emulator"):
    _OP.register(_backend)(_device(_backend))


@_OP.register("triton")
def _triton(
    q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides, softcap,
    alibi_slopes, sinks, k_scale, v_scale, out,
):  # fmt: skip
    out = torch.empty_like(q) if out is None else out
    device.check_same(
        "paged_attention", q, k_cache=k_cache, v_cache=v_cache, cu_seqlens_q=cu_seqlens_q,
        page_table=page_table, context_lens=context_lens, alibi_slopes=alibi_slopes,
        sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    caches = (q.dtype, torch.int8, torch.float8_e4m3fn)
    if q.dtype == torch.float32:
        caches = (*caches, torch.float16, torch.bfloat16)
    i32, f32 = torch.int32, torch.float32
    # The keys of a page may lie side by side.
    by_key = k_cache.ndim == 4 and k_cache.stride(3) != 1 and k_cache.stride(1) == 1
    keys = k_cache.transpose(1, 3) if by_key else k_cache
    arguments = [
        (q, "q", "T H D", FLOATS), (out, "out", "T H D", q.dtype),
        (keys, "k_cache", "pages D Hkv page_size" if by_key else "pages page_size Hkv D", caches),
        (v_cache, "v_cache", "pages page_size Hkv D", k_cache.dtype),
        (page_table, "page_table", "B max_pages", i32), (context_lens, "context_lens", "B", i32),
        (cu_seqlens_q, "cu_seqlens_q", "B+1", i32), (k_scale, "k_scale", "Hkv", f32),
        (v_scale, "v_scale", "Hkv", f32),
    ]  # fmt: skip
    check_triton("paged_attention", arguments, q, k_cache, scale, softcap, alibi_slopes, sinks)
    if len(cu_seqlens_q) != len(page_table) + 1:
        raise ValueError(
            f"paged_attention: cu_seqlens_q: expected B + 1 = {len(page_table) + 1} entries, got "
            f"{len(cu_seqlens_q)}"
        )
    device.triton_kernels("paged_attention").paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, sides[0],
        softcap or 0.0, alibi_slopes, sinks, k_scale, v_scale, out,
    )  # fmt: skip
    return out
