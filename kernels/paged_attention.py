"""Decoding, and prompts in pieces: attention of new tokens over a paged cache.

The rows of a tile are the queries times the heads that share a KV head, so that keys and values are
read once for all of them. Sums start afresh each `SPLIT_KEYS` keys, counted from key 0, and are put
together in order: by the program itself, or by a second kernel where each split has a program
(flash-decoding). Which it is, and how many rows a tile has, is decided by shapes alone, never by
integers on the device; so a CUDA graph can replay it. A row's bits depend on neither: a tile of few
rows and one of many have as many warps, which share a block's keys and the head dim in one way, and
are too small for the instructions of four warps (wgmma, tcgen05).

The floor is the bytes of the keys and values: 20 us for 16 sequences of 8192 keys and one KV head
with D = 128 in halves at the 3.35 TB/s of an H100. Predicted there, not yet measured: 70 % of the
bandwidth for halves from 8192 keys at a batch of 16 with 8 KV heads on (two warps a program, three
blocks of 16 keys on their way, by shared memory 7 programs a multiprocessor), 50 % for bytes, which
take 6 instructions each to widen; prompts 150 TFLOP/s, and half of that from D = 128 on, limited by
shared memory, of which each fragment serves 32 and 16 rows.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.attention_tile import (
    INF,
    LOG2E,
    attend,
    capped,
    find_sequence,
    merge,
    odd_values,
    piece,
    with_sink,
)
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import knows_e4m3, launch, precision, target_of
from pyllm.kernels.primitives import dot, from_e4m3, round_to

SPLIT_KEYS = 512
_ENOUGH_PROGRAMS = 1024  # that keep any device busy
_MAX_SUMS = 1 << 27  # floats: half a gigabyte


@triton.jit
def _place(
    cu_q, context_lens, n_sequences, n_tokens, max_keys, left,
    GROUP: tl.constexpr, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of this program's tile: its sequence, first token and that one's length in tokens, first row,
    keys before the tokens, keys that some and that all rows see, and splits."""
    b, tile = find_sequence(cu_q, n_sequences, n_tokens, tl.program_id(0), GROUP, BLOCK_M)
    token, length = piece(cu_q, b, n_tokens)
    keys = tl.minimum(tl.maximum(tl.load(context_lens + b), 0), max_keys)
    past = keys - length
    row = tile * BLOCK_M
    first = row // GROUP
    last = tl.minimum((row + BLOCK_M - 1) // GROUP, length - 1)
    begin, full_end = 0, tl.minimum(tl.maximum(past + first + 1, 0), keys)
    end = tl.where(row < length * GROUP, tl.minimum(tl.maximum(past + last + 1, 0), keys), 0)
    if LEFT:
        begin = tl.minimum(tl.maximum(past + first - left, 0), end)
        full_end = begin
    split = begin // SPLIT
    return b, token, length, row, past, begin, full_end, end, split, tl.cdiv(end, SPLIT)


@triton.jit
def _finish(total, top, acc, out, at, inside, head, kv_head, sinks, v_scale):
    """Writes the rows whose sums these are."""
    if sinks is not None:
        total, top, acc = with_sink(total, top, acc, tl.load(sinks + head))
    acc = acc / tl.where(total != 0, total, 1.0)[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale + kv_head)
    tl.store(out + at, round_to(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _widen(x, dtype: tl.constexpr):
    """A tile of a cache in `dtype`, exactly; bytes without a sign are e4m3."""
    if x.dtype == tl.uint8:
        x = from_e4m3(x)
    return x.to(dtype)


@triton.jit
def _cache_block(
    table, key, keys, last_page, page_size, page_stride, key_stride, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Where the keys of a block are; pages outside of the cache become its last."""
    columns = tl.arange(0, BLOCK_N)
    if WHOLE:  # the block is in one page
        page = tl.load(table + key // page_size)
        row = key % page_size + columns
    else:
        page = tl.load(table + (key + columns) // page_size, mask=key + columns < keys, other=0)
        row = (key + columns) % page_size
    page = tl.where((page < 0) | (page > last_page), last_page, page)
    return page.to(tl.int64) * page_stride + row * key_stride


@triton.jit
def _attention(
    q, k_cache, v_cache, out, sums, tops, cu_q, page_table, context_lens, alibi_slopes, sinks,
    k_scale, v_scale, q_stride_t, q_stride_h, k_stride_p, k_stride_t, k_stride_h, k_stride_d,
    v_stride_p, v_stride_t, v_stride_h, v_stride_d, out_stride_t, out_stride_h, table_stride,
    n_sequences, n_tokens, last_page, max_keys, page_size, heads, scale, softcap, left,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, token, length, first_row, past, begin, full_end, end, split, splits = _place(
        cu_q, context_lens, n_sequences, n_tokens, max_keys, left, GROUP, LEFT, BLOCK_M, SPLIT
    )
    if sums is not None:  # one split
        split += tl.program_id(2)
        splits = tl.minimum(splits, split + 1)
        if split >= splits:
            return
    rows, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < length * GROUP)[:, None] & (d < D)[None, :]
    kv_head = tl.program_id(1)
    head = kv_head * GROUP + rows % GROUP
    tokens = (token + rows // GROUP).to(tl.int64)
    position = past + rows // GROUP
    q_at = (tokens * q_stride_t + head * q_stride_h)[:, None] + d[None, :]
    q_tile = tl.load(q + q_at, mask=inside, other=0.0)
    table = page_table + b.to(tl.int64) * table_stride
    k_cache += kv_head.to(tl.int64) * k_stride_h
    v_cache += kv_head.to(tl.int64) * v_stride_h
    if k_scale is not None:
        scale *= tl.load(k_scale + kv_head)
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head)

    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    odd = 0
    for now in range(split, splits):
        low = tl.maximum(now * SPLIT, begin // BLOCK_N * BLOCK_N)
        high = tl.minimum(end, (now + 1) * SPLIT)
        full = tl.maximum(tl.minimum(full_end, high) // BLOCK_N * BLOCK_N, low)
        split_total = tl.zeros([BLOCK_M], tl.float32)
        split_top = tl.full([BLOCK_M], -INF, tl.float32)
        split_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in tl.static_range(1 if LEFT else 0, 2):
            bounds = (low, full, high)
            for key in tl.range(
                low if LEFT else bounds[part], bounds[part + 1], BLOCK_N,
                num_stages=None if LEFT or part == 0 else 1,
            ):  # fmt: skip
                columns = key + tl.arange(0, BLOCK_N)
                there = (d < D)[None, :]
                if part == 1:
                    there &= (columns < end)[:, None]
                at = _cache_block(
                    table, key, end, last_page, page_size, k_stride_p, k_stride_t, BLOCK_N, WHOLE
                )
                k_tile = tl.load(
                    k_cache + at[:, None] + d[None, :] * k_stride_d, mask=there, other=0.0
                )
                at = _cache_block(
                    table, key, end, last_page, page_size, v_stride_p, v_stride_t, BLOCK_N, WHOLE
                )
                v_tile = tl.load(
                    v_cache + at[:, None] + d[None, :] * v_stride_d, mask=there, other=0.0
                )
                k_tile = _widen(k_tile, q_tile.dtype)
                s = dot(q_tile, tl.trans(k_tile), None, PRECISION) * scale
                distance = position[:, None] - columns[None, :]
                if SOFTCAP:
                    s, _ = capped(s, softcap)
                if alibi_slopes is not None:
                    s = tl.fma(tl.abs(distance.to(tl.float32)), -slopes[:, None], s)
                sees = distance >= 0
                if LEFT:
                    sees &= distance <= left
                split_total, split_top, split_acc, odd = attend(
                    split_total, split_top, split_acc, s, sees, _widen(v_tile, q_tile.dtype), odd,
                    LOG2E, part == 1, PRECISION,
                )  # fmt: skip
        if sums is None:
            total, top, acc = merge(total, top, acc, split_total, split_top, split_acc)
        else:
            total, top, acc = split_total, split_top, split_acc

    if sums is None:
        to = out
        at = (tokens * out_stride_t + head * out_stride_h)[:, None] + d[None, :]
        _finish(total, top, acc, out, at, inside, head, kv_head, sinks, v_scale)
    else:
        to = sums
        at = (tokens * heads + head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(tops + 2 * at, total, mask=rows < length * GROUP)
        tl.store(tops + 2 * at + 1, top, mask=rows < length * GROUP)
        at = at[:, None] * D + d[None, :]
        tl.store(sums + at, acc, mask=inside)
    if odd > 0:
        tl.debug_barrier()  # what follows may read these in other threads
        low = tl.maximum(split * SPLIT, tl.where(LEFT, begin, full_end) // BLOCK_N * BLOCK_N)
        for key in tl.range(low, tl.minimum(end, splits * SPLIT), BLOCK_N, num_stages=1):
            columns = key + tl.arange(0, BLOCK_N)
            there = (columns < end)[:, None] & (d < D)[None, :]
            of_keys = _cache_block(
                table, key, end, last_page, page_size, v_stride_p, v_stride_t, BLOCK_N, WHOLE
            )
            v_tile = tl.load(
                v_cache + of_keys[:, None] + d[None, :] * v_stride_d, mask=there, other=0.0
            )
            distance = position[:, None] - columns[None, :]
            sees = distance >= 0
            if LEFT:
                sees &= distance <= left
            result = tl.load(to + at, mask=inside, other=0.0)
            result += odd_values(sees, _widen(v_tile, q_tile.dtype)).to(result.dtype)
            tl.store(to + at, result, mask=inside)


@triton.jit
def _combine(
    out, sums, tops, cu_q, context_lens, sinks, v_scale, out_stride_t, out_stride_h,
    n_sequences, n_tokens, max_keys, heads, left, slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Puts the sums of the splits of a tile together, in order."""
    _, token, length, first_row, _, _, _, _, split, splits = _place(
        cu_q, context_lens, n_sequences, n_tokens, max_keys, left, GROUP, LEFT, BLOCK_M, SPLIT
    )
    rows, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    here = rows < length * GROUP
    inside = here[:, None] & (d < D)[None, :]
    kv_head = tl.program_id(1)
    head = kv_head * GROUP + rows % GROUP
    tokens = (token + rows // GROUP).to(tl.int64)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(splits - split):
        at = (tokens * heads + head) * slots + slot
        next_total = tl.load(tops + 2 * at, mask=here, other=0.0)
        next_top = tl.load(tops + 2 * at + 1, mask=here, other=-INF)
        next_acc = tl.load(sums + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        total, top, acc = merge(total, top, acc, next_total, next_top, next_acc)
    at = (tokens * out_stride_t + head * out_stride_h)[:, None] + d[None, :]
    _finish(total, top, acc, out, at, inside, head, kv_head, sinks, v_scale)


def paged_attention(
    q, k_cache, v_cache, cu_q, page_table, context_lens, scale, left, softcap, alibi_slopes, sinks,
    k_scale, v_scale, out,
):  # fmt: skip
    """Writes `out`; see `pyllm.ops.paged_attention`. Allocates the sums of the splits."""
    (tokens, heads, dim), (pages, page_size, kv_heads, _) = q.shape, k_cache.shape
    batch, group, target = len(page_table), heads // kv_heads, target_of(q.device)
    if tokens == 0 or batch == 0:
        return
    if k_cache.dtype == torch.float8_e4m3fn and not knows_e4m3(target):
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    max_keys = page_table.shape[1] * page_size if pages else 0
    few = "16 rows" if tokens * group <= 32 * batch else "32 rows"
    tile = configuration("paged_attention", q.device, q.dtype, dim, few)
    rows = tile["BLOCK_M"]
    grid = tokens * group // rows + batch, kv_heads
    splits = max(1, triton.cdiv(max_keys, SPLIT_KEYS))
    sums = tops = None
    if grid[0] * kv_heads < _ENOUGH_PROGRAMS and splits > 1:
        n_sums = tokens * heads * splits
        if n_sums * dim <= _MAX_SUMS:
            sums = q.new_empty(n_sums * dim, dtype=torch.float32)
            tops = q.new_empty(2 * n_sums, dtype=torch.float32)
    common = {
        "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "GROUP": group,
        "BLOCK_M": rows, "SPLIT": SPLIT_KEYS, "LEFT": left >= 0,
        "num_warps": tile["num_warps"],
    }  # fmt: skip
    keys = tile["BLOCK_N"]
    hip = {"matrix_instr_nonkdim": 16} if target.backend == "hip" else {}
    launch(
        _attention, (*grid, splits if sums is not None else 1), q, k_cache, v_cache, out, sums,
        tops, cu_q, page_table, context_lens, alibi_slopes, sinks, k_scale, v_scale,
        *q.stride()[:2], *k_cache.stride(), *v_cache.stride(), *out.stride()[:2],
        page_table.stride(0), batch, tokens, pages - 1, max_keys, page_size, heads, scale, softcap,
        left, BLOCK_N=keys, WHOLE=page_size % keys == 0, SOFTCAP=softcap != 0,
        PRECISION=precision(q.dtype, target), num_stages=tile["num_stages"], **common, **hip,
    )  # fmt: skip
    if sums is not None:
        launch(
            _combine, grid, out, sums, tops, cu_q, context_lens, sinks, v_scale,
            *out.stride()[:2], batch, tokens, max_keys, heads, left, splits, **common,
        )  # fmt: skip
