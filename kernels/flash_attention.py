"""Exact attention without the matrix of scores, forward and backward.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691): a program keeps the sums of a tile of queries and
streams the keys past it. Backward, one kernel sums dq over keys and writes the rows' sums of
``do * out`` for the other, which sums dk and dv over the queries of all heads that share them:
logits are formed twice, so that nothing is added by atomics and the same bits come out every time.

The floor is 4 D operations for each pair of a query and a key that it sees, and 10 D backward (14 D
as done here): causal, D = 128, 16 heads, 16,384 tokens: 1.1 ms and 2.8 ms at the 989 TFLOP/s of an
H100. Predicted there, not yet measured: 450 TFLOP/s forward (wgmma from registers, tiles of
128 x 128, no overlap of softmax with products but that of two programs a multiprocessor), 300
backward counted as 10 D.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.attention_tile import (
    INF,
    LN2,
    LOG2E,
    attend,
    capped,
    find_sequence,
    odd_values,
    piece,
    with_sink,
)
from pyllm.kernels.launch import configuration, launch, precision, target_of
from pyllm.kernels.primitives import dot, round_to


@triton.jit
def _place(cu_q, cu_k, n_sequences, n_queries, n_keys, tile, BLOCK: tl.constexpr):
    """Of tile `tile`: its sequence, index there, and where its queries and keys begin and end."""
    if cu_q is None:
        tiles = tl.cdiv(n_queries, BLOCK)
        zero = tile * 0  # a tensor, as those of a ragged batch
        place = tile // tiles, tile % tiles, zero, n_queries, zero, n_keys
    else:
        b, tile = find_sequence(cu_q, n_sequences, n_queries, tile, 1, BLOCK)
        first_query, queries = piece(cu_q, b, n_queries)
        first_key, keys = piece(cu_k, b, n_keys)
        place = b, tile, first_query, queries, first_key, keys
    return place


@triton.jit
def _row(b, token, head, heads, n_queries, cu_q):
    """Where the number of a query is in a contiguous tensor that has one for each head."""
    if cu_q is None:
        token += b.to(tl.int64) * n_queries
    return token * heads + head


@triton.jit
def _logits(
    s, rows, columns, queries, keys, bias, bias_stride_q, bias_stride_k, slope, scale, softcap,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of products, in the form of which the caller knows the factor; and the derivative."""
    derivative = 1.0
    if not PLAIN:
        s = s * scale
        if SOFTCAP:
            s, derivative = capped(s, softcap)
        if slope is not None:
            distance = (rows + (keys - queries) - columns).to(tl.float32)
            s = tl.fma(tl.abs(distance), tl.zeros_like(s) - slope, s)
        if bias is not None:
            at = bias + rows.to(tl.int64) * bias_stride_q + columns.to(tl.int64) * bias_stride_k
            s += tl.load(at, mask=(rows < queries) & (columns < keys), other=0.0).to(tl.float32)
    return s, derivative


