"""The next token of each row of logits. Source and exact rules: pyllm/ops/sample.py.

Floor: V floats read; 32 rows of 128,256 are 16 MB, 5 us on an H100 (3.35 TB/s). Greedy is one pass
by many programs and one more launch: 8 us. What is drawn needs exact cuts: a row is then one
program's, which reads its scores and weights 16 times from L2 for each of top-k and top-p, about 4
us a time: 20 us without cuts, 90 us with one. Predicted, not measured.

- Weights are integers and so are their sums: tokens are those of the CPU kernel, bit for bit where
  that has fused multiply-adds, whatever the order of the sums.
- A cut is found two bits of the score's key at a time, from sums over three thresholds a pass.
- All parameters are read on the device and nothing is read on the host, so a graph can replay it.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import launch
from pyllm.kernels.primitives import exp

LARGEST = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _clean(x):
    """No NaN, which counts as -inf, and no -0, which would be another key for an equal float."""
    return tl.where(x == x, tl.where(x == 0, 0.0, x), -INFINITY)


@triton.jit
def _parameter(values, row, off):
    if values is None:
        return off
    else:
        return tl.load(values + row)


@triton.jit
def count_kernel(
    marks, history, history_stride, prompt_lens, history_lens, room, n, BLOCK: tl.constexpr
):
    """Of each token twice how often it was generated, plus 1 if it occurs at all."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.maximum(tl.minimum(tl.load(history_lens + row), room), 0)
    prompt = tl.maximum(tl.minimum(tl.load(prompt_lens + row), end), 0)
    seen = at < end
    token = tl.load(history + row.to(tl.int64) * history_stride + at, mask=seen, other=-1)
    valid = seen & (token >= 0) & (token < n)
    marks += row.to(tl.int64) * n
    tl.atomic_or(marks + token, 1, mask=valid)
    tl.atomic_add(marks + token, 2, mask=valid & (at >= prompt))


