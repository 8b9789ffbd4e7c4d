import pytest
import torch
from cases import CUDA, DTYPES, HEADS, RAGGED, PagedBatch, beside, dtype_name, rand, relaid
from compare import assert_close, poisoned

from pyllm import _C
from pyllm.ops import alloc, device, paged_attention
from pyllm.ops._attention import attend, window_sides

INF = float("inf")


class Case:
    """Queries, and caches that hold NaN wherever nothing was written."""

    def __init__(self, sequences, heads=(9, 3, 64), dtype=torch.float32, cache_dtype=None, **pages):
        self.batch = PagedBatch(sequences, **pages)
        n_heads, kv_heads, self.head_dim = heads
        cache_dtype = cache_dtype or dtype
        self.q = rand(self.batch.tokens, n_heads, self.head_dim, dtype=dtype)
        self.keys, self.values = [], []
        fill = float("nan") if cache_dtype.is_floating_point else 127
        self.caches = self.batch.caches(kv_heads, self.head_dim, cache_dtype, fill)
        for b, n in enumerate(self.batch.context_lens.tolist()):
            at = torch.arange(n)
            pages = self.batch.page_table[b].long()[at // self.batch.page_size]
            for i, rows in enumerate((self.keys, self.values)):
                x = rand(n, kv_heads, self.head_dim, seed=2 * b + i + 1)
                if not cache_dtype.is_floating_point:
                    x = (x * 30).round().clamp(-127, 127)
                rows.append(x.to(cache_dtype))
                self.caches[i][pages, at % self.batch.page_size] = rows[-1]

    def run(self, q=None, *, backend="cpu", **options):
        names = ("cu_seqlens_q", "page_table", "context_lens")
        tables = {name: getattr(self.batch, name) for name in names}
        q = self.q if q is None else q
        return paged_attention(q, *self.caches, **{**tables, **options}, backend=backend)

    def formula(self, dtype, window=None, k_scale=None, v_scale=None, **options):
        """The formula sequence by sequence, computed in `dtype`."""
        defaults = {"scale": self.head_dim**-0.5, "softcap": None, "alibi_slopes": None}
        parts = []
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            k = k if k_scale is None else k.to(dtype) * k_scale.to(dtype)[:, None]
            v = v if v_scale is None else v.to(dtype) * v_scale.to(dtype)[:, None]
            q = self.q[self.batch.cu_seqlens_q[b] : self.batch.cu_seqlens_q[b + 1]]
            parts.append(
                attend(
                    q, k, v, sides=window_sides(window, causal=True), bias=None, dtype=dtype,
                    **{**defaults, "sinks": None, **options},
                )[0]
            )  # fmt: skip
        return torch.cat(parts)

    def check(self, backend="cpu", **options):
        options = beside(self.q, options)
        out = poisoned(self.q.shape, self.q.dtype)
        assert self.run(**options, out=out, backend=backend) is out
        exact = self.formula(torch.float64, **options)
        assert_close(out, exact, self.formula(self.q.dtype, **options))


@pytest.mark.parametrize("sequences", RAGGED, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_matches_reference(sequences, heads, dtype):
    Case(sequences, heads, dtype).check()


def test_caches_may_lie_head_by_head():
    case = Case([(1, 300), (3, 40)])
    expected = case.run()
    case.caches = [relaid(cache, 0, 2, 1, 3) for cache in case.caches]
    assert not case.caches[0].is_contiguous()
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8], ids=dtype_name)
def test_keys_may_lie_side_by_side(cache_dtype, page_size):
    sequences = [(1, 300), (3, 40), (70, 100), (1, 0)]
    for heads in [(9, 3, 64), (4, 4, 80), (2, 1, 7), (1, 1, 1)]:
        case = Case(sequences, heads, cache_dtype=cache_dtype, page_size=page_size)
        for options in ({}, {"window": 20}, {"window": 150, "softcap": 5.0}):
            expected = case.run(**options)
            plain, case.caches = case.caches, (relaid(case.caches[0], 0, 2, 3, 1), case.caches[1])
            assert heads[2] == 1 or case.caches[0].stride(1) == 1
            assert torch.equal(case.run(**options), expected)
            case.caches = plain


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_float32_queries_over_half_caches(cache_dtype, page_size):
    for sequences in RAGGED:
        Case(sequences, cache_dtype=cache_dtype, page_size=page_size).check()


