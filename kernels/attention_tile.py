"""What the attention kernels share: a tile of logits and the sums of a row.

A row's sums do not depend on the tile that it stands in: keys come in blocks counted from key 0,
and a block of which a row sees nothing leaves its sums as they are, to the bit. That is why what
is multiplied and added is spelled as one `fma` wherever a mask may stand in between: without the
mask a compiler would join the two, with it not.
"""

import triton
import triton.language as tl
from pyllm.kernels.primitives import dot, round_to

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def piece(cu_seqlens, b, total):
    """Where sequence b begins, and its length; inside of the tensor whatever the integers say."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), begin), total)
    return begin, end - begin


@triton.jit
def find_sequence(cu_seqlens, batch, total, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that tile `tile` belongs to, and which of its tiles it is.

    Sequence b, of `ROWS` rows a token, has the tiles from ``cu_seqlens[b] * ROWS // BLOCK + b`` on:
    at least as many as it needs, so the grid is known from the shapes, as in vLLM's unified
    attention.
    """
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        token = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), total)
        before = token * ROWS // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    token = tl.minimum(tl.maximum(tl.load(cu_seqlens + low), 0), total)
    return low, tl.maximum(tile - (token * ROWS // BLOCK + low), 0)


@triton.jit
def tanh(x):
    """Accurate near zero too: there by Lambert's continued fraction."""
    z = x * x
    fraction = x * (((z + 378) * z + 17325) * z + 135135)
    fraction = fraction / (((28 * z + 3150) * z + 62370) * z + 135135)
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    return tl.where(z < 0.36, fraction, tl.where(x < 0, -1.0, 1.0) * ((1 - e) / (1 + e)))


@triton.jit
def capped(s, softcap):
    """``softcap * tanh(s / softcap)``, and its derivative."""
    t = tanh(s / softcap)
    return softcap * t, 1 - t * t


@triton.jit
def attend(
    total, top, acc, s, sees, v, odd, factor, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Adds a block of keys to the sums of the rows: online softmax (arXiv:1805.02867).

    Args:
        total, top: of each row, the sum of weights relative to ``2**top``, and top.
        acc: the sum of weights times values.
        s: logits; `factor` times these are to base 2.
        sees: which of them count, where MASKED. Values that are not finite are left out there, for
            they would reach rows that do not see them; `odd_values` makes up for that.
        v: the values.
        odd: how many values were left out.
    """
    if MASKED:
        s = tl.where(sees, s, -INF)
    new = tl.maximum(top, tl.max(s, 1) * factor)
    base = tl.where(new == -INF, 0.0, new)  # of a row that has seen nothing
    p = tl.exp2(tl.fma(s, factor, -base[:, None]))
    shrink = tl.exp2(top - base)
    total = tl.fma(total, shrink, tl.sum(p, 1))
    if MASKED:
        wide = v.to(tl.float32)
        is_odd = (wide - wide) != 0
        odd += tl.max(tl.max(is_odd.to(tl.int32), 1), 0)
        v = tl.where(is_odd, 0.0, wide).to(v.dtype)
    acc = dot(round_to(p, v.dtype), v, acc * shrink[:, None], PRECISION)
    return total, new, acc, odd


@triton.jit
def odd_values(sees, v):
    """What the values that are not finite make of the sums of the rows that see them."""
    v = v.to(tl.float32)
    # How many of each kind a row sees, in one product: a digit to base 256 of each.
    code = tl.where(v == INF, 1.0, tl.where(v == -INF, 256.0, 1.0 / 256))
    code = tl.where((v - v) != 0, code, 0.0)
    seen = tl.dot(sees.to(tl.float16), code.to(tl.float16))
    below = seen >= 256
    seen -= 256 * tl.floor(seen / 256)
    result = tl.where(seen >= 1, INF, 0.0) - tl.where(below, INF, 0.0)
    return tl.where(seen > tl.floor(seen), float("nan"), result)


@triton.jit
def with_sink(total, top, acc, sink):
    """Adds the weight of ``exp(sink)``, which has no value."""
    sink = sink.to(tl.float32) * LOG2E
    new = tl.maximum(top, sink)
    base = tl.where(new == -INF, 0.0, new)
    shrink = tl.exp2(top - base)
    return total * shrink + tl.exp2(sink - base), new, acc * shrink[:, None]


@triton.jit
def merge(total, top, acc, next_total, next_top, next_acc):
    """The sums of some keys and those of the next as one."""
    new = tl.maximum(top, next_top)
    base = tl.where(new == -INF, 0.0, new)
    shrink, next_shrink = tl.exp2(top - base), tl.exp2(next_top - base)
    total = tl.fma(total, shrink, next_total * next_shrink)
    acc = tl.fma(acc, shrink[:, None], next_acc * next_shrink[:, None])
    return total, new, acc
