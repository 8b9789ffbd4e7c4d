"""The kernels of rms_norm and layer_norm.

Source: Zhang and Sennrich, 2019, arXiv:1910.07467; Ba, Kiros and Hinton, 2016, arXiv:1607.06450.

Floor of the forward kernel, per row of D columns: D * itemsize read and written (or D bytes written
when quantized), and as much again with a residual. On an H100 (3.35 TB/s) 8192 rows of 4096
bfloat16 are 134 MB: 40 us, 48 us at the 85 % that we expect; up to 8 MB a launch is all that it
costs.
Predicted, not measured.

- A row of up to 16,384 columns stays in registers while it is reduced; wider ones are read again,
  from L2 for the most part. LayerNorm sums squares of differences to the mean.
- How many rows a program takes depends on the width alone: so do the bits of a row.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.launch import launch, target_of
from pyllm.kernels.primitives import round_even, round_to, row_offset, to_e4m3

HELD = 16384  # the widest row that registers hold; twice that spills in float32


@triton.jit
def _load(x, residual, total, columns, inside):
    """x, or what x + residual is when stored, as float32. With `total` it is stored there."""
    v = tl.load(x + columns, mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + columns, mask=inside, other=0.0)
        v = round_to(v.to(tl.float32) + other.to(tl.float32), x.dtype.element_ty)
        if total is not None:
            tl.store(total + columns, v, mask=inside)
    return v.to(tl.float32)


@triton.jit
def _normalized(v, mean, scale, weight, bias, columns, width):
    y = (v - mean) * scale
    if weight is not None:
        y *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    return y


@triton.jit
def _largest(y, inside):
    """The bits of the largest absolute value of each row, which are ordered as the values are and
    NaN above all."""
    bits = tl.where(inside, tl.abs(y).to(tl.int32, bitcast=True), 0)
    return tl.max(bits, 1, keep_dims=True)


@triton.jit
def _store(y, out, top, columns, inside, LIMIT: tl.constexpr):
    """Rounds to out's dtype or, with a LIMIT, quantizes by the largest value of the row."""
    if LIMIT == 0:
        tl.store(out + columns, round_to(y, out.dtype.element_ty), mask=inside)
    else:
        # As QuantRows has it: a row with no value above 1e-30, or one that is not finite, is zero.
        valid = (top > 1e-30) & (top < float("inf"))
        scaled = tl.where(valid, y * tl.div_rn(LIMIT + tl.zeros_like(top), top), 0.0)
        q = round_even(scaled).to(tl.int8) if LIMIT == 127 else to_e4m3(scaled)
        tl.store(out + columns, q, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, weight, bias, residual, out, total, scales,
    x_stride, x_head, residual_stride, residual_head, out_stride, out_head, total_stride,
    total_head, rows, heads, width, eps,
    CENTERED: tl.constexpr, LIMIT: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    x += row_offset(row, heads, x_stride, x_head)
    out += row_offset(row, heads, out_stride, out_head)
    if residual is not None:
        residual += row_offset(row, heads, residual_stride, residual_head)
        total += row_offset(row, heads, total_stride, total_head)

    mean = tl.zeros([ROWS, 1], tl.float32)
    top = tl.zeros([ROWS, 1], tl.int32)
    if WHOLE:
        inside = live & (columns < width)
        v = _load(x, residual, total, columns, inside)
        if CENTERED:
            mean = tl.sum(v, 1, keep_dims=True) / width
        d = tl.where(inside, v - mean, 0.0)
        scale = tl.rsqrt(tl.sum(d * d, 1, keep_dims=True) / width + eps)
        y = _normalized(v, mean, scale, weight, bias, columns, width)
        if LIMIT != 0:
            top = _largest(y, inside)
        _store(y, out, top.to(tl.float32, bitcast=True), columns, inside, LIMIT)
    else:
        if CENTERED:
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                inside = live & (start + columns < width)
                sums += _load(x, residual, None, start + columns, inside)
            mean = tl.sum(sums, 1, keep_dims=True) / width
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            inside = live & (start + columns < width)
            d = _load(x, residual, total, start + columns, inside) - mean
            squares += tl.where(inside, d * d, 0.0)
        scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)
        if LIMIT != 0:
            for start in range(0, width, BLOCK):
                inside = live & (start + columns < width)
                v = _load(x, residual, None, start + columns, inside)
                y = _normalized(v, mean, scale, weight, bias, start + columns, width)
                top = tl.maximum(top, _largest(y, inside))
        for start in range(0, width, BLOCK):
            inside = live & (start + columns < width)
            v = _load(x, residual, None, start + columns, inside)
            y = _normalized(v, mean, scale, weight, bias, start + columns, width)
            _store(y, out, top.to(tl.float32, bitcast=True), start + columns, inside, LIMIT)
    if LIMIT != 0:
        largest = top.to(tl.float32, bitcast=True)
        quantum = tl.where(largest > 1e-30, tl.div_rn(largest, LIMIT + tl.zeros_like(largest)), 0.0)
        finite = largest < float("inf")
        tl.store(scales + row, tl.where(finite, quantum, float("nan")), mask=live)


# Elements of a tile: warps of 32 lanes, the first line that is wide enough, else 16, as 32 have
# 64 registers a thread, which spill. Predicted.
_WARPS = ((4096, 4), (8192, 8))


def _tile(width, held, target):
    """Rows and columns of a tile, and how many warps it is shared by."""
    block = min(triton.next_power_of_2(width), held)
    rows = max(1, 1024 // block)
    warps = next((w for elements, w in _WARPS if rows * block <= elements), 16)
    return rows, block, max(1, warps * 32 // target.warp_size)


def _strides(x):
    """Of tokens and heads of ``[T, H, D]`` or ``[T, D]``; without a tensor nothing reads them."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1) if x.ndim == 3 else 0)


def forward(centered, x, weight, bias, eps, residual, out, total, scale):
    """Tensors ``[T, D]`` or ``[T, H, D]``; scale, float32 [T * H], if out is int8 or e4m3 bits."""
    if x.numel() == 0:
        return
    width, heads = x.shape[-1], x.shape[1] if x.ndim == 3 else 1
    n_rows = x.shape[0] * heads
    rows, block, warps = _tile(width, HELD, target_of(x.device))
    whole = width <= block
    if not whole:
        block //= 4
    limit = 0 if scale is None else 127 if out.dtype == torch.int8 else 448
    launch(
        norm_forward, (triton.cdiv(n_rows, rows),),
        x, weight, bias, residual, out, total, scale,
        *_strides(x), *_strides(residual), *_strides(out), *_strides(total),
        n_rows, heads, width, eps,
        CENTERED=centered, LIMIT=limit, WHOLE=whole, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
