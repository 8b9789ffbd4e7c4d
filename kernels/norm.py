"""The kernels of rms_norm and layer_norm.

Source: Zhang and Sennrich, 2019, arXiv:1910.07467; Ba, Kiros and Hinton, 2016, arXiv:1607.06450.

Floor of the forward kernel, per row of D columns: D * itemsize read and written (or D bytes written
when quantized), and as much again with a residual. On an H100 (3.35 TB/s) 8192 rows of 4096
bfloat16 are 134 MB: 40 us, 48 us at the 85 % that we expect; up to 8 MB a launch is all that it
costs. Of the gradients: x and dy read, dx written, 201 MB for the same rows: 60 us, 72 us expected.
Predicted, not measured.

- A row of up to 16,384 columns stays in registers while it is reduced; wider ones are read again,
  from L2 for the most part. LayerNorm sums squares of differences to the mean.
- How many rows a program takes depends on the width alone: so do the bits of a row.
- Gradients of the parameters: up to 8192 columns every program sums its rows' in registers, 256
  programs at most, and a second kernel adds the sums in order. For wider rows they do not fit
  beside the row, so a kernel of its own reads x and dy again by columns: 5/3 of the floor.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import launch, row_strides
from pyllm.kernels.primitives import round_even, round_to, row_offset, to_e4m3

FUSED = 8192  # the widest row beside whose x and dy the sums for the parameters fit
PARTS = 256  # of the gradients of the parameters: constant, so that the bits hang on the shape only
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


def _tile(kernel, x, held):
    """Rows and columns of a tile, and how many warps it is shared by."""
    width = x.shape[-1]
    chosen = configuration(kernel, x.device, x.dtype, width)
    block = min(triton.next_power_of_2(width), held)
    return max(1, chosen["TILE"] // block), block, chosen["num_warps"]


def forward(centered, x, weight, bias, eps, residual, out, total, scale):
    """Tensors ``[T, D]`` or ``[T, H, D]``; scale, float32 [T * H], if out is int8 or e4m3 bits."""
    if x.numel() == 0:
        return
    width, heads = x.shape[-1], x.shape[1] if x.ndim == 3 else 1
    n_rows = x.shape[0] * heads
    rows, block, warps = _tile("norm_forward", x, HELD)
    whole = width <= block
    if not whole:
        block //= 4
    limit = 0 if scale is None else 127 if out.dtype == torch.int8 else 448
    launch(
        norm_forward, (triton.cdiv(n_rows, rows),),
        x, weight, bias, residual, out, total, scale,
        *row_strides(x), *row_strides(residual), *row_strides(out), *row_strides(total),
        n_rows, heads, width, eps,
        CENTERED=centered, LIMIT=limit, WHOLE=whole, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _load_gradient(x, dy, weight, columns, inside):
    """x and dy * weight as float32, and dy."""
    v = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    dv = tl.load(dy + columns, mask=inside, other=0.0).to(tl.float32)
    g = dv
    if weight is not None:
        g = dv * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return v, g, dv


@triton.jit
def _store_dx(v, g, mean, scale, g_mean, gh_mean, residual_grad, dx, columns, inside):
    y = (g - g_mean - (v - mean) * scale * gh_mean) * scale
    if residual_grad is not None:
        y += tl.load(residual_grad + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + columns, round_to(y, dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    dy, x, weight, residual_grad, dx, parts, statistics,
    dy_stride, dy_head, x_stride, x_head, residual_stride, residual_head, dx_stride, dx_head,
    rows, heads, width, eps,
    CENTERED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx; and the sums for the parameters, [2, programs, width], or without `parts` the mean and
    1 / deviation of each row, [2, rows]. dx = (g - mean(g) - h * mean(g * h)) / deviation with
    h = (x - mean) / deviation and g = dy * weight; RMSNorm has no means of x and g."""
    columns = tl.arange(0, BLOCK)[None, :]
    mean = tl.zeros([ROWS, 1], tl.float32)
    g_mean = tl.zeros([ROWS, 1], tl.float32)
    sum_h = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_dy = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        live = row < rows
        x_row = x + row_offset(row, heads, x_stride, x_head)
        dy_row = dy + row_offset(row, heads, dy_stride, dy_head)
        dx_row = dx + row_offset(row, heads, dx_stride, dx_head)
        residual_row = residual_grad
        if residual_grad is not None:
            residual_row = residual_grad + row_offset(row, heads, residual_stride, residual_head)
        if WHOLE:
            inside = live & (columns < width)
            v, g, dv = _load_gradient(x_row, dy_row, weight, columns, inside)
            if CENTERED:
                mean = tl.sum(v, 1, keep_dims=True) / width
                g_mean = tl.sum(g, 1, keep_dims=True) / width
            d = tl.where(inside, v - mean, 0.0)
            scale = tl.rsqrt(tl.sum(d * d, 1, keep_dims=True) / width + eps)
            gh_mean = tl.sum(d * g, 1, keep_dims=True) / width * scale
            _store_dx(
                v, g, mean, scale, g_mean, gh_mean, residual_row, dx_row, columns, inside
            )  # fmt: skip
            if parts is not None:
                sum_h += dv * d * scale
                if CENTERED:
                    sum_dy += dv
        else:
            if CENTERED:
                sums = tl.zeros([ROWS, BLOCK], tl.float32)
                g_sums = tl.zeros([ROWS, BLOCK], tl.float32)
                for start in range(0, width, BLOCK):
                    here = start + columns
                    v, g, _ = _load_gradient(x_row, dy_row, weight, here, live & (here < width))
                    sums += v
                    g_sums += g
                mean = tl.sum(sums, 1, keep_dims=True) / width
                g_mean = tl.sum(g_sums, 1, keep_dims=True) / width
            squares = tl.zeros([ROWS, BLOCK], tl.float32)
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                here = start + columns
                inside = live & (here < width)
                v, g, _ = _load_gradient(x_row, dy_row, weight, here, inside)
                d = tl.where(inside, v - mean, 0.0)
                squares += d * d
                products += d * g
            scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)
            gh_mean = tl.sum(products, 1, keep_dims=True) / width * scale
            for start in range(0, width, BLOCK):
                here = start + columns
                inside = live & (here < width)
                v, g, _ = _load_gradient(x_row, dy_row, weight, here, inside)
                _store_dx(
                    v, g, mean, scale, g_mean, gh_mean, residual_row, dx_row, here, inside
                )  # fmt: skip
        if parts is None:
            tl.store(statistics + row, mean, mask=live)
            tl.store(statistics + rows + row, scale, mask=live)
    if parts is not None:
        at = tl.arange(0, BLOCK)
        here = parts + tl.program_id(0).to(tl.int64) * width + at
        tl.store(here, tl.sum(sum_h, 0), mask=at < width)
        if CENTERED:
            here += tl.num_programs(0).to(tl.int64) * width
            tl.store(here, tl.sum(sum_dy, 0), mask=at < width)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_columns(
    dy, x, statistics, parts, dy_stride, dy_head, x_stride, x_head, rows, heads, width,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums for the parameters, by columns, from the statistics of the rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, n_parts = tl.program_id(1), tl.num_programs(1)
    sum_h = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_dy = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(part, tl.cdiv(rows, ROWS), n_parts):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (at[None, :] < width)
        x_at = x + row_offset(row, heads, x_stride, x_head) + at[None, :]
        dy_at = dy + row_offset(row, heads, dy_stride, dy_head) + at[None, :]
        v = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        dv = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        sum_h += dv * (v - mean) * scale
        if CENTERED:
            sum_dy += dv
    here = parts + part.to(tl.int64) * width + at
    tl.store(here, tl.sum(sum_h, 0), mask=at < width)
    if CENTERED:
        tl.store(here + n_parts.to(tl.int64) * width, tl.sum(sum_dy, 0), mask=at < width)


@triton.jit
def norm_backward_sum(
    parts, dweight, dbias, n_parts, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums over the parts, in one order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, ROWS)[None, :]
    inside = (part < n_parts) & (at[:, None] < width)
    here = parts + part * width + at[:, None]
    total = tl.sum(tl.load(here, mask=inside, other=0.0), 1)
    tl.store(dweight + at, round_to(total, dweight.dtype.element_ty), mask=at < width)
    if dbias is not None:
        total = tl.sum(tl.load(here + n_parts * width, mask=inside, other=0.0), 1)
        tl.store(dbias + at, round_to(total, dbias.dtype.element_ty), mask=at < width)


def backward(centered, dy, x, weight, eps, residual_grad, dx, dweight, dbias):
    """Tensors as of `forward`; dbias may be None."""
    width, heads = x.shape[-1], x.shape[1] if x.ndim == 3 else 1
    n_rows = x.shape[0] * heads
    # A thread holds twice as much a column as forward.
    rows, block, warps = _tile("norm_backward", x, HELD // 2)
    fused, whole = width <= FUSED, width <= block
    if not whole:
        block //= 2
    programs = triton.cdiv(n_rows, rows)
    n_parts = min(programs, PARTS) if fused else min(triton.cdiv(n_rows, 8), PARTS // 8)
    parts = x.new_empty((2, n_parts, width), dtype=torch.float32)
    statistics = None if fused else x.new_empty((2, n_rows), dtype=torch.float32)
    launch(
        norm_backward, (n_parts if fused else programs,),
        dy, x, weight, residual_grad, dx, parts if fused else None, statistics,
        *row_strides(dy), *row_strides(x), *row_strides(residual_grad), *row_strides(dx),
        n_rows, heads, width, eps,
        CENTERED=centered, WHOLE=whole, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if not fused:
        chosen = configuration("norm_backward_columns", x.device, x.dtype, width)
        launch(
            norm_backward_columns, (triton.cdiv(width, chosen["BLOCK"]), n_parts),
            dy, x, statistics, parts, *row_strides(dy), *row_strides(x), n_rows, heads, width,
            CENTERED=centered, **chosen,
        )  # fmt: skip
    chosen = configuration("norm_backward_sum", x.device, x.dtype, width)
    launch(
        norm_backward_sum, (triton.cdiv(width, chosen["BLOCK"]),), parts, dweight, dbias, n_parts,
        width, ROWS=PARTS, **chosen,
    )  # fmt: skip
