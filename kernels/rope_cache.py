"""Rotary embedding, and the write into the paged cache. Source: pyllm/ops/rope_cache.py.

Floor: q, k and v read and written once. On an H100 (3.35 TB/s) 8192 tokens of 32 + 2 * 8 heads of
128 bfloat16 are 201 MB: 60 us, 75 us at the 80 % that we expect; a decoding step of 32 sequences
has 0.8 MB, and costs what a launch does. Predicted, not measured.

- A program has one token and up to eight heads; programs of q come first, then those of k, then v.
- Products are not fused with sums: the roundings are those of PyTorch and of the CPU kernel.
- The sequence of a token is how many sequences end at or before it: no host reads anything.
"""

import triton
import triton.language as tl
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import launch
from pyllm.kernels.primitives import round_to


@triton.jit
def _rotate(
    x, out, step, cos_sin, live, half, width,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads that begin at x [HEADS, 1], rotated and written to `out`, whose elements lie `step`
    apart. All is read before any is written, so out may be x."""
    to: tl.constexpr = out.dtype.element_ty
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        kept = live & (rest < width)
        r = tl.load(x + rest, mask=kept, other=0.0).to(tl.float32)
    if HALF > 0:
        i = tl.arange(0, HALF)[None, :]
        first = 2 * i if INTERLEAVED else i
        second = 2 * i + 1 if INTERLEAVED else i + half
        inside = live & (i < half)
        a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
        cosine = tl.load(cos_sin + i, mask=i < half, other=0.0)
        sine = tl.load(cos_sin + half + i, mask=i < half, other=0.0)
        tl.debug_barrier()
        tl.store(out + first * step, round_to(a * cosine - b * sine, to), mask=inside)
        tl.store(out + second * step, round_to(b * cosine + a * sine, to), mask=inside)
    if REST > 0:
        tl.store(out + rest * step, round_to(r, to), mask=kept)


@triton.jit
def _slot(
    token, position, cu_seqlens, page_table, page_stride, batch, max_pages, pages, page_size,
    BATCH: tl.constexpr,
):  # fmt: skip
    """The page and the place in it of a token, and whether they exist."""
    b = tl.arange(0, BATCH)
    ends = tl.load(cu_seqlens + 1 + b, mask=b < batch, other=2147483647)
    sequence = tl.sum((ends <= token).to(tl.int32), 0)
    index = position // page_size
    exists = (sequence < batch) & (position >= 0) & (index < max_pages)
    at = page_table + sequence.to(tl.int64) * page_stride + index
    page = tl.load(at, mask=exists, other=-1)
    return page.to(tl.int64), position % page_size, (page >= 0) & (page < pages)


@triton.jit
def rope_cache_kernel(
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens, page_table, out,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, angle_stride,
    k_page, k_slot, k_cache_head, k_step, v_page, v_slot, v_cache_head, page_stride,
    heads, kv_heads, half, width, angles, batch, max_pages, pages, page_size,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WIDTH: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    part = tl.program_id(1)
    q_parts = tl.cdiv(heads, HEADS)
    kv_parts = tl.cdiv(kv_heads, HEADS)
    position = tl.load(positions + token)
    angle = tl.minimum(tl.maximum(position, 0), angles - 1)
    cos_sin += angle.to(tl.int64) * angle_stride
    row = token.to(tl.int64)
    block = tl.arange(0, HEADS)[:, None]
    if part < q_parts:
        q_at = part * HEADS + block
        _rotate(
            q + row * q_stride + q_at * q_head, out + row * out_stride + q_at * out_head, 1,
            cos_sin, q_at < heads, half, width, INTERLEAVED, HALF, REST,
        )  # fmt: skip
    else:
        page, index, exists = _slot(
            token, position, cu_seqlens, page_table, page_stride, batch, max_pages, pages,
            page_size, BATCH,
        )  # fmt: skip
        written = tl.where(exists, kv_heads, 0)
        if part < q_parts + kv_parts:
            k_at = (part - q_parts) * HEADS + block
            _rotate(
                k + row * k_stride + k_at * k_head,
                k_cache + page * k_page + index * k_slot + k_at * k_cache_head, k_step,
                cos_sin, k_at < written, half, width, INTERLEAVED, HALF, REST,
            )  # fmt: skip
        else:
            v_at = (part - q_parts - kv_parts) * HEADS + block
            _rotate(
                v + row * v_stride + v_at * v_head,
                v_cache + page * v_page + index * v_slot + v_at * v_cache_head, 1,
                cos_sin, v_at < written, 0, width, False, 0, WIDTH,
            )  # fmt: skip


def rope_cache(
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out
):
    """Tensors as the op describes them; `positions` and `cu_seqlens_q` are contiguous."""
    tokens, heads, width = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    pages, page_size = k_cache.shape[:2]
    batch, max_pages = page_table.shape
    if tokens == 0:
        return
    power = triton.next_power_of_2
    chosen = configuration("rope_cache", q.device, q.dtype, width)
    a_part = chosen["HEADS"]
    parts = triton.cdiv(heads, a_part) + 2 * triton.cdiv(kv_heads, a_part)
    launch(
        rope_cache_kernel, (tokens, parts),
        q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], cos_sin.stride(0),
        *k_cache.stride(), *v_cache.stride()[:3], page_table.stride(0),
        heads, kv_heads, half, width, cos_sin.shape[0], batch, max_pages, pages, page_size,
        INTERLEAVED=interleaved, HALF=power(half) if half else 0,
        REST=power(width - 2 * half) if width > 2 * half else 0, WIDTH=power(width),
        BATCH=power(max(batch, 1)), enable_fp_fusion=False, **chosen,
    )  # fmt: skip
