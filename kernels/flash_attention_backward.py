"""The gradients of attention.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one kernel sums dq over keys and writes the rows'
sums of ``do * out`` for the other, which sums dk and dv over the queries of all heads that share
them: logits are formed twice, so that nothing is added by atomics and the same bits come out every
time.

The floor is 10 D operations for each pair of a query and a key that it sees, 14 D as done here:
causal, D = 128, 16 heads, 16,384 tokens: 2.8 ms at the 989 TFLOP/s of an H100. Predicted there, not
yet measured: 300 TFLOP/s counted as 10 D.
"""

import triton
import triton.language as tl
from pyllm.kernels.attention_tile import INF, LOG2E
from pyllm.kernels.flash_attention import (
    batch,
    bias_strides,
    key_range,
    logits,
    n_tiles,
    place,
    row_number,
    strides,
    tiles,
    visible,
)
from pyllm.kernels.launch import launch
from pyllm.kernels.primitives import dot, round_to


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
    b, tile, first_query, queries, first_key, keys = place(
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
    row_at = row_number(b, token, head, heads, n_queries, cu_q)
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
    begin, full_begin, full_end, end = key_range(
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
            s, derivative = logits(
                s, rows[:, None], columns[None, :], queries, keys, bias, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            if part != 1:
                sees = visible(
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
    b, tile, first_key, keys, first_query, queries = place(
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
            row_at = row_number(b, (first_query + rows).to(tl.int64), head, heads, n_queries, cu_q)
            base = tl.load(lse + row_at, mask=here, other=INF) * LOG2E
            base = tl.where(base == -INF, INF, base)
            row_delta = tl.load(delta + row_at, mask=here, other=0.0)
            s = dot(k_tile, tl.trans(q_tile), None, PRECISION)
            s, derivative = logits(
                s, rows[None, :], columns[:, None], queries, keys, bias_head, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            sees = visible(rows[None, :], columns[:, None], queries, keys, left, right, LEFT, RIGHT)
            s = tl.where(sees, s, -INF)
            p = tl.exp2(tl.fma(s, factor, -base[None, :]))
            dv_sum = dot(round_to(p, do.dtype.element_ty), do_tile, dv_sum, PRECISION)  # fmt: skip
            dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)
            ds = round_to(p * (dp - row_delta[None, :]) * derivative, q_tile.dtype)
            dk_sum = dot(ds, q_tile, dk_sum, PRECISION)
    at = row_number(b, token, kv_head, heads // group, n_keys, cu_k)[:, None] * D + d[None, :]
    tl.store(dk + at, round_to(dk_sum * scale, dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, round_to(dv_sum, dv.dtype.element_ty), mask=inside)


def flash_attention_backward(
    do, q, k, v, out, lse, dlse, cu_q, cu_k, scale, left, right, softcap, alibi_slopes, bias,
    dq, dk, dv, dbias, delta,
):  # fmt: skip
    """Writes dq, dk, dv, delta, and dbias ``[B, H, Sq, Sk]`` where it is not 0; contiguous."""
    options = {"LEFT": left >= 0, "RIGHT": right >= 0, "SOFTCAP": softcap != 0}
    common = (*batch(q, k, cu_q), scale, softcap, left, right)
    tile = tiles("flash_attention_backward_q", q, left, softcap, alibi_slopes, bias)
    grid = n_tiles(q, cu_q, tile["BLOCK_M"]), q.shape[-2]
    if grid[0]:
        launch(
            _backward_q, grid, do, q, k, v, out, lse, dlse, dq, dbias, delta, cu_q, cu_k,
            alibi_slopes, bias, *strides(do, q, k, v, out), *bias_strides(bias), *common,
            **options, **tile,
        )  # fmt: skip
    tile = tiles("flash_attention_backward_kv", q, left, softcap, alibi_slopes, bias)
    grid = n_tiles(k, cu_k, tile["BLOCK_N"]), k.shape[-2]
    if grid[0]:
        launch(
            _backward_kv, grid, do, q, k, v, lse, delta, dk, dv, cu_q, cu_k, alibi_slopes, bias,
            *strides(do, q, k, v), *bias_strides(bias), *common, **options,
            **tile,
        )  # fmt: skip