OPTIONS = {
    "scale": {"scale": 0.3},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "window as a pair": {"window": (260, 0)},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": torch.tensor([2.0**-i for i in range(9)])},
    "sinks": {"sinks": torch.tensor([0.0, 1, -1, 5, -INF, 2, -3, 0.5, 30])},
    "all": {"window": 300, "softcap": 8.0, "alibi_slopes": torch.rand(9), "sinks": torch.ones(9)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_options(options, dtype):
    for sequences in RAGGED:
        Case(sequences, dtype=dtype).check(**options)


def test_int8_cache():
    scales = {"k_scale": torch.tensor([0.02, 0.05, 0.01]), "v_scale": torch.tensor([0.1, 0.03, 1])}
    for sequences in RAGGED:
        case = Case(sequences, cache_dtype=torch.int8)
        case.check(**scales)
        one = {"k_scale": torch.full((3,), 0.03), "v_scale": torch.full((3,), 0.5)}
        assert torch.equal(case.run(k_scale=0.03, v_scale=0.5), case.run(**one))


def test_the_reference_is_the_formula():
    for options in OPTIONS.values():
        case = Case([(5, 40), (1, 7)], cache_dtype=torch.float16)
        expected = case.formula(torch.float32, **options)
        assert torch.equal(case.run(backend="reference", **options), expected)


def test_a_long_context():
    Case([(1, 5000), (70, 1200)], (4, 2, 64), torch.float32, torch.float16).check()


def cut(case, pieces, **options):
    """The result for one sequence, its new tokens given in pieces of these lengths."""
    past = int(case.batch.context_lens[0]) - case.batch.tokens
    parts, at = [], 0
    for n in pieces:
        now = {
            "cu_seqlens_q": torch.tensor([0, n], dtype=torch.int32),
            "context_lens": torch.tensor([past + at + n], dtype=torch.int32),
        }
        parts.append(case.run(case.q[at : at + n], **now, **options))
        at += n
    assert at == case.batch.tokens
    return torch.cat(parts)


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all options"])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=dtype_name)
def test_the_same_bits_however_a_prompt_is_cut(options, cache_dtype):
    n = 600
    case = Case([(n, 0)], cache_dtype=cache_dtype)
    whole = case.run(**options)
    for size in (1, 3, 7, 64, 250):
        pieces = [size] * (n // size) + ([n % size] if n % size else [])
        assert torch.equal(cut(case, pieces, **options), whole), f"in pieces of {size}"


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_same_bits_for_any_heads(heads):
    case = Case([(40, 250)], heads)
    assert torch.equal(cut(case, [1] * 30 + [9, 1]), case.run())


def test_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads():
    sequences = [(1, 700), (130, 300), (0, 9), (5, 40), (1, 3)]
    case = Case(sequences)
    whole = case.run()
    for b in range(len(sequences)):
        part = slice(*case.batch.cu_seqlens_q[b : b + 2].tolist())
        alone = {
            "cu_seqlens_q": torch.tensor([0, part.stop - part.start], dtype=torch.int32),
            "page_table": case.batch.page_table[b : b + 1],
            "context_lens": case.batch.context_lens[b : b + 1],
        }
        assert torch.equal(case.run(case.q[part], **alone), whole[part])
    threads = _C.num_threads()
    try:
        for n in (1, 3):
            _C.set_num_threads(n)
            assert torch.equal(case.run(), whole)
    finally:
        _C.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), INF], ids=str)