@triton.jit
def _sees(rows, columns, queries, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys a query sees."""
    distance = rows + (keys - queries) - columns
    sees = columns < keys
    if LEFT:
        sees &= distance <= left
    if RIGHT:
        sees &= -distance <= right
    return sees


@triton.jit
def _key_range(
    first, queries, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the queries from `first` on: the keys that some see, and those that all see between."""
    begin, full_begin, full_end, end = 0, 0, keys, keys
    position = first + keys - queries
    last = position + tl.minimum(BLOCK_M, queries - first) - 1
    if LEFT:
        begin = tl.maximum(position - left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        end = tl.minimum(keys, tl.maximum(last + right + 1, 0))
        full_end = tl.minimum(keys, tl.maximum(position + right + 1, 0))
    end = tl.cdiv(end, BLOCK_N) * BLOCK_N
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _forward(
    q, k, v, out, lse, cu_q, cu_k, alibi_slopes, bias, sinks,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, out_stride_b, out_stride_t, out_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    n_sequences, n_queries, n_keys, heads, group, scale, softcap, left, right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PLAIN: tl.constexpr = not SOFTCAP and alibi_slopes is None and bias is None
    head = tl.program_id(1)
    # Under a causal mask the last tiles are the longest: they come first.
    b, tile, first_query, queries, first_key, keys = _place(
        cu_q, cu_k, n_sequences, n_queries, n_keys, tl.num_programs(0) - 1 - tl.program_id(0),
        BLOCK_M,
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= queries:
        return
    rows, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = (first_query + rows).to(tl.int64)
    here, wide = rows < queries, d < D
    q += b.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_tile = tl.load(
        q + token[:, None] * q_stride_t + d[None, :],
        mask=here[:, None] & wide[None, :], other=0.0,
    )  # fmt: skip
    kv_head = (head // group).to(tl.int64)
    k += b.to(tl.int64) * k_stride_b + kv_head * k_stride_h
    v += b.to(tl.int64) * v_stride_b + kv_head * v_stride_h
    k_block = tl.arange(0, BLOCK_N)[:, None] * k_stride_t + d[None, :]
    v_block = tl.arange(0, BLOCK_N)[:, None] * v_stride_t + d[None, :]
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head)
    if bias is not None:
        bias += b.to(tl.int64) * bias_stride_b + head.to(tl.int64) * bias_stride_h

    factor = scale * LOG2E if PLAIN else LOG2E
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = _key_range(
        first, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    odd = 0
    for part in tl.static_range(0 if LEFT else 1, 3):
        bounds = (begin, full_begin, full_end, end)
        for key in tl.range(
            bounds[part], bounds[part + 1], BLOCK_N, num_stages=None if part == 1 else 1
        ):
            columns = key + tl.arange(0, BLOCK_N)
            there = wide[None, :]
            if part != 1:
                there &= columns[:, None] < keys
            at = (first_key + key).to(tl.int64)
            k_tile = tl.load(k + at * k_stride_t + k_block, mask=there, other=0.0)
            s = dot(q_tile, tl.trans(k_tile), None, PRECISION)
            s, _ = _logits(
                s, rows[:, None], columns[None, :], queries, keys, bias, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            v_tile = tl.load(v + at * v_stride_t + v_block, mask=there, other=0.0)
            sees = _sees(rows[:, None], columns[None, :], queries, keys, left, right, LEFT, RIGHT)
            total, top, acc, odd = attend(
                total, top, acc, s, sees, v_tile, odd, factor, part != 1, PRECISION
            )
    if sinks is not None:
        total, top, acc = with_sink(total, top, acc, tl.load(sinks + head))
    some = total != 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    out += b.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_tile = out + token[:, None] * out_stride_t + d[None, :]
    inside = here[:, None] & wide[None, :]
    tl.store(out_tile, round_to(acc, out.dtype.element_ty), mask=inside)
    if lse is not None:
        value = tl.where(some, (top + tl.log2(total)) * LN2, -INF)
        tl.store(lse + _row(b, token, head, heads, n_queries, cu_q), value, mask=here)
    if odd > 0:
        tl.debug_barrier()  # what follows may read it in other threads
        for part in tl.static_range(0 if LEFT else 2, 3, 2):
            bounds = (begin, full_begin, full_end, end)
            for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N, num_stages=1):
                columns = key + tl.arange(0, BLOCK_N)
                at = (first_key + key).to(tl.int64) * v_stride_t
                there = wide[None, :] & (columns[:, None] < keys)
                v_tile = tl.load(v + at + v_block, mask=there, other=0.0)
                sees = _sees(
                    rows[:, None], columns[None, :], queries, keys, left, right, LEFT, RIGHT
                )
                result = tl.load(out_tile, mask=inside, other=0.0)
                result += odd_values(sees, v_tile).to(result.dtype)
                tl.store(out_tile, result, mask=inside)


@triton.jit
def _backward_q(
    do, q, k, v, out, lse, dlse, dq, dbias, delta, cu_q, cu_k, alibi_slopes, bias,
    do_stride_b, do_stride_t, do_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    out_stride_b, out_stride_t, out_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    n_sequences, n_queries, n_keys, heads, group, scale, softcap, left, right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, ``delta = sum(do * out) - dlse``, and dbias before it is reduced."""
    PLAIN: tl.constexpr = not SOFTCAP and alibi_slopes is None and bias is None
    head = tl.program_id(1)
    b, tile, first_query, queries, first_key, keys = _place(
        cu_q, cu_k, n_sequences, n_queries, n_keys, tl.num_programs(0) - 1 - tl.program_id(0),
        BLOCK_M,
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= queries:
        return
    rows, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = (first_query + rows).to(tl.int64)
    here, wide = rows < queries, d < D
    inside = here[:, None] & wide[None, :]
    b, kv_head = b.to(tl.int64), (head // group).to(tl.int64)
    q_at = b * q_stride_b + head.to(tl.int64) * q_stride_h
    do_at = b * do_stride_b + head.to(tl.int64) * do_stride_h
    out_at = b * out_stride_b + head.to(tl.int64) * out_stride_h
    q_tile = tl.load(q + q_at + token[:, None] * q_stride_t + d[None, :], mask=inside, other=0.0)
    do_tile = tl.load(
        do + do_at + token[:, None] * do_stride_t + d[None, :], mask=inside, other=0.0
    )
    out_tile = tl.load(
        out + out_at + token[:, None] * out_stride_t + d[None, :], mask=inside, other=0.0
    )
    row_at = _row(b, token, head, heads, n_queries, cu_q)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + row_at, mask=here, other=0.0)
    tl.store(delta + row_at, row_delta, mask=here)
    base = tl.load(lse + row_at, mask=here, other=INF) * LOG2E
    base = tl.where(base == -INF, INF, base)  # a row that sees nothing has no weights
    k += b * k_stride_b + kv_head * k_stride_h
    v += b * v_stride_b + kv_head * v_stride_h
    k_block = tl.arange(0, BLOCK_N)[:, None] * k_stride_t + d[None, :]
    v_block = tl.arange(0, BLOCK_N)[:, None] * v_stride_t + d[None, :]
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head)
    if bias is not None:
        bias += b * bias_stride_b + head.to(tl.int64) * bias_stride_h

    factor = scale * LOG2E if PLAIN else LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = _key_range(
        first, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    for part in tl.static_range(0 if LEFT else 1, 3):
        bounds = (begin, full_begin, full_end, end)
        for key in tl.range(
            bounds[part], bounds[part + 1], BLOCK_N, num_stages=None if part == 1 else 1
        ):
            columns = key + tl.arange(0, BLOCK_N)
            there = wide[None, :]
            if part != 1:
                there &= columns[:, None] < keys
            at = (first_key + key).to(tl.int64)
            k_tile = tl.load(k + at * k_stride_t + k_block, mask=there, other=0.0)
            v_tile = tl.load(v + at * v_stride_t + v_block, mask=there, other=0.0)
            s = dot(q_tile, tl.trans(k_tile), None, PRECISION)
            s, derivative = _logits(
                s, rows[:, None], columns[None, :], queries, keys, bias, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            if part != 1:
                sees = _sees(
                    rows[:, None], columns[None, :], queries, keys, left, right, LEFT, RIGHT
                )
                s = tl.where(sees, s, -INF)
            p = tl.exp2(tl.fma(s, factor, -base[:, None]))
            dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)
            ds = p * (dp - row_delta[:, None])
            if dbias is not None:
                at = (b * heads + head) * n_queries + rows
                at = at[:, None] * n_keys + columns[None, :]
                tl.store(dbias + at, ds, mask=here[:, None] & (columns[None, :] < keys))
            ds = round_to(ds * derivative, k_tile.dtype)
            acc = dot(ds, k_tile, acc, PRECISION)
    dq_tile = dq + row_at[:, None] * D + d[None, :]
    tl.store(dq_tile, round_to(acc * scale, dq.dtype.element_ty), mask=inside)


@triton.jit
def _query_range(
    key, queries, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries that see some of the keys from `key` on."""
    begin, end = 0, queries
    shift = keys - queries
    if RIGHT:
        begin = tl.maximum(key - right - shift, 0) // BLOCK_M * BLOCK_M
    if LEFT:
        end = tl.minimum(queries, tl.maximum(key + BLOCK_N + left - shift, 0))
    return begin, end


@triton.jit
def _backward_kv(
    do, q, k, v, lse, delta, dk, dv, cu_q, cu_k, alibi_slopes, bias,
    do_stride_b, do_stride_t, do_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    n_sequences, n_queries, n_keys, heads, group, scale, softcap, left, right,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, over the queries of its group's heads, one after another."""
    PLAIN: tl.constexpr = not SOFTCAP and alibi_slopes is None and bias is None
    kv_head = tl.program_id(1)
    b, tile, first_key, keys, first_query, queries = _place(
        cu_k, cu_q, n_sequences, n_keys, n_queries, tl.program_id(0), BLOCK_N
    )
    key = tile * BLOCK_N
    if key >= keys:
        return
    columns, d = key + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    token = (first_key + columns).to(tl.int64)
    there, wide = columns < keys, d < D
    inside = there[:, None] & wide[None, :]
    b = b.to(tl.int64)
    k_at = b * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_at = b * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    k_tile = tl.load(k + k_at + token[:, None] * k_stride_t + d[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + v_at + token[:, None] * v_stride_t + d[None, :], mask=inside, other=0.0)
    q_block = tl.arange(0, BLOCK_M)[:, None] * q_stride_t + d[None, :]
    do_block = tl.arange(0, BLOCK_M)[:, None] * do_stride_t + d[None, :]

    factor = scale * LOG2E if PLAIN else LOG2E
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = _query_range(key, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    for member in range(group):
        head = kv_head * group + member
        q_head = q + b * q_stride_b + head.to(tl.int64) * q_stride_h
        do_head = do + b * do_stride_b + head.to(tl.int64) * do_stride_h
        slope, bias_head = None, None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + head)
        if bias is not None:
            bias_head = bias + b * bias_stride_b + head.to(tl.int64) * bias_stride_h
        for first in tl.range(begin, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            here = rows < queries
            at = (first_query + first).to(tl.int64)
            q_tile = tl.load(
                q_head + at * q_stride_t + q_block, mask=here[:, None] & wide[None, :], other=0.0
            )
            do_tile = tl.load(
                do_head + at * do_stride_t + do_block,
                mask=here[:, None] & wide[None, :], other=0.0,
            )  # fmt: skip
            row_at = _row(b, (first_query + rows).to(tl.int64), head, heads, n_queries, cu_q)
            base = tl.load(lse + row_at, mask=here, other=INF) * LOG2E
            base = tl.where(base == -INF, INF, base)
            row_delta = tl.load(delta + row_at, mask=here, other=0.0)
            s = dot(k_tile, tl.trans(q_tile), None, PRECISION)
            s, derivative = _logits(
                s, rows[None, :], columns[:, None], queries, keys, bias_head, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            sees = _sees(rows[None, :], columns[:, None], queries, keys, left, right, LEFT, RIGHT)
            s = tl.where(sees, s, -INF)
            p = tl.exp2(tl.fma(s, factor, -base[None, :]))
            dv_sum = dot(round_to(p, do.dtype.element_ty), do_tile, dv_sum, PRECISION)  # fmt: skip
            dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)
            ds = round_to(p * (dp - row_delta[None, :]) * derivative, q_tile.dtype)
            dk_sum = dot(ds, q_tile, dk_sum, PRECISION)
    at = _row(b, token, kv_head, heads // group, n_keys, cu_k)[:, None] * D + d[None, :]
    tl.store(dk + at, round_to(dk_sum * scale, dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, round_to(dv_sum, dv.dtype.element_ty), mask=inside)


# By the head dim, rounded up: rows, keys, warps, stages of copies. Chosen by what they spill
# (bench/triton_code.py) on compute capability 8.0 and 9.0: nothing up to D = 128 without a window.
_WARP_GROUPS = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)}
_WARPS = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)}
_FLOATS = {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)}
_BACKWARD_HALVES = {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}
_BACKWARD_FLOATS = {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)}


def _tiles(q, backward):
    """The configuration for queries like `q`: by arch, dtype and head dim, so that these alone
    decide the bits."""
    target, dim = target_of(q.device), q.shape[-1]
    block = max(16, triton.next_power_of_2(dim))
    if q.dtype == torch.float32:
        table = _BACKWARD_FLOATS if backward else _FLOATS
    elif backward:
        table = _BACKWARD_HALVES
    elif target.backend == "cuda" and 90 <= target.arch < 120:
        table = _WARP_GROUPS
    else:
        table = _WARPS
    rows, keys, warps, stages = table[max(64, block)]
    default = {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    name = "flash_attention_backward" if backward else "flash_attention"
    chosen = configuration(name, f"{q.dtype} D={dim}", q.device, default)
    return {"D": dim, "BLOCK_D": block, "PRECISION": precision(q.dtype, target), **chosen}


def _strides(*tensors):
    """Of each tensor: the strides of sequences (none if ragged), tokens and heads."""
    return [n for x in tensors for n in (x.stride(0) if x.ndim == 4 else 0, *x.stride()[-3:-1])]


def _n_tiles(x, cu_seqlens, block):
    """How many tiles of `block` tokens `x` has at most; in a ragged batch see `find_sequence`."""
    if cu_seqlens is None:
        return x.shape[0] * triton.cdiv(x.shape[1], block)
    return x.shape[0] // block + cu_seqlens.numel() - 1


def _batch(q, k, cu_q):
    """Arguments of all kernels: sequences, queries, keys, heads, heads that share keys."""
    n_sequences = q.shape[0] if cu_q is None else cu_q.numel() - 1
    return n_sequences, q.shape[-3], k.shape[-3], q.shape[-2], q.shape[-2] // k.shape[-2]


def flash_attention(
    q, k, v, cu_q, cu_k, scale, left, right, softcap, alibi_slopes, bias, sinks, out, lse
):
    """Writes `out`, and `lse` if it is not None; see `pyllm.ops.flash_attention`."""
    tiles = _tiles(q, backward=False)
    grid = _n_tiles(q, cu_q, tiles["BLOCK_M"]), q.shape[-2]
    if grid[0] == 0:
        return
    launch(
        _forward, grid, q, k, v, out, lse, cu_q, cu_k, alibi_slopes, bias, sinks,
        *_strides(q, k, v, out), *_bias_strides(bias), *_batch(q, k, cu_q), scale, softcap, left,
        right, LEFT=left >= 0, RIGHT=right >= 0, SOFTCAP=softcap != 0, **tiles,
    )  # fmt: skip


def flash_attention_backward(
    do, q, k, v, out, lse, dlse, cu_q, cu_k, scale, left, right, softcap, alibi_slopes, bias,
    dq, dk, dv, dbias, delta,
):  # fmt: skip
    """Writes dq, dk, dv, delta, and dbias ``[B, H, Sq, Sk]`` where it is not 0; contiguous."""
    tiles = _tiles(q, backward=True)
    options = {"LEFT": left >= 0, "RIGHT": right >= 0, "SOFTCAP": softcap != 0, **tiles}
    common = (*_batch(q, k, cu_q), scale, softcap, left, right)
    grid = _n_tiles(q, cu_q, tiles["BLOCK_M"]), q.shape[-2]
    if grid[0]:
        launch(
            _backward_q, grid, do, q, k, v, out, lse, dlse, dq, dbias, delta, cu_q, cu_k,
            alibi_slopes, bias, *_strides(do, q, k, v, out), *_bias_strides(bias), *common,
            **options,
        )  # fmt: skip
    grid = _n_tiles(k, cu_k, tiles["BLOCK_N"]), k.shape[-2]
    if grid[0]:
        launch(
            _backward_kv, grid, do, q, k, v, lse, delta, dk, dv, cu_q, cu_k, alibi_slopes, bias,
            *_strides(do, q, k, v), *_bias_strides(bias), *common, **options,
        )  # fmt: skip


def _bias_strides(bias):
    return (0, 0, 0, 0) if bias is None else bias.stride()
