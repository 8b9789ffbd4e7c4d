import pytest
import torch
from cases import DTYPES, RAGGED, PagedBatch, dtype_name, rand, relaid
from compare import assert_close, poisoned

from pyllm.ops import rope_cache

BACKENDS = ["cpu", "triton"]


def angles(positions, width):
    """The usual table, float32 [positions, width]."""
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    phase = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.cat((phase.cos(), phase.sin()), -1).float()


def fused(batch, heads, kv_heads, head_dim, dtype):
    """q, k and v as views of one projection."""
    qkv = rand(batch.tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return qkv.split((heads, kv_heads, kv_heads), dim=1)


def assert_matches_reference(
    backend, sequences, dtype, cache_dtype, interleaved, head_dim, rotary
):  # fmt: skip
    batch = PagedBatch(sequences)
    q, k, v = fused(batch, 3, 2, head_dim, dtype)
    table = angles(600, rotary)

    def run(backend, cast, out=None):
        k_cache, v_cache = batch.caches(2, head_dim, cast(k_cache_of).dtype)
        rotated = rope_cache(
            *(cast(x) for x in (q, k, v)), table, batch.positions, k_cache, v_cache,
            cu_seqlens_q=batch.cu_seqlens_q, page_table=batch.page_table,
            interleaved=interleaved, out=out, backend=backend,
        )  # fmt: skip
        return rotated, k_cache, v_cache

    k_cache_of = torch.empty(0, dtype=cache_dtype)
    out = poisoned(q.shape, dtype)
    rotated, k_cache, v_cache = run(backend, lambda x: x, out)
    exact = run("reference", lambda x: x.double())
    same = run("reference", lambda x: x)
    assert rotated is out
    assert_close(rotated, exact[0], same[0])
    # NaN positions must agree too: slots of nobody stay as they were.
    assert_close(k_cache, exact[1], same[1])
    assert_close(v_cache, exact[2], same[2])


CACHES = [(x, x) for x in DTYPES] + [
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("sequences", RAGGED, ids=str)
@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=dtype_name)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 32), (7, 6)])
def test_matches_reference(sequences, dtype, cache_dtype, interleaved, head_dim, rotary):
    shape = (interleaved, head_dim, rotary)
    assert_matches_reference("cpu", sequences, dtype, cache_dtype, *shape)


# The interpreter takes a millisecond for a token and head: one of each.
@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=dtype_name)
@pytest.mark.parametrize(
    ("sequences", "interleaved", "head_dim", "rotary"),
    [([(3, 40), (0, 3), (1, 512)], False, 80, 32), ([(2, 0), (1, 16)], True, 64, 64)],
    ids=["half", "interleaved"],
)
@pytest.mark.parametrize("backend", ["triton"])
def test_a_device_matches_reference(
    sequences, dtype, cache_dtype, interleaved, head_dim, rotary, backend
):
    shape = (interleaved, head_dim, rotary)
    assert_matches_reference(backend, sequences, dtype, cache_dtype, *shape)


