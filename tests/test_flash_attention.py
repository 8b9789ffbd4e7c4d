import pytest
import torch
from cases import DTYPES, HEADS, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm import _C
from pyllm.ops import flash_attention
from pyllm.ops._attention import attend, window_sides

INF = float("inf")

# (batch, queries, keys): size one, empty, odd, cross-attention, fewer keys than queries, long.
SIZES = [(1, 1, 1), (0, 4, 4), (2, 0, 5), (2, 5, 0), (3, 17, 17), (2, 3, 77), (1, 40, 9)]
SIZES += [(2, 130, 130), (1, 2, 700), (1, 300, 600)]


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


def check(q, k, v, **options):
    out = poisoned(q.shape, q.dtype)
    result, lse = flash_attention(q, k, v, **options, out=out, return_lse=True, backend="cpu")
    assert result is out
    exact, exact_lse = formula(q, k, v, torch.float64, **options)
    same, same_lse = formula(q, k, v, q.dtype, **options)
    assert_close(out, exact, same)
    assert_close(lse, exact_lse, same_lse, what="lse")
    assert torch.equal(flash_attention(q, k, v, **options, backend="cpu"), out)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_matches_reference(sizes, causal, dtype):
    check(*inputs(*sizes, dtype=dtype), causal=causal)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_heads(heads, dtype):
    check(*inputs(2, 70, 90, heads, dtype), causal=True)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_options(options, dtype):
    check(*inputs(3, 33, 150, dtype=dtype), **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_matches_torch(causal, dtype):
    q, k, v = inputs(2, 130, 130, (6, 2, 64), dtype)

    def torch_attention(dtype):
        heads_first = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    result = flash_attention(q, k, v, causal=causal, backend="cpu")
    assert_close(result, torch_attention(torch.float64), torch_attention(dtype))


def test_the_reference_is_the_formula():
    q, k, v = inputs(3, 33, 150)
    for options in OPTIONS.values():
        result = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
        expected = formula(q, k, v, torch.float32, **options)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ragged_dense_alone_and_any_threads_give_the_same_bits(causal):
    lengths = [(5, 9), (0, 3), (130, 300), (1, 0), (1, 700), (7, 2)]
    parts = [inputs(1, n, m) for n, m in lengths]
    q, k, v = (torch.cat([p[i][0] for p in parts]) for i in range(3))
    cu_q, cu_k = (
        torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in range(2)
    )
    ragged = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": causal}
    whole, lse = flash_attention(q, k, v, **ragged, return_lse=True, backend="cpu")
    for b, part in enumerate(parts):
        alone = flash_attention(*part, causal=causal, return_lse=True, backend="cpu")
        here = slice(cu_q[b], cu_q[b + 1])
        assert torch.equal(alone[0][0], whole[here])
        assert torch.equal(alone[1][0], lse[here])
    reference = flash_attention(q, k, v, **ragged, return_lse=True, backend="reference")
    assert torch.allclose(whole, reference[0], atol=1e-5)
    assert torch.allclose(lse, reference[1], atol=1e-5)
    threads = _C.num_threads()
    try:
        _C.set_num_threads(3)
        assert torch.equal(flash_attention(q, k, v, **ragged, backend="cpu"), whole)
    finally:
        _C.set_num_threads(threads)


def test_causal_rows_do_not_depend_on_how_many_are_asked_for():
    q, k, v = inputs(1, 300, 300)
    whole = flash_attention(q, k, v, causal=True, backend="cpu")
    for n in (1, 3, 31, 32, 33, 200):
        assert torch.equal(
            flash_attention(q[:, -n:], k, v, causal=True, backend="cpu"), whole[:, -n:]
        )


def test_strided_inputs():
    q, k, v = inputs(2, 33, 40)
    expected = flash_attention(q, k, v, backend="cpu")
    assert torch.equal(flash_attention(strided(q), strided(k), strided(v), backend="cpu"), expected)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(flash_attention(*heads_first, backend="cpu"), expected)


@pytest.mark.parametrize("value", [float("nan"), INF], ids=str)
@pytest.mark.parametrize("key", [0, 15, 16, 70, 149])
def test_keys_that_are_not_visible_do_not_matter(value, key):
    q, k, v = inputs(1, 150, 150)
    options = {"causal": True, "window": 40, "backend": "cpu"}
    before = flash_attention(q, k, v, **options)
    k[0, key], v[0, key] = value, value
    after = flash_attention(q, k, v, **options)
    sees = torch.zeros(150, dtype=torch.bool)
    sees[key : key + 40] = True
    assert after[0, sees].isnan().all()
    assert torch.equal(after[0, ~sees], before[0, ~sees])


def test_a_row_without_keys():
    q, k, v = inputs(1, 5, 2)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend="cpu")
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
