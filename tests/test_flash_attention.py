import pytest
import torch
from cases import CUDA, DTYPES, HEADS, beside, dtype_name, rand, strided
from compare import EPS, assert_close, poisoned

from pyllm import _C
from pyllm.ops import device, flash_attention, flash_attention_backward
from pyllm.ops._attention import attend, window_sides
from pyllm.ops.registry import OPS

INF = float("inf")

# (batch, queries, keys): size one, empty, odd, cross-attention, fewer keys than queries, long.
SIZES = [(1, 1, 1), (0, 4, 4), (2, 0, 5), (2, 5, 0), (3, 17, 17), (2, 3, 77), (1, 40, 9)]
SIZES += [(2, 130, 130), (1, 2, 700), (1, 300, 600)]

# What CUDA's kernel serves: halves, head dims that are multiples of 8.
RUNS = [("cpu", dtype) for dtype in DTYPES]
RUNS += [(backend, dtype) for backend in CUDA for dtype in (torch.bfloat16, torch.float16)]
runs = pytest.mark.parametrize(
    ("backend", "dtype"), RUNS, ids=[f"{backend}-{dtype_name(dtype)}" for backend, dtype in RUNS]
)
backends = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), *((backend, torch.float16) for backend in CUDA)],
    ids=["cpu", *CUDA],
)


