"""Multiplication by weights of 4 and 8 bits, and of quantized rows by quantized rows.

One kernel serves one row of activations and any number: the weights are the left operand, so that
16 rows of x fill a tile and the instructions, hence the bits, are those of a large one. Weights in
groups are widened in registers, ``scale * q + minimum`` in float32, rounded to x's dtype as PyTorch
would have them; quantized rows are multiplied as they are, int8 to int32 and e4m3 to float32, and
scaled once.

The order of additions of an output is fixed by N, K and the number of multiprocessors: k in splits,
each in order, then the splits in order; by one program one after another, or for few rows by a
program each, whose sums the last to arrive puts together. It does not depend on the rows of x.

The floor: the bytes of the weight (4 bits in groups of 32: 4.5 a weight, 5 with a minimum), or
2 N K T operations. Predicted for an H100, not yet measured: 4 bits, one row: 55 % of the bandwidth,
for a weight takes 4 instructions (mask or shift, two conversions, fma) of the 4.2 that there is
time for; 128 rows and more: 350 TFLOP/s. Rows of int8: 80 % of the bandwidth, 900 TOP/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import knows_e4m3, launch, precision, target_of
from pyllm.kernels.primitives import dot, from_e4m3, round_to


class Chunks(NamedTuple):
    """A weight in pairs of chunks of k: half a group, a group, or 64 k of a longer one.

    Attributes:
        q: uint8 ``[N, bytes]``; of 4 bits, the first chunk of a pair is in the low nibbles and the
            second in the high ones.
        scale, minimum: int32 ``[pairs, N]``, two float16; that of the first chunk is low.
        size: of a chunk.
    """

    q: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    size: int

    @staticmethod
    def of(weight):
        """From a `QuantTensor`."""
        q, *parts = weight.parts()
        (n, k), size = weight.shape, weight.group_size if weight.group_size in (16, 32) else 64
        pairs = triton.cdiv(k, 2 * size)
        q = torch.nn.functional.pad(q, (0, pairs * 2 * size - k))
        if weight.bits == 4:
            low, high = q.view(n, pairs, 2, size).unbind(2)
            q = (low | high << 4).view(n, -1)
        group = torch.arange(2 * pairs, device=q.device) * size // weight.group_size
        group = group.clamp(max=k // weight.group_size - 1)

        def words(part):
            return part[:, group].view(torch.int32).t().contiguous()

        scale, minimum = (None if part is None else words(part) for part in parts)
        return Chunks(q.contiguous(), scale, minimum, size)


@triton.jit
def _halves(words):
    """The two float16 of each word, in float32."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(
        tl.float32
    )