@triton.jit
def scan_kernel(
    logits, logits_stride, marks, repetition, presence, frequency, scores, largest, largest_at,
    raw_largest, raw_sum, n, chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores, which are penalized logits; of each chunk the highest, and of the raw logits the
    highest and the sum of exponentials relative to it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < n
    x = tl.load(logits + row.to(tl.int64) * logits_stride + at, mask=inside, other=-INFINITY)
    score = _clean(x)
    here = row * chunks + chunk
    if raw_sum is not None:
        top = tl.max(score, 0)
        gap = tl.where(score < top, score - top, 0.0)
        tl.store(raw_largest + here, top)
        tl.store(raw_sum + here, tl.sum(tl.where(inside, tl.exp(gap), 0.0), 0))
    if marks is not None:
        mark = tl.load(marks + row.to(tl.int64) * n + at, mask=inside, other=0)
        penalty = _parameter(repetition, row, 1.0) + tl.zeros([CHUNK], tl.float32)
        repeated = tl.where(score < 0, score * penalty, tl.div_rn(score, penalty))
        score = tl.where((mark & 1) > 0, _clean(repeated), score)
        times = mark >> 1
        less = times.to(tl.float32) * _parameter(frequency, row, 0.0)
        fewer = _clean(score - less - _parameter(presence, row, 0.0))
        score = tl.where(times > 0, fewer, score)
    if scores is not None:
        tl.store(scores + row.to(tl.int64) * n + at, score, mask=inside)
    top = tl.max(score, 0)
    tl.store(largest + here, top)
    tl.store(largest_at + here, tl.min(tl.where(score == top, at, 2147483647), 0))


@triton.jit
def _weight(score, top, temperature):
    gap = tl.where(score < top, score - top, 0.0)
    heat = tl.minimum(temperature, LARGEST) + tl.zeros_like(gap)
    return (exp(tl.div_rn(gap, heat)) * 1073741824.0).to(tl.int32)


@triton.jit
def _row_top(largest, row, chunks, CHUNKS: tl.constexpr):
    i = tl.arange(0, CHUNKS)
    return tl.max(tl.load(largest + row * chunks + i, mask=i < chunks, other=-INFINITY), 0)


@triton.jit
def weights_kernel(
    scores, weights, temperature, largest, n, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    if heat > 0:
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        top = _row_top(largest, row, chunks, CHUNKS)
        place = row.to(tl.int64) * n + at
        score = tl.load(scores + place, mask=at < n, other=-INFINITY)
        tl.store(weights + place, _weight(score, top, heat), mask=at < n)


@triton.jit
def _key(score):
    """Floats without NaN or -0 as integers of the same order."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _cut(scores, weights, n, limit, top, temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sets to 0 the weights of what is not kept: in descending order of scores, then by id, a token
    is kept while the measures before it, 1 or its weight, sum to less than `limit`."""
    threshold = tl.full([], 0, tl.uint32)  # a key, of which two bits more are known after a pass
    above = tl.full([], 0, tl.int64)  # measures of the keys beyond those with its known bits
    step = tl.full([], 1 << 30, tl.uint32)
    for _ in range(16):
        sum1 = tl.zeros([BLOCK], tl.int64)
        sum2 = tl.zeros([BLOCK], tl.int64)
        sum3 = tl.zeros([BLOCK], tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = _key(tl.load(scores + at, mask=at < n, other=-INFINITY))
            if COUNT:
                measure = (at < n).to(tl.int32)
            else:
                measure = tl.load(weights + at, mask=at < n, other=0)
            sum1 += tl.where(key >= threshold + step, measure, 0).to(tl.int64)
            sum2 += tl.where(key >= threshold + step * 2, measure, 0).to(tl.int64)
            sum3 += tl.where(key >= threshold + step * 3, measure, 0).to(tl.int64)
        one, two, three = tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        if three >= limit:
            threshold += step * 3
        elif two >= limit:
            threshold += step * 2
            above = three
        elif one >= limit:
            threshold += step
            above = two
        else:
            above = one
        step >>= 2
    bits = tl.where(threshold >= 0x80000000, threshold ^ 0x80000000, threshold ^ 0xFFFFFFFF)
    unit = tl.full([], 1, tl.int64)
    if not COUNT:
        score = bits.to(tl.float32, bitcast=True) + tl.zeros([1], tl.float32)
        unit = tl.max(_weight(score, top, temperature), 0).to(tl.int64)
    left = (limit - above + unit - 1) // unit  # how many of equal scores are kept
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _key(tl.load(scores + at, mask=at < n, other=-INFINITY))
        tie = (at < n) & (key == threshold)
        ties = tl.sum(tie.to(tl.int32), 0)
        drop = key < threshold
        if ties > left:
            drop |= tie & (tl.cumsum(tie.to(tl.int32), 0) > left)
        left = tl.maximum(left - ties, 0)
        tl.store(weights + at, tl.zeros([BLOCK], tl.int32), mask=drop & (at < n))
    tl.debug_barrier()


@triton.jit
def _total(weights, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(weights + at, mask=at < n, other=0).to(tl.int64)
    return tl.sum(total, 0)


@triton.jit
def _draw(weights, n, least, seed, position, BLOCK: tl.constexpr):
    """The first token at which the running sum of the weights of at least `least` exceeds the
    number drawn."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(weights + at, mask=at < n, other=0)
        total += tl.where(w >= least, w, 0).to(tl.int64)
    zero = position.to(tl.uint32) * 0
    low, high, _, _ = tl.philox(seed.to(tl.uint64), position.to(tl.uint32), zero, zero, zero)
    drawn = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    left = tl.umulhi(drawn, tl.sum(total, 0).to(tl.uint64)).to(tl.int64)
    token = tl.full([], -1, tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(weights + at, mask=at < n, other=0)
        w = tl.where(w >= least, w, 0).to(tl.int64)
        block = tl.sum(w, 0)
        if (token < 0) & (left < block):
            token = start + tl.sum((tl.cumsum(w, 0) <= left).to(tl.int32), 0)
        left -= block
    return token


@triton.jit
def choose_kernel(
    logits, logits_stride, scores, weights, largest, largest_at, raw_largest, raw_sum,
    temperature, top_k, top_p, min_p, seed, position, token_out, logprob_out, n, chunks,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i = tl.arange(0, CHUNKS)
    here = row * chunks + i
    best = tl.load(largest + here, mask=i < chunks, other=-INFINITY)
    top = tl.max(best, 0)
    first = tl.load(largest_at + here, mask=(i < chunks) & (best == top), other=2147483647)
    token = tl.where(top > -INFINITY, tl.min(first, 0), 0)
    if temperature is not None:
        heat = tl.load(temperature + row)
        scores += row.to(tl.int64) * n
        weights += row.to(tl.int64) * n
        if (heat > 0) & (top > -INFINITY):
            k = _parameter(top_k, row, 0)
            if (k > 0) & (k < n):
                _cut(scores, weights, n, k, top, heat, True, BLOCK)
            p = _parameter(top_p, row, 1.0)
            if p < 1:
                total = _total(weights, n, BLOCK).to(tl.float64)
                limit = tl.ceil(tl.maximum(p, 0.0).to(tl.float64) * total).to(tl.int64)
                limit = tl.maximum(limit, 1)
                _cut(scores, weights, n, limit, top, heat, False, BLOCK)
            share = _parameter(min_p, row, tl.full([], 0.0, tl.float32))
            least = tl.ceil(tl.minimum(share, 1.0) * 1073741824.0)
            least = tl.where(share > 0, least, 0.0).to(tl.int32)
            number = _parameter(seed, row, tl.full([], 0, tl.int64))
            counter = _parameter(position, row, tl.full([], 0, tl.int32))
            token = _draw(weights, n, least, number, counter, BLOCK)
    tl.store(token_out + row, token)
    if logprob_out is not None:
        tops = tl.load(raw_largest + here, mask=i < chunks, other=-INFINITY)
        sums = tl.load(raw_sum + here, mask=i < chunks, other=0.0)
        raw_top = tl.max(tops, 0)
        gaps = tl.where(tops < raw_top, tops - raw_top, 0.0)
        total = tl.sum(sums * tl.exp(gaps), 0)
        x = _clean(tl.load(logits + row.to(tl.int64) * logits_stride + token))
        gap = tl.where(x == raw_top, 0.0, x - raw_top)
        tl.store(logprob_out + row, tl.where(x > -INFINITY, gap - tl.log(total), -INFINITY))


def sample(
    logits, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, seed, position, history, prompt_lens, history_lens, token, logprob, empty,
):  # fmt: skip
    """Tensors as the op describes them, each contiguous but for rows of logits and history.
    ``empty(shape, dtype)`` makes scratch."""
    rows, n = logits.shape
    if rows == 0:
        return
    chosen = configuration("sample", logits.device, logits.dtype, n)
    of_row = configuration("sample_row", logits.device, logits.dtype, n)
    chunks = triton.cdiv(n, chosen["CHUNK"])
    power = triton.next_power_of_2(chunks)
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    marks = scores = weights = raw_largest = raw_sum = None
    if any(p is not None for p in penalties):
        marks = empty((rows, n), torch.int32).zero_()
        room = history.shape[1]
        if room:
            launch(
                count_kernel, (rows, triton.cdiv(room, 1024)), marks, history, history.stride(0),
                prompt_lens, history_lens, room, n, BLOCK=1024, num_warps=chosen["num_warps"],
            )  # fmt: skip
    if temperature is not None:
        scores = empty((rows, n), torch.float32)
        weights = empty((rows, n), torch.int32)
    largest = empty((rows, chunks), torch.float32)
    largest_at = empty((rows, chunks), torch.int32)
    if logprob is not None:
        raw_largest, raw_sum = (empty((rows, chunks), torch.float32) for _ in range(2))
    launch(
        scan_kernel, (rows, chunks), logits, logits.stride(0), marks, *penalties, scores, largest,
        largest_at, raw_largest, raw_sum, n, chunks, enable_fp_fusion=False, **chosen,
    )  # fmt: skip
    if temperature is not None:
        launch(
            weights_kernel, (rows, chunks), scores, weights, temperature, largest, n, chunks,
            CHUNKS=power, enable_fp_fusion=False, **chosen,
        )  # fmt: skip
    launch(
        choose_kernel, (rows,), logits, logits.stride(0), scores, weights, largest, largest_at,
        raw_largest, raw_sum, temperature, top_k, top_p, min_p, seed, position, token, logprob, n,
        chunks, CHUNKS=power, enable_fp_fusion=False, **of_row,
    )  # fmt: skip
