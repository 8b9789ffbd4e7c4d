"""Exact attention without the matrix of scores.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691): a program keeps the sums of a tile of queries and
streams the keys past it.

The floor is 4 D operations for each pair of a query and a key that it sees: causal, D = 128, 16
heads, 16,384 tokens: 1.1 ms at the 989 TFLOP/s of an H100. Predicted there, not yet measured: 450
TFLOP/s (wgmma from registers, tiles of 128 x 128, no overlap of softmax with products but that of
two programs a multiprocessor).
"""

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
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import launch, precision, target_of
from pyllm.kernels.primitives import dot, round_to


@triton.jit
def place(cu_q, cu_k, n_sequences, n_queries, n_keys, tile, BLOCK: tl.constexpr):
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
def row_number(b, token, head, heads, n_queries, cu_q):
    """Where the number of a query is in a contiguous tensor that has one for each head."""
    if cu_q is None:
        token += b.to(tl.int64) * n_queries
    return token * heads + head


@triton.jit
def logits(
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
def visible(rows, columns, queries, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys a query sees."""
    distance = rows + (keys - queries) - columns
    sees = columns < keys
    if LEFT:
        sees &= distance <= left
    if RIGHT:
        sees &= -distance <= right
    return sees


@triton.jit
def key_range(
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
    begin, full_begin, full_end, end = key_range(
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
            s, _ = logits(
                s, rows[:, None], columns[None, :], queries, keys, bias, bias_stride_q,
                bias_stride_k, slope, scale, softcap, PLAIN, SOFTCAP,
            )  # fmt: skip
            v_tile = tl.load(v + at * v_stride_t + v_block, mask=there, other=0.0)
            sees = visible(rows[:, None], columns[None, :], queries, keys, left, right, LEFT, RIGHT)
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
        tl.store(lse + row_number(b, token, head, heads, n_queries, cu_q), value, mask=here)
    if odd > 0:
        tl.debug_barrier()  # what follows may read it in other threads
        for part in tl.static_range(0 if LEFT else 2, 3, 2):
            bounds = (begin, full_begin, full_end, end)
            for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N, num_stages=1):
                columns = key + tl.arange(0, BLOCK_N)
                at = (first_key + key).to(tl.int64) * v_stride_t
                there = wide[None, :] & (columns[:, None] < keys)
                v_tile = tl.load(v + at + v_block, mask=there, other=0.0)
                sees = visible(
                    rows[:, None], columns[None, :], queries, keys, left, right, LEFT, RIGHT
                )
                result = tl.load(out_tile, mask=inside, other=0.0)
                result += odd_values(sees, v_tile).to(result.dtype)
                tl.store(out_tile, result, mask=inside)


def tiles(kernel, q, left, softcap, alibi_slopes, bias):
    """The configuration of `kernel` for queries like `q` and these options, which alone decide the
    bits."""
    dim, options = q.shape[-1], ("window", "softcap", "alibi", "bias")
    given = (left >= 0, softcap != 0, alibi_slopes is not None, bias is not None)
    mode = ", ".join(name for name, there in zip(options, given, strict=True) if there)
    return {
        "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "PRECISION": precision(q.dtype, target_of(q.device)),
        **configuration(kernel, q.device, q.dtype, dim, mode),
    }  # fmt: skip


def strides(*tensors):
    """Of each tensor: the strides of sequences (none if ragged), tokens and heads."""
    return [n for x in tensors for n in (x.stride(0) if x.ndim == 4 else 0, *x.stride()[-3:-1])]


def n_tiles(x, cu_seqlens, block):
    """How many tiles of `block` tokens `x` has at most; in a ragged batch see `find_sequence`."""
    if cu_seqlens is None:
        return x.shape[0] * triton.cdiv(x.shape[1], block)
    return x.shape[0] // block + cu_seqlens.numel() - 1


def batch(q, k, cu_q):
    """Arguments of all kernels: sequences, queries, keys, heads, heads that share keys."""
    n_sequences = q.shape[0] if cu_q is None else cu_q.numel() - 1
    return n_sequences, q.shape[-3], k.shape[-3], q.shape[-2], q.shape[-2] // k.shape[-2]


def flash_attention(
    q, k, v, cu_q, cu_k, scale, left, right, softcap, alibi_slopes, bias, sinks, out, lse
):
    """Writes `out`, and `lse` if it is not None; see `pyllm.ops.flash_attention`."""
    tile = tiles("flash_attention", q, left, softcap, alibi_slopes, bias)
    grid = n_tiles(q, cu_q, tile["BLOCK_M"]), q.shape[-2]
    if grid[0] == 0:
        return
    launch(
        _forward, grid, q, k, v, out, lse, cu_q, cu_k, alibi_slopes, bias, sinks,
        *strides(q, k, v, out), *bias_strides(bias), *batch(q, k, cu_q), scale, softcap, left,
        right, LEFT=left >= 0, RIGHT=right >= 0, SOFTCAP=softcap != 0, **tile,
    )  # fmt: skip


def bias_strides(bias):
    return (0, 0, 0, 0) if bias is None else bias.stride()