def test_keys_that_are_not_visible_do_not_matter(value):
    case = Case([(90, 200)])
    before = case.run(window=70)
    for cache in case.caches:  # key 250: seen by the queries at 250 to 319, which begin at 200
        cache[case.batch.page_table[0, 250 // 16], 250 % 16] = value
    after = case.run(window=70)
    assert torch.equal(after[:50], before[:50])
    assert after[50:].isnan().all()
    case = Case([(90, 200)])
    for cache in case.caches:
        cache[case.batch.page_table[0, 100 // 16], 100 % 16] = value
    assert torch.equal(case.run(window=70), before)


def test_non_finite_queries_stay_in_their_row():
    case = Case([(5, 40), (1, 7)])
    before = case.run()
    q = case.q.clone()
    q[2, 4, 9], q[5, 0, 0] = float("nan"), INF
    after = case.run(q)
    assert after[2, 4].isnan().all()
    assert after[5, 0].isnan().all()
    same = torch.ones(6, 9, dtype=torch.bool)
    same[2, 4] = same[5, 0] = False
    assert torch.equal(after[same], before[same])


def test_views_of_a_fused_projection_and_of_a_shared_cache():
    case = Case([(5, 40), (1, 7)])
    qkv = torch.cat((case.q, rand(6, 6, 64)), 1)
    both = torch.stack(case.caches, 2)  # [pages, page_size, 2, Hkv, D]
    expected = case.run()
    case.caches = both.unbind(2)
    assert torch.equal(case.run(qkv[:, :9]), expected)


def test_nothing_to_do():
    case = Case([(0, 9), (0, 0)])
    assert case.run().shape == (0, 9, 64)


class Arena:
    """Keeps what a captured plan points to."""

    def __init__(self):
        self.tensors = []

    def empty(self, shape, dtype):
        self.tensors.append(poisoned(shape, dtype))
        return self.tensors[-1]


@pytest.fixture
def captured():
    """A case, the output of its plan and the plan."""
    case, plan = Case([(2, 30), (3, 300)]), _C.Plan()
    arena = Arena()
    with alloc.use(arena):
        plan.begin()
        out = case.run()
        plan.end()
    yield case, out, plan
    assert len(arena.tensors) == 2


def test_a_replay_follows_the_lengths(captured):
    case, out, plan = captured
    for lengths in ([32, 303], [32, 255], [5, 300]):
        case.batch.context_lens.copy_(ints(*lengths))
        plan.replay()
        assert torch.equal(out, case.run())


def test_a_sequence_without_keys_gives_zero(captured):
    case, out, plan = captured
    case.batch.context_lens[0] = 0
    plan.replay()
    assert (out[:2] == 0).all()
    assert out[2:].isfinite().all()


def test_a_replay_never_reads_outside_the_cache(captured):
    case, out, plan = captured
    for name, values in {
        "page_table": [2**31 - 1, -(2**31)],
        "context_lens": [2**31 - 1, -(2**31), 1],
        "cu_seqlens_q": [2**31 - 1, -(2**31), 1],
    }.items():
        original = getattr(case.batch, name).clone()
        for value in values:
            getattr(case.batch, name).fill_(value)
            plan.replay()
        getattr(case.batch, name).copy_(original)
    plan.replay()
    assert torch.equal(out, case.run())


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(5, 4, 64)}, "q: expected a multiple of the 3 KV heads, got 4 heads"),
        ({"q": torch.ones(5, 9, 32)}, r"k_cache: expected .*\(D is 32\)"),
        ({"q": torch.ones(5, 9, 64).int()}, "q: expected float32"),
        ({"q": torch.ones(6, 9, 64)}, "cu_seqlens_q: expected to run from 0 to 6"),
        ({"cu_seqlens_q": ints(0, 5, 2, 5)}, r"expected B \+ 1 = 3 entries, got 4"),
        ({"cu_seqlens_q": ints(0, 6, 5)}, "cu_seqlens_q: expected to run from 0 to 5 without"),
        ({"context_lens": ints(32, 2)}, r"context_lens\[1\]: expected at least .* 3 new .* got 2"),
        (
            {"context_lens": ints(32, 99), "page_table": torch.zeros(2, 4).int()},
            "page_table: expected a page for position 64 of sequence 1, got room for 64 positions",
        ),
        ({"context_lens": ints(40, 3)}, r"page_table\[0, 2\]: expected a page from 0 to .* got -7"),
        ({"context_lens": torch.tensor([32, 33])}, "context_lens: expected int32"),
        ({"softcap": -1.0}, "softcap at least 0"),
        ({"scale": float("nan")}, "scale and softcap: expected numbers"),
        ({"window": 0}, "window: expected at least 1 key, got 0"),
        ({"window": "all"}, "window: expected an int or"),
        ({"sinks": torch.ones(3)}, r"sinks: expected float32\[H\], got float32\[3\] \(H is 9\)"),
        ({"alibi_slopes": torch.ones(9).double()}, "alibi_slopes: expected float32"),
        ({"k_scale": torch.ones(9)}, r"k_scale: expected float32\[Hkv\]"),
        ({"out": torch.ones(5, 9, 64).half()}, "out: expected float32"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    case = Case([(2, 30), (3, 30)])
    with pytest.raises(ValueError, match=message):
        case.run(**arguments)


def test_a_head_dim_that_is_too_large():
    with pytest.raises(ValueError, match="head dim from 1 to 256, got 257"):
        Case([(1, 3)], (1, 1, 257)).run()


# --- CUDA's kernel, on the emulator and on a device: halves, head dims that are multiples of 8
HALVES = [torch.bfloat16, torch.float16]
DEVICE_HEADS = [heads for heads in HEADS if heads[2] % 8 == 0]
on_cuda = pytest.mark.parametrize("backend", CUDA)


@pytest.mark.parametrize("sequences", [*RAGGED, [(70, 1000)]], ids=str)
@pytest.mark.parametrize("heads", DEVICE_HEADS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@on_cuda
def test_device_matches_reference(sequences, heads, dtype, backend):
    Case(sequences, heads, dtype).check(backend=backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("page_size", [1, 5, 64])
@on_cuda
def test_device_options(options, page_size, backend):
    for sequences in RAGGED[2:]:
        Case(sequences, dtype=torch.float16, page_size=page_size).check(backend=backend, **options)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 2, 128), (2, 1, 256), (2, 2, 80)], ids=str)
@on_cuda
def test_device_reads_caches_of_bytes(cache_dtype, dtype, heads, backend):
    for sequences in [RAGGED[3], RAGGED[4], [(40, 600)]]:
        case = Case(sequences, heads, dtype, cache_dtype)
        scales = {"k_scale": torch.tensor([0.02, 0.05, 0.01]), "v_scale": torch.tensor([0.1, 3, 1])}
        case.check(backend=backend, **{name: s[: heads[1]] for name, s in scales.items()})
        # A cache of halves that holds the same numbers gives the same bits.
        expected = case.run(backend=backend)
        case.caches = [cache.to(dtype) for cache in case.caches]
        assert torch.equal(case.run(backend=backend), expected)


@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 1, 128), (2, 1, 256)], ids=str)
@on_cuda
def test_device_gives_the_same_bits_however_a_prompt_is_cut(heads, backend):
    case = Case([(70, 1000)], heads, torch.float16)
    whole = case.run(backend=backend)
    for pieces in ([1] * 10 + [60], [7] * 10, [40, 30]):
        assert torch.equal(cut(case, pieces, backend=backend), whole), pieces