@triton.jit
def _matmul(
    x, q, scale, minimum, x_scale, bias, out, sums, counters,
    x_stride, q_stride, out_stride, tokens, n, k, steps, steps_per_split,
    BITS: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = 2 ** (BITS - 1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    here, there = rows < tokens, columns < n
    depth = tl.arange(0, CHUNK)
    x_block = x + rows.to(tl.int64)[None, :] * x_stride + depth[:, None]
    q_block = q + columns.to(tl.int64)[:, None] * q_stride + depth[None, :]
    first, last = tl.program_id(2), tl.program_id(2) + 1
    if sums is None:
        first, last = 0, SPLITS
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(first, last):
        begin, end = split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps)
        if x_scale is not None:
            whole = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if x.dtype.element_ty == tl.int8
                             else tl.float32)  # fmt: skip
            for step in tl.range(begin, end):
                at = step * CHUNK
                x_mask, q_mask = here[None, :], there[:, None]
                if not EVEN:
                    x_mask &= (at + depth < k)[:, None]
                    q_mask &= (at + depth < k)[None, :]
                a = tl.load(q_block + at, mask=q_mask, other=0.0)
                b = tl.load(x_block + at, mask=x_mask, other=0.0)
                if WIDEN:
                    a, b = from_e4m3(a), from_e4m3(b)
                if a.dtype == tl.int8:
                    whole = tl.dot(a, b, whole, out_dtype=tl.int32)
                else:  # units for e4m3 keep few bits of their sums: add these up in float32
                    whole += tl.dot(a, b, max_num_imprecise_acc=0)
            acc = whole.to(tl.float32)
        else:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for step in tl.range(begin, end):
                at = step * (2 * CHUNK)
                words = scale + step * n + columns
                low_scale, high_scale = _halves(tl.load(words, mask=there, other=0))
                if minimum is None:
                    low_minimum, high_minimum = low_scale * -HALF, high_scale * -HALF
                else:
                    words = minimum + step * n + columns
                    low_minimum, high_minimum = _halves(tl.load(words, mask=there, other=0))
                if BITS == 4:
                    both = tl.load(q_block + step * CHUNK, mask=there[:, None], other=0)
                    low, high = both & 15, both >> 4
                else:
                    low = tl.load(q_block + at, mask=there[:, None], other=0)
                    high = tl.load(q_block + at + CHUNK, mask=there[:, None], other=0)
                low_mask, high_mask = here[None, :], here[None, :]
                if not EVEN:
                    low_mask &= (at + depth < k)[:, None]
                    high_mask &= (at + CHUNK + depth < k)[:, None]
                b = tl.load(x_block + at, mask=low_mask, other=0.0)
                a = tl.fma(low.to(tl.float32), low_scale[:, None], low_minimum[:, None])
                acc = dot(round_to(a, b.dtype), b, acc, PRECISION)
                b = tl.load(x_block + at + CHUNK, mask=high_mask, other=0.0)
                a = tl.fma(high.to(tl.float32), high_scale[:, None], high_minimum[:, None])
                acc = dot(round_to(a, b.dtype), b, acc, PRECISION)
        total += acc

    if sums is not None:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        sums += tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        block = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(sums + tl.program_id(2) * (BLOCK_N * BLOCK_M) + block, total)
        tl.debug_barrier()  # one thread tells the others of what all have written
        if tl.atomic_add(counters + tile, 1) != SPLITS - 1:
            return
        tl.debug_barrier()
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for split in range(SPLITS):
            total += tl.load(sums + split * (BLOCK_N * BLOCK_M) + block, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    if x_scale is not None:
        total *= tl.load(x_scale + rows, mask=here, other=0.0)[None, :]
        total *= tl.load(scale + columns, mask=there, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + columns, mask=there, other=0.0)[:, None]
    at = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    y = round_to(tl.trans(total), out.dtype.element_ty)
    tl.store(out + at, y, mask=here[:, None] & there[None, :])


def splits_of(n, steps, step, multiprocessors):
    """How many splits k has: enough for two programs a multiprocessor where x has few rows."""
    tiles = triton.cdiv(n, 64)
    most = max(1, steps * step // 256)
    return min(most, max(1, triton.cdiv(2 * multiprocessors, tiles)))


def _run(mode, x, q, scale, minimum, x_scale, bias, out, n, step, counters, multiprocessors,
         **options):  # fmt: skip
    (tokens, k), target = x.shape, target_of(x.device)
    if tokens == 0:
        return
    steps = triton.cdiv(k, step)
    splits = splits_of(n, steps, step, multiprocessors)
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split)
    rows = max(16, min(tokens, 128))
    tiles = configuration("quant_matmul", x.device, x.dtype, rows, mode)
    grid = triton.cdiv(n, tiles["BLOCK_N"]), triton.cdiv(tokens, tiles["BLOCK_M"])
    alone = splits == 1 or grid[0] * grid[1] > 2 * multiprocessors
    sums = None
    if not alone:
        size = grid[0] * grid[1] * splits * tiles["BLOCK_N"] * tiles["BLOCK_M"]
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
    launch(
        _matmul, (*grid, 1 if alone else splits), x, q, scale, minimum, x_scale, bias, out, sums,
        counters, x.stride(0), q.stride(0), out.stride(0), tokens, n, k, steps, per_split,
        SPLITS=splits, EVEN=k % step == 0, PRECISION=precision(x.dtype, target), **options, **tiles,
    )  # fmt: skip


def quant_matmul(x, weight, bits, n, bias, out, counters, multiprocessors):
    """``out = x @ weight.T + bias``: x ``[T, K]``, weight `Chunks`; `counters` are int32 zeros."""
    _run(
        f"{bits} bits", x, *weight[:3], None, bias, out, n,
        2 * weight.size, counters, multiprocessors, BITS=bits, CHUNK=weight.size, WIDEN=False,
    )  # fmt: skip


def row_matmul(x, x_scale, q, scale, bias, out, counters, multiprocessors):
    """``out = (x @ q.T) * x_scale[:, None] * scale + bias``, of int8 or float8_e4m3fn."""
    target = target_of(x.device)
    widen = x.dtype == torch.float8_e4m3fn and not knows_e4m3(target)
    if widen:
        x, q = x.view(torch.uint8), q.view(torch.uint8)
    _run(
        "rows", x, q, scale, None, x_scale, bias, out, len(q), 128,
        counters, multiprocessors, BITS=8, CHUNK=128, WIDEN=widen,
    )  # fmt: skip