def one_sequence(tokens, heads, head_dim, **options):
    """Rotates a sequence that starts at position 3; returns q, k and their rotated versions."""
    batch = PagedBatch([(tokens, 3)])
    q, k, v = fused(batch, heads, heads, head_dim, torch.float32)
    k_cache, v_cache = batch.caches(heads, head_dim, torch.float32)
    rotated = rope_cache(
        q, k, v, options.pop("table"), batch.positions, k_cache, v_cache,
        cu_seqlens_q=batch.cu_seqlens_q, page_table=batch.page_table, **options,
    )  # fmt: skip
    pages = batch.page_table[0].long()[batch.positions.long() // 16]
    return q, k, rotated, k_cache[pages, batch.positions.long() % 16], batch.positions.long()


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_as_in_transformers(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    table = angles(64, 48)
    q, k, q_rotated, k_rotated, positions = one_sequence(20, 3, 48, table=table, backend=backend)
    cosine, sine = (x.repeat(1, 2)[None] for x in table[positions].chunk(2, -1))
    expected = llama.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cosine, sine
    )
    assert torch.equal(q_rotated, expected[0][0].transpose(0, 1))
    assert torch.equal(k_rotated, expected[1][0].transpose(0, 1))


def test_interleaved_is_multiplication_by_complex_numbers():
    table = angles(64, 48)
    q, k, q_rotated, k_rotated, positions = one_sequence(20, 3, 48, table=table, interleaved=True)
    turn = torch.complex(*table[positions].double().chunk(2, -1))[:, None]
    for x, rotated in ((q, q_rotated), (k, k_rotated)):
        pairs = torch.view_as_complex(x.double().reshape(20, 3, 24, 2))
        exact = torch.view_as_real(pairs * turn).flatten(-2)
        same = torch.view_as_real(pairs.to(torch.complex64) * turn.to(torch.complex64)).flatten(-2)
        assert_close(rotated, exact, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_alone_give_the_same_bits(backend):
    batch = PagedBatch([(5, 40), (1, 7), (33, 0)])
    q, k, v = fused(batch, 3, 1, 64, torch.float16)
    table = angles(64, 64)

    def run(part, cu, page_table, out):
        caches = batch.caches(1, 64, torch.float16, value=0)
        rotated = rope_cache(
            q[part], k[part], v[part], table, batch.positions[part], *caches,
            cu_seqlens_q=cu, page_table=page_table, out=out, backend=backend,
        )  # fmt: skip
        return rotated, caches

    whole, caches = run(slice(None), batch.cu_seqlens_q, batch.page_table, None)
    total = [torch.zeros_like(x) for x in caches]
    for b in range(3):
        part = slice(*batch.cu_seqlens_q[b : b + 2].tolist())
        cu = torch.tensor([0, part.stop - part.start], dtype=torch.int32)
        alone, own = run(part, cu, batch.page_table[b : b + 1], None)
        assert torch.equal(alone, whole[part])
        total = [x + y for x, y in zip(total, own, strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(total, caches, strict=True))
    in_place, _ = run(slice(None), batch.cu_seqlens_q, batch.page_table, q)
    assert in_place is q
    assert torch.equal(q, whole)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.float16), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_lie_side_by_side(dtype, cache_dtype, backend):
    batch = PagedBatch([(5, 40), (1, 7), (33, 0)])
    q, k, v = fused(batch, 3, 2, 64, dtype)
    plain, moved = batch.caches(2, 64, cache_dtype, 0), list(batch.caches(2, 64, cache_dtype, 0))
    moved[0] = relaid(moved[0], 0, 2, 3, 1)
    assert moved[0].stride(1) == 1
    tables = {"cu_seqlens_q": batch.cu_seqlens_q, "page_table": batch.page_table}
    for caches in (plain, moved):
        rope_cache(q, k, v, angles(64, 48), batch.positions, *caches, **tables, backend=backend)
    assert plain[0].any()
    assert all(torch.equal(x, y) for x, y in zip(plain, moved, strict=True))


def good_arguments():
    batch = PagedBatch([(3, 4), (2, 0)])
    q, k, v = fused(batch, 4, 2, 8, torch.float32)
    k_cache, v_cache = batch.caches(2, 8, torch.float16)
    return {
        "q": q, "k": k, "v": v, "cos_sin": angles(32, 8), "positions": batch.positions,
        "k_cache": k_cache, "v_cache": v_cache, "cu_seqlens_q": batch.cu_seqlens_q,
        "page_table": batch.page_table, "backend": "cpu",
    }  # fmt: skip


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.ones(5, 3, 8)}, r"v: expected float32\[T Hkv D\].*\(Hkv is 3\)"),
        ({"k": torch.ones(5, 2, 8).half()}, "k: expected float32"),
        ({"cos_sin": angles(32, 10)}, "cos_sin: expected an even width of at most D = 8, got 10"),
        ({"cos_sin": angles(6, 8)}, r"positions\[2\]: expected 0 to 5, got 6"),
        ({"positions": ints(4, 5, -1, 0, 1)}, r"positions\[2\]: expected 0 to 31, got -1"),
        (
            {"cos_sin": angles(64, 8), "positions": ints(4, 5, 50, 0, 1)},
            "expected a page for position 50 of sequence 0, got room for 48 positions",
        ),
        ({"positions": ints(4, 5, 31, 0, 1)}, r"page_table\[0, 1\]: .* from 0 to 4, got -7"),
        ({"positions": torch.arange(5)}, r"positions: expected int32\[T\], got int64\[5\]"),
        ({"page_table": ints(0, 1)[:, None] + 99}, r"page_table\[0, 0\]: expected a page from 0"),
        ({"cu_seqlens_q": ints(0, 3, 6)}, "cu_seqlens_q: expected to run from 0 to 5"),
        ({"cu_seqlens_q": ints(0, 5)}, r"cu_seqlens_q: expected B \+ 1 = 3 entries, got 2"),
        ({"out": torch.ones(5, 4, 8).half()}, "out: expected float32"),
        (
            {
                "k_cache": relaid(torch.ones(8, 5, 2, 8), 0, 2, 3, 1),
                "v_cache": torch.ones(8, 5, 2, 8),
            },
            "k_cache: expected a page size that is a multiple of 16 .* side by side, got 5 and 8",
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_cache(**{**good_arguments(), **arguments})


def test_a_replay_never_writes_outside_the_cache():
    from pyllm import _C

    call = good_arguments()
    plan = _C.Plan()
    out = torch.zeros_like(call["q"])
    plan.begin()
    rope_cache(**call, out=out)
    plan.end()
    call["positions"].copy_(ints(2**31 - 1, -(2**31), 31, 0, 1))
    call["page_table"].fill_(2**31 - 1)
    call["page_table"][1, 0] = 2
    call["cu_seqlens_q"].copy_(ints(0, 3, 2**31 - 1))
    plan.replay()
    written = ~torch.isnan(call["k_cache"])
    assert written[2, :2].all()
    assert written.sum() == 2 * 2 * 8