@on_cuda
def test_device_gives_the_same_bits_alone_and_in_a_batch(backend):
    sequences = [(1, 700), (130, 300), (0, 9), (5, 40), (1, 3)]
    case = Case(sequences, dtype=torch.bfloat16)
    whole = case.run(backend=backend)
    for b in range(len(sequences)):
        part = slice(*case.batch.cu_seqlens_q[b : b + 2].tolist())
        alone = {
            "cu_seqlens_q": ints(0, part.stop - part.start),
            "page_table": case.batch.page_table[b : b + 1],
            "context_lens": case.batch.context_lens[b : b + 1],
        }
        assert torch.equal(case.run(case.q[part], backend=backend, **alone), whole[part])


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("new", [2, 90])
def test_device_keys_that_are_not_visible_do_not_matter(cache_dtype, new):
    check_keys_that_are_not_visible_do_not_matter(cache_dtype, new, backend="emulator")


def check_keys_that_are_not_visible_do_not_matter(cache_dtype, new, backend):
    case = Case([(new, 600)], (3, 1, 64), torch.float16, cache_dtype)
    before = case.run(window=70, backend=backend)
    nan = torch.full((64,), float("nan")).to(cache_dtype)
    key = 600 + new - 80  # of the window of some queries only
    case.caches[1][case.batch.page_table[0, key // 16], key % 16] = nan
    after = case.run(window=70, backend=backend)
    at = torch.arange(600, 600 + new)
    sees = (at >= key) & (at - 70 < key)
    assert after[sees].isnan().all()
    assert torch.equal(after[~sees], before[~sees])


def test_device_never_reads_outside_the_cache():
    check_never_reads_outside_the_cache(backend="emulator")


def check_never_reads_outside_the_cache(backend):
    case = Case([(2, 30), (3, 600)], dtype=torch.float16)
    expected = case.run(backend=backend)
    for name in ("page_table", "context_lens", "cu_seqlens_q"):
        original = getattr(case.batch, name).clone()
        for value in (2**31 - 1, -(2**31), 1):
            getattr(case.batch, name).fill_(value)
            case.run(backend=backend)
        getattr(case.batch, name).copy_(original)
    assert torch.equal(case.run(backend=backend), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8], ids=dtype_name)
def test_device_reads_keys_once_for_all_heads_of_a_group(cache_dtype):
    case = Case([(1, 1023)], (8, 2, 128), torch.float16, cache_dtype)
    device.emulator_report()
    case.run(backend="emulator")
    attention, combine = device.emulator_report()
    assert attention["kernel"] == "paged_attention"
    for name in ("k_cache", "v_cache"):
        used = 1024 * 2 * 128 * cache_dtype.itemsize
        assert attention["buffers"][name]["read"] == used
        assert attention["buffers"][name]["read_sectors"] * 32 == used
    for report in (attention, combine):
        for site in report["sites"]:
            if site["space"] == "shared":
                assert site["transactions"] == site["ideal"], site


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(5, 9, 64)}, r"q: expected float16\|bfloat16"),
        (
            {"q": torch.ones(5, 9, 64).bfloat16()},
            r"k_cache: expected bfloat16\|int8\|float8_e4m3fn",
        ),
        ({"q": torch.ones(5, 4, 64).half()}, "q: expected a multiple of the 3 KV heads"),
        ({"cu_seqlens_q": ints(0, 5, 2, 5)}, r"expected B \+ 1 = 3 entries, got 4"),
        ({"sinks": torch.ones(3)}, r"sinks: expected float32\[H\]"),
        ({"k_scale": torch.ones(9)}, r"k_scale: expected float32\[Hkv\]"),
    ],
    ids=str,
)
def test_bad_arguments_on_a_device(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case([(2, 30), (3, 30)], dtype=torch.float16).run(**arguments, backend="emulator")


def test_device_refuses_rows_of_bytes_that_are_not_on_16():
    with pytest.raises(ValueError, match="k_cache: expected a head dim that is a multiple of 16"):
        Case([(1, 3)], (1, 1, 40), torch.float16, torch.int8).run(backend="emulator")


# --- Triton's kernels, in its interpreter where there is no device: small sizes, as that is slow


@pytest.mark.parametrize("heads", [(3, 1, 7), (4, 2, 32), (8, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_matches_reference(heads, backend, dtype):
    for sequences in [RAGGED[3], [(1, 515), (0, 3), (2, 63)]]:
        Case(sequences, heads, dtype, page_size=5).check(backend=backend)
    Case([(40, 600)], heads, dtype, page_size=64).check(backend=backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_options(options, backend):
    for sequences in [[(5, 40), (1, 520)], [(40, 500)]]:
        Case(sequences, dtype=torch.bfloat16).check(backend=backend, **options)


@pytest.mark.parametrize(
    "cache_dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=dtype_name
)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_reads_caches_of_other_dtypes(cache_dtype, backend):
    dtype = torch.float32 if cache_dtype == torch.bfloat16 else torch.float16
    scales = {"k_scale": torch.tensor([0.02, 0.05]), "v_scale": torch.tensor([0.1, 3])}
    for sequences in [RAGGED[3], [(40, 100)]]:
        case = Case(sequences, (4, 2, 32), dtype, cache_dtype)
        case.check(backend=backend, **scales)
        expected = case.run(backend=backend, **scales)
        # A cache of q's dtype that holds the same numbers gives the same bits.
        case.caches = [cache.to(dtype) for cache in case.caches]
        assert torch.equal(case.run(backend=backend, **scales), expected)
    case.caches[0] = relaid(case.caches[0], 0, 2, 3, 1)
    assert torch.equal(case.run(backend=backend, **scales), expected)


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_gives_the_same_bits_cut_or_whole_alone_or_in_a_batch(backend):
    case = Case([(70, 1000)], (3, 1, 64), torch.float16)
    whole = case.run(backend=backend)
    for pieces in ([1] * 5 + [65], [7] * 10, [40, 30]):
        assert torch.equal(cut(case, pieces, backend=backend), whole), pieces
    sequences = [(1, 700), (70, 300), (0, 9), (5, 40)]
    case = Case(sequences, (4, 2, 32), torch.bfloat16)
    whole = case.run(backend=backend)
    for b in range(len(sequences)):
        part = slice(*case.batch.cu_seqlens_q[b : b + 2].tolist())
        alone = {
            "cu_seqlens_q": torch.tensor([0, part.stop - part.start], dtype=torch.int32),
            "page_table": case.batch.page_table[b : b + 1],
            "context_lens": case.batch.context_lens[b : b + 1],
        }
        assert torch.equal(case.run(case.q[part], backend=backend, **alone), whole[part])


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_keys_that_are_not_visible_do_not_matter(backend):
    check_keys_that_are_not_visible_do_not_matter(torch.float16, 2, backend)
    check_keys_that_are_not_visible_do_not_matter(torch.float8_e4m3fn, 40, backend)


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_never_reads_outside_the_cache(backend):
    check_never_reads_outside_the_cache(backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(5, 4, 64).half()}, "q: expected a multiple of the 3 KV heads"),
        (
            {"q": torch.ones(5, 9, 64).bfloat16()},
            r"k_cache: expected bfloat16\|int8\|float8_e4m3fn",
        ),
        ({"cu_seqlens_q": ints(0, 5, 2, 5)}, r"expected B \+ 1 = 3 entries, got 4"),
        ({"sinks": torch.ones(3)}, r"sinks: expected float32\[H\]"),
        ({"k_scale": torch.ones(9)}, r"k_scale: expected float32\[Hkv\]"),
    ],
    ids=str,
)
def test_bad_arguments_for_triton(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case([(2, 30), (3, 30)], dtype=torch.float16).run(**arguments, backend="triton")