def inputs(batch, queries, keys, heads=(6, 2, 64), dtype=torch.float32):
    n_heads, kv_heads, d = heads
    q = rand(batch, queries, n_heads, d, dtype=dtype)
    k, v = (rand(batch, keys, kv_heads, d, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v


def formula(q, k, v, dtype, causal=False, window=None, bias=None, **options):
    """The formula, computed in `dtype`: the output and the log-sum-exp."""
    defaults = {"scale": q.shape[-1] ** -0.5, "softcap": None, "alibi_slopes": None, "sinks": None}
    results = [
        attend(
            q[b], k[b], v[b], sides=window_sides(window, causal), dtype=dtype,
            bias=None if bias is None else bias.expand(q.shape[0], -1, -1, -1)[b],
            **{**defaults, **options},
        )
        for b in range(q.shape[0])
    ]  # fmt: skip
    if not results:
        return q.to(dtype), q[..., 0].to(dtype)
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def check(q, k, v, backend, **options):
    options = beside(q, options)
    out = poisoned(q.shape, q.dtype)
    result, lse = flash_attention(q, k, v, **options, out=out, return_lse=True, backend=backend)
    assert result is out
    exact, exact_lse = formula(q, k, v, torch.float64, **options)
    same, same_lse = formula(q, k, v, q.dtype, **options)
    assert_close(out, exact, same)
    assert_close(lse, exact_lse, same_lse, what="lse")
    assert torch.equal(flash_attention(q, k, v, **options, backend=backend), out)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@runs
def test_matches_reference(sizes, causal, backend, dtype):
    check(*inputs(*sizes, dtype=dtype), backend, causal=causal)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@runs
def test_heads(heads, backend, dtype):
    if backend in CUDA and heads[2] % 8:
        with pytest.raises(ValueError, match="q: expected a head dim that is a multiple of 8"):
            check(*inputs(2, 7, 9, heads, dtype), backend)
    else:
        check(*inputs(2, 70, 90, heads, dtype), backend, causal=True)


OPTIONS = {
    "scale": {"scale": 0.3},
    "window": {"window": 20, "causal": True},
    "window, not causal": {"window": 7},
    "window to both sides": {"window": (5, 11)},
    "window to the right": {"window": (-1, 3)},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": torch.tensor([2.0**-i for i in range(6)])},
    "alibi, causal": {"alibi_slopes": torch.full((6,), 0.3), "causal": True},
    "sinks": {"sinks": torch.tensor([0.0, 1, -INF, 5, -3, 30])},
    "bias": {"bias": rand(3, 6, 33, 150, seed=5)},
    "bias for all heads": {"bias": rand(3, 1, 33, 150, seed=6), "causal": True},
    "bias for all sequences": {"bias": rand(1, 6, 33, 150, seed=7).half()},
    "key mask": {"bias": torch.where(torch.arange(150) % 7 == 3, -INF, 0.0)[None, None, None]},
    "mask of everything": {"bias": torch.full((3, 1, 1, 150), -INF)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@runs
def test_options(options, backend, dtype):
    check(*inputs(3, 33, 150, dtype=dtype), backend, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@runs
def test_matches_torch(causal, backend, dtype):
    q, k, v = inputs(2, 130, 130, (6, 2, 64), dtype)

    def torch_attention(dtype):
        heads_first = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    result = flash_attention(q, k, v, causal=causal, backend=backend)
    assert_close(result, torch_attention(torch.float64), torch_attention(dtype))


def test_the_reference_is_the_formula():
    q, k, v = inputs(3, 33, 150)
    for options in OPTIONS.values():
        result = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
        expected = formula(q, k, v, torch.float32, **options)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@backends
def test_ragged_dense_alone_and_any_threads_give_the_same_bits(causal, backend, dtype):
    lengths = [(5, 9), (0, 3), (130, 300), (1, 0), (1, 700), (7, 2)]
    parts = [inputs(1, n, m, dtype=dtype) for n, m in lengths]
    q, k, v = (torch.cat([p[i][0] for p in parts]) for i in range(3))
    cu_q, cu_k = (
        torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in range(2)
    )
    ragged = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": causal}
    whole, lse = flash_attention(q, k, v, **ragged, return_lse=True, backend=backend)
    for b, part in enumerate(parts):
        alone = flash_attention(*part, causal=causal, return_lse=True, backend=backend)
        here = slice(cu_q[b], cu_q[b + 1])
        assert torch.equal(alone[0][0], whole[here])
        assert torch.equal(alone[1][0], lse[here])
    reference = flash_attention(q, k, v, **ragged, return_lse=True, backend="reference")
    assert torch.allclose(whole, reference[0], atol=1e-5 if dtype == torch.float32 else 2e-3)
    assert torch.allclose(lse, reference[1], atol=1e-5)
    threads = _C.num_threads()
    try:
        _C.set_num_threads(3)
        assert torch.equal(flash_attention(q, k, v, **ragged, backend=backend), whole)
    finally:
        _C.set_num_threads(threads)


@backends
def test_causal_rows_do_not_depend_on_how_many_are_asked_for(backend, dtype):
    q, k, v = inputs(1, 300, 300, dtype=dtype)
    whole = flash_attention(q, k, v, causal=True, backend=backend)
    for n in (1, 3, 31, 32, 33, 200):
        assert torch.equal(
            flash_attention(q[:, -n:], k, v, causal=True, backend=backend), whole[:, -n:]
        )


@backends
def test_strided_inputs(backend, dtype):
    q, k, v = inputs(2, 33, 40, dtype=dtype)
    expected = flash_attention(q, k, v, backend=backend)
    wider = (strided(x, extra=8) for x in (q, k, v))
    assert torch.equal(flash_attention(*wider, backend=backend), expected)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(flash_attention(*heads_first, backend=backend), expected)


@pytest.mark.parametrize("value", [float("nan"), INF], ids=str)
@pytest.mark.parametrize("key", [0, 15, 16, 70, 149])
@backends
def test_keys_that_are_not_visible_do_not_matter(value, key, backend, dtype):
    q, k, v = inputs(1, 150, 150, dtype=dtype)
    options = {"causal": True, "window": 40, "backend": backend}
    before = flash_attention(q, k, v, **options)
    k[0, key], v[0, key] = value, value
    after = flash_attention(q, k, v, **options)
    sees = torch.zeros(150, dtype=torch.bool)
    sees[key : key + 40] = True
    assert after[0, sees].isnan().all()
    assert torch.equal(after[0, ~sees], before[0, ~sees])


@backends
def test_values_that_are_not_finite_reach_those_who_see_them(backend, dtype):
    q, k, v = inputs(1, 150, 150, dtype=dtype)
    before = flash_attention(q, k, v, causal=True, backend=backend)
    v[0, 70, 0, 3], v[0, 140, 1, 5], v[0, 141, 1, 5] = INF, float("nan"), -INF
    after = flash_attention(q, k, v, causal=True, backend=backend)
    changed = torch.zeros(after.shape, dtype=torch.bool)
    changed[0, 70:, :3, 3] = changed[0, 140:, 3:, 5] = True
    assert (after[0, 70:, :3, 3] == INF).all()
    assert after[0, 140:, 3:, 5].isnan().all()
    assert torch.equal(after[~changed], before[~changed])


@backends
def test_a_row_without_keys(backend, dtype):
    q, k, v = inputs(1, 5, 2, dtype=dtype)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert (out[0, :3] == 0).all()
    assert (lse[0, :3] == -INF).all()
    assert lse[0, 3:].isfinite().all()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


CU = {"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 6)}
RAGGED = {"q": torch.ones(5, 4, 8), "k": torch.ones(6, 2, 8), "v": torch.ones(6, 2, 8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(1, 5, 3, 8)}, "q: expected a multiple of the 2 KV heads, got 3 heads"),
        ({"q": torch.ones(2, 5, 4, 8)}, r"k: expected .*\(B is 2\)"),
        ({"v": torch.ones(1, 6, 2, 8).half()}, "v: expected float32"),
        ({"q": torch.ones(5, 4, 8)}, r"q: expected .*\[B Sq H D\]"),
        ({"bias": torch.ones(1, 3, 5, 6)}, r"bias: expected what broadcasts to \[1, 4, 5, 6\]"),
        ({"bias": torch.ones(1, 1, 5, 6).int()}, "bias: expected float32"),
        ({**RAGGED, "cu_seqlens_q": ints(0, 5)}, "cu_seqlens_q and cu_seqlens_k come together"),
        (
            {**RAGGED, **CU, "cu_seqlens_k": ints(0, 7)},
            "cu_seqlens_k: expected to run from 0 to 6",
        ),
        (
            {**RAGGED, **CU, "cu_seqlens_k": ints(0, 3, 6)},
            r"cu_seqlens_k: expected int32\[B\+1\]",
        ),
        (
            {
                **RAGGED,
                "cu_seqlens_q": ints(0, 5),
                "cu_seqlens_k": ints(0, 6),
                "bias": torch.ones(6),
            },
            "only a dense batch takes one",
        ),
        ({"window": (1, 2, 3)}, r"window: expected an int or \(left, right\)"),
        ({"softcap": -1.0}, "softcap at least 0"),
        ({"out": torch.ones(1, 5, 4, 8).half()}, "out: expected float32"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    good = {"q": torch.ones(1, 5, 4, 8), "k": torch.ones(1, 6, 2, 8), "v": torch.ones(1, 6, 2, 8)}
    with pytest.raises(ValueError, match=message):
        flash_attention(**{**good, **arguments}, backend="cpu")


def half(*shape):
    return torch.ones(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(1, 5, 4, 8)}, r"q: expected float16\|bfloat16"),
        ({"k": half(1, 6, 2, 8).bfloat16()}, "k: expected float16"),
        ({"q": half(1, 5, 3, 8)}, "q: expected a multiple of the 2 KV heads, got 3 heads"),
        ({"v": half(1, 6, 2, 12)[..., :8]}, "v: expected rows that begin on multiples of 16 bytes"),
        ({"q": half(1, 5, 4, 16)[..., 1:9]}, "q: expected rows that begin on multiples of 16"),
        ({"out": half(1, 5, 4, 12)[..., :8]}, "out: expected rows that begin on multiples of 16"),
        ({"cu_seqlens_q": ints(0, 5)}, r"q: expected .*\[Tq H D\]"),
        ({"softcap": -1.0}, "softcap at least 0"),
        ({"v": half(1, 6, 2, 8).to("meta")}, "v: expected it on cpu, got meta"),
    ],
    ids=str,
)
def test_bad_arguments_on_a_device(arguments, message):
    good = {"q": half(1, 5, 4, 8), "k": half(1, 6, 2, 8), "v": half(1, 6, 2, 8)}
    with pytest.raises(ValueError, match=message):
        flash_attention(**{**good, **arguments}, backend="emulator")


def test_keys_and_values_are_read_once_a_tile_and_no_bank_has_to_wait():
    q, k, v = inputs(1, 256, 256, (2, 2, 128), torch.float16)
    device.emulator_report()
    flash_attention(q, k, v, backend="emulator")
    (report,) = device.emulator_report()
    assert report["grid"] == [2, 2, 1]
    for name, times in {"q": 1, "k": 2, "v": 2}.items():
        assert report["buffers"][name]["read"] == times * q.nbytes
    assert report["buffers"]["out"]["written"] == q.nbytes
    for site in report["sites"]:
        assert site["transactions"] == site["ideal"], site


@pytest.mark.parametrize("seed", [2, 3])
def test_any_order_of_lanes(seed):
    q, k, v = inputs(1, 150, 200, (2, 1, 128), torch.float16)
    expected = flash_attention(q, k, v, causal=True, backend="emulator")
    try:
        device.library("emulator").configure(seed=seed, threads=1)
        assert torch.equal(flash_attention(q, k, v, causal=True, backend="emulator"), expected)
    finally:
        device.library("emulator").configure(seed=1, threads=2)


# --- Triton's kernels, in its interpreter where there is no device: small sizes, as that is slow


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_matches_reference(backend, dtype):
    for sizes in [(1, 1, 1), (0, 4, 4), (2, 0, 5), (2, 5, 0), (2, 3, 77), (1, 40, 9)]:
        check(*inputs(*sizes, (2, 1, 7), dtype), backend)
    for heads in [(4, 2, 48), (1, 1, 256)]:
        check(*inputs(1, 70, 90, heads, dtype), backend, causal=True)
    check(*inputs(1, 140, 160, (1, 1, 64), dtype), backend, causal=True)


TRITON_OPTIONS = [
    "window",
    "window to both sides",
    "window to the right",
    "softcap",
    "alibi, causal",
]
TRITON_OPTIONS += ["sinks", "bias for all heads", "mask of everything"]


@pytest.mark.parametrize("options", TRITON_OPTIONS)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_options(options, backend):
    check(*inputs(3, 33, 150, (6, 2, 32), torch.bfloat16), backend, **OPTIONS[options])


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_bits_and_what_is_not_finite(backend):
    dtype = torch.float16
    test_keys_that_are_not_visible_do_not_matter(float("nan"), 70, backend, dtype)
    test_values_that_are_not_finite_reach_those_who_see_them(backend, dtype)
    test_a_row_without_keys(backend, dtype)
    q, k, v = inputs(1, 150, 150, (2, 1, 32), dtype)
    whole = flash_attention(q, k, v, causal=True, backend=backend)
    for n in (1, 33, 100):
        part = flash_attention(q[:, -n:], k, v, causal=True, backend=backend)
        assert torch.equal(part, whole[:, -n:])
    q, k, v = (strided(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    assert torch.equal(flash_attention(q, k, v, causal=True, backend=backend), whole)
    negative = flash_attention(-q, k, v, causal=True, scale=-(32**-0.5), backend=backend)
    assert torch.equal(negative, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": half(1, 5, 3, 8)}, "q: expected a multiple of the 2 KV heads, got 3 heads"),
        ({"q": half(1, 5, 4, 300)}, r"k: expected .*\(D is 300\)"),
        ({"k": half(1, 6, 2, 8).bfloat16()}, "k: expected float16"),
        ({"bias": torch.ones(1, 1, 5, 6).int()}, "bias: expected float32"),
        ({"cu_seqlens_q": ints(0, 5)}, "cu_seqlens_q and cu_seqlens_k come together"),
        ({"softcap": -1.0}, "softcap at least 0"),
        ({"out": half(1, 5, 4, 8).float()}, "out: expected float16"),
    ],
    ids=str,
)
def test_bad_arguments_for_triton(arguments, message):
    good = {"q": half(1, 5, 4, 8), "k": half(1, 6, 2, 8), "v": half(1, 6, 2, 8)}
    with pytest.raises(ValueError, match=message):
        flash_attention(**{**good, **arguments}, backend="triton")


# --- backward

BACKWARD_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "all but bias": {"window": (20, 3), "softcap": 5.0, "alibi_slopes": torch.full((4,), 0.3)},
    "sinks": {"sinks": torch.tensor([0.0, 1, -3, 5])},
    "bias": {"bias": rand(1, 4, 33, 70, seed=5), "scale": -0.3},
    "bias for all heads": {"bias": rand(2, 1, 33, 70, seed=6), "causal": True},
}


def autograd(inputs, gradients, dtype, **options):
    """The gradients by PyTorch of the formula computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].to(dtype).requires_grad_()
            leaves.append(options[name])
    results = formula(*leaves[:3], dtype, **options)
    return torch.autograd.grad(results, leaves, [x.to(dtype) for x in gradients])


@pytest.mark.parametrize("options", BACKWARD_OPTIONS.values(), ids=BACKWARD_OPTIONS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16)],
    ids=["reference", "triton-float32", "triton-bfloat16"],
)
def test_gradients_are_those_of_autograd(options, backend, dtype):
    q, k, v = inputs(2, 33, 70, (4, 2, 40), dtype)
    do, dlse = rand(2, 33, 4, 40, dtype=dtype, seed=8), rand(2, 33, 4, seed=9)
    out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=backend)
    results = flash_attention_backward(do, q, k, v, out, lse, **options, dlse=dlse, backend=backend)
    results = [x for x in results if x is not None]
    exact = autograd((q, k, v), (do, dlse), torch.float64, **options)
    same = autograd((q, k, v), (do, dlse), dtype, **options)
    for name, result, e, s in zip(
        ("dq", "dk", "dv", "of option"), results, exact, same, strict=False
    ):
        # The last place of the log-sum-exp, which is float32, is a factor of all weights.
        floor = max(EPS[dtype], EPS[torch.float32] * lse.abs().max().item()) * e.abs().max().item()
        assert_close(result, e, s, what=name, floor=floor)
    assert len(results) == len(exact)


@pytest.mark.parametrize("backend", ["triton"])
def test_alone_and_in_a_ragged_batch_results_and_gradients_have_the_same_bits(backend):
    lengths = [(5, 9), (0, 3), (70, 130), (1, 0), (7, 2)]
    parts = [inputs(1, n, m, (2, 1, 32), torch.float16) for n, m in lengths]
    parts = [(rand(*p[0].shape, dtype=torch.float16, seed=4), *p) for p in parts]
    do, q, k, v = (torch.cat([p[i][0] for p in parts]) for i in range(4))
    cu = [torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() for i in range(2)]
    ragged = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "causal": True, "backend": backend}
    out, lse = flash_attention(q, k, v, **ragged, return_lse=True)
    whole = flash_attention_backward(do, q, k, v, out, lse, **ragged)
    for b, (do_, *qkv) in enumerate(parts):
        alone = flash_attention(*qkv, causal=True, return_lse=True, backend=backend)
        here = slice(*cu[0][b : b + 2].tolist())
        assert torch.equal(alone[0][0], out[here])
        assert torch.equal(alone[1][0], lse[here])
        alone = flash_attention_backward(do_, *qkv, *alone, causal=True, backend=backend)
        for i in range(3):
            here = slice(*cu[min(i, 1)][b : b + 2].tolist())
            assert torch.equal(alone[i][0], whole[i][here])
    # The reference of a ragged batch is that of its sequences: rounded, a thousandth away at most.
    wide = (x.double() for x in (do, q, k, v, out, lse))
    exact = flash_attention_backward(*wide, **{**ragged, "backend": "reference"})
    for result, e in zip(whole[:3], exact[:3], strict=True):
        assert_close(result, e, e.half(), floor=2 * EPS[torch.float16] * e.abs().max().item())


def test_a_bias_that_needs_no_gradient_is_not_differentiated(monkeypatch):
    backends, asked = OPS["flash_attention_backward"].backends, []
    reference = backends["reference"]
    monkeypatch.setitem(backends, "reference", lambda *a: (asked.append(a[-1]), reference(*a))[1])
    for needed in (False, True):
        q, k, v = inputs(1, 3, 5)
        bias = rand(3, 5).requires_grad_(needed)
        flash_attention(q.requires_grad_(), k, v, bias=bias, backend="reference").sum().backward()
        assert (bias.grad is not None) == needed
    assert asked == [False, True]
