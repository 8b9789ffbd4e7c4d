"""What Triton lacks, or has not on every target or not in its interpreter."""

import triton
import triton.language as tl

from pyllm.kernels import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, to the nearest, ties to even; the interpreter truncates bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; the interpreter multiplies the bits of bfloat16."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_even(x):
    """The nearest integer to float32 `x`, ties to even, as float32; ``|x| < 2^22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(x):
    """The bits of float32 ``|x| <= 464`` in e4m3 as uint8, to the nearest, ties to even.

    In integers, as the conversion exists from compute capability 8.9 on only."""
    bits = tl.abs(x).to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 e4m3 has steps of 2^-9, which is the last place of floats around 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (tl.where(bits < 0x3C800000, small, normal) | sign).to(tl.uint8)


@triton.jit
def row_offset(row, heads, stride, head_stride):
    """Where row `row` of ``[T, heads, D]`` begins, in elements."""
    return (row // heads).to(tl.int64) * stride + (row % heads).to(tl.int64) * head_stride


@triton.jit
def exp(x):
    """e^x to about 1 ulp, with the very operations of the CPU kernels; launch it without fusion."""
    clamped = tl.maximum(tl.minimum(x, 88.72), -87.0)
    n = round_even(clamped * 1.44269504088896341)
    r = tl.fma(n, -0.693359375, clamped)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(tl.full(x.shape, 1.9875691500e-4, tl.float32), r, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p * r, r, r) + 1.0
    power = ((n + 126.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.0, 0.0, p * power * 2.0)
    return tl.where(x > 88.72, float("inf"), y)


@triton.jit
def from_e4m3(bits):
    """uint8 that are e4m3 as float16, exactly; for targets that do not know the format."""
    bits = bits.to(tl.uint16)
    # The exponents of float16 begin 8 lower.
    value = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True) * 256
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
