"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and the write into the cache."""

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops._norm import FLOATS
from pyllm.ops.alloc import empty_like
from pyllm.ops.registry import Op

_OP = Op("rope_cache")


def rope_cache(
    q,
    k,
    v,
    cos_sin,
    positions,
    k_cache,
    v_cache,
    *,
    cu_seqlens_q,
    page_table,
    interleaved=False,
    out=None,
    backend=None,
):
    """Rotates q and k by their positions and writes the rotated k, and v, into the paged cache.

    Each pair ``(a, b)`` of a head's first R elements becomes ``(a cos - b sin, b cos + a sin)``,
    computed in float32 and rounded once; the other ``D - R`` elements stay as they are.

    Args:
        q: ``[T, H, D]`` float32, bfloat16 or float16. The tokens of all sequences lie end to end.
        k, v: ``[T, Hkv, D]`` of q's dtype. Only the last dimension must be contiguous, so they may
            be views of one fused projection.
        cos_sin: ``[P, R]`` float32, R even and at most D: for each position the cosines of the
            R / 2 angles, then their sines. Scaled variants of the embedding differ only in here.
        positions: ``int32[T]``, each token's index in its own sequence: it picks the angles and the
            place in the cache, ``[page_table[b, position // page_size], position % page_size]``.
        k_cache, v_cache: ``[pages, page_size, Hkv, D]`` float32, bfloat16 or float16; the keys of a
            page may lie side by side (``k_cache.stride(1) == 1``).
        cu_seqlens_q: ``int32[B + 1]``: sequence b owns tokens ``cu_seqlens_q[b]`` up to
            ``cu_seqlens_q[b + 1]``.
        page_table: ``int32[B, max_pages]``, the pages of each sequence in order.
        interleaved: pairs are ``(2i, 2i + 1)`` if true (GPT-J, and Meta's Llama files), else
            ``(i, i + R / 2)`` (GPT-NeoX, and Llama as Hugging Face stores it).
        out: where to write the rotated q; may be `q` itself.

    Returns:
        The rotated q, ``[T, H, D]``.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, and for positions, lengths or
            pages outside the tables. (The integers are not looked at while a plan is captured, nor
            on a GPU. There, and in a replay, a token whose place in the cache does not exist is not
            written.)
        BackendError: if `backend` cannot serve.
    """
    return _OP.serve(library.rope_cache, backend, q, k, v, cos_sin, k_cache, v_cache)(
        q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
    )


@_OP.register("reference")
def _reference(
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
):
    page_size = k_cache.shape[1]
    cosine, sine = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x):
        exact = x.double() if x.dtype == torch.float64 else x.float()
        first, rest = exact[..., : cos_sin.shape[1]], exact[..., cos_sin.shape[1] :]
        if interleaved:
            a, b = first[..., 0::2], first[..., 1::2]
        else:
            a, b = first.chunk(2, dim=-1)
        pair = (a * cosine - b * sine, b * cosine + a * sine)
        first = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat((first, rest), -1)

    lengths = cu_seqlens_q.long().diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    pages = page_table.long()[sequence, positions.long() // page_size]
    k_cache[pages, positions.long() % page_size] = rotate(k).to(k_cache.dtype)
    v_cache[pages, positions.long() % page_size] = v.to(v_cache.dtype)
    rotated = rotate(q).to(q.dtype)
    return rotated if out is None else out.copy_(rotated)


@_OP.register("cpu")
def _cpu(q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out):
    out = empty_like(q) if out is None else out
    _C.rope_cache(
        q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
    )
    return out


@_OP.register("triton")
def _triton(
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
):
    out = empty_like(q) if out is None else out
    device.check_same(
        "rope_cache", q, k=k, v=v, cos_sin=cos_sin, positions=positions, k_cache=k_cache,
        v_cache=v_cache, cu_seqlens_q=cu_seqlens_q, page_table=page_table, out=out,
    )  # fmt: skip
    keys = k_cache.transpose(1, 3) if k_cache.ndim == 4 and k_cache.stride(1) == 1 else k_cache
    side_by_side = keys is not k_cache
    _C.check("rope_cache", [
        (q, "q", "T H D", FLOATS), (k, "k", "T Hkv D", q.dtype), (v, "v", "T Hkv D", q.dtype),
        (cos_sin, "cos_sin", "P R", torch.float32), (positions, "positions", "T", torch.int32),
        (keys, "k_cache", "pages D Hkv page_size" if side_by_side else "pages page_size Hkv D",
         FLOATS),
        (v_cache, "v_cache", "pages page_size Hkv D", k_cache.dtype),
        (page_table, "page_table", "B max_pages", torch.int32),
        (cu_seqlens_q, "cu_seqlens_q", "_", torch.int32), (out, "out", "T H D", q.dtype),
    ])  # fmt: skip
    batch, rotary, width = page_table.shape[0], cos_sin.shape[1], q.shape[2]
    if len(cu_seqlens_q) != batch + 1:
        raise ValueError(
            f"rope_cache: cu_seqlens_q: expected B + 1 = {batch + 1} entries, "
            f"got {len(cu_seqlens_q)}"
        )
    if rotary % 2 or rotary > width:
        raise ValueError(
            f"rope_cache: cos_sin: expected an even width of at most D = {width}, got {rotary}"
        )
    if len(q) and (len(cos_sin) == 0 or v_cache.shape[1] == 0):
        raise ValueError("rope_cache: expected at least one position and a place for it, got none")
    device.triton_kernels("rope_cache").rope_cache(
        q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
    )
    return out
