import pytest
import torch
from cases import rand
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm import _C
from pyllm.ops import sample
from pyllm.ops.sample import kept_weights, penalized, philox4x32

V = 40
BACKENDS = ["cpu", "triton"]


def draws(logits, n, seed=0, **parameters):
    """n tokens drawn from one row of logits at positions 0 to n - 1."""

    def rows(value):
        dtype = torch.int32 if isinstance(value, int) else torch.float32
        return torch.full((n,), value, dtype=dtype)

    parameters = {"temperature": 1.0} | parameters
    return sample(
        logits.expand(n, -1),
        **{name: rows(value) for name, value in parameters.items()},
        seed=torch.full((n,), seed),
        position=torch.arange(n, dtype=torch.int32),
        logprobs=False,
        backend="cpu",
    )[0].long()


def critical_chi_square(degrees):
    """The value exceeded with probability about 1e-4 (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


def assert_drawn_from(tokens, probabilities):
    """Pearson's test, and that nothing impossible was drawn. Deterministic: the seeds are fixed."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert (counts[probabilities == 0] == 0).all(), "a token was drawn that had been removed"
    expected = probabilities.double() * len(tokens)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) > 1:
        statistic = ((counts - expected).square() / expected).sum().item()
        assert statistic < critical_chi_square(len(counts) - 1)


@pytest.mark.parametrize("n", [1, 2, 15, 63, 64, 65, 1000, 49152])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_lowest_of_the_highest(n, rows, backend):
    logits = rand(rows, n)
    token, logprob = sample(logits, backend=backend)
    assert token.dtype == torch.int32
    assert torch.equal(token.long(), logits.argmax(-1))
    expected = logits.double().log_softmax(-1).max(-1).values
    assert_close(logprob, expected, logits.log_softmax(-1).max(-1).values)
    for at in (n - 1, n // 2, 0):
        logits[:, at:] = 9.0
        assert (sample(logits, backend=backend)[0] == at).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), 1.0, float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_nan_and_infinities(temperature, backend):
    inf, nan = float("inf"), float("nan")
    logits = torch.full((6, 70), -inf)
    logits[1] = nan
    logits[2, :30], logits[2, 50] = nan, -3.0
    logits[3, 7], logits[3, 8] = inf, 5.0
    logits[4, 69] = torch.finfo(torch.float32).max
    logits[5, 1:] = nan
    token, logprob = sample(logits, temperature=torch.full((6,), temperature), backend=backend)
    assert token.tolist() == [0, 0, 50, 7, 69, 0]
    assert logprob.tolist() == [-inf, -inf, 0, 0, 0, -inf]
    reference = sample(logits[2:3], temperature=torch.tensor([temperature]), backend="reference")
    assert (reference[0].item(), reference[1].item()) == (50, 0)


def test_philox_known_answers():
    """The vectors for philox4x32-10 in Random123's tests/kat_vectors."""
    ones = 0xFFFFFFFF
    vectors = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in vectors:
        assert list(philox4x32(counter, key)) == expected


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (1, 2), (2**63 - 1, 2**31 - 1), (-1, -1), (2**40 + 3, 77)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_draws_what_philox_gives(seed, position, backend):
    """Of 2^16 equal logits, the token is the highest 16 bits of the number drawn."""
    token, _ = sample(
        torch.zeros(1, 65536),
        temperature=torch.ones(1),
        seed=torch.tensor([seed]),
        position=torch.tensor([position], dtype=torch.int32),
        backend=backend,
    )
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    assert token.item() == philox4x32((position & 0xFFFFFFFF, 0, 0, 0), key)[1] >> 16


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_distribution(parameters):
    logits = rand(V, scale=2)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | parameters
    weights = kept_weights(logits, **full)
    tokens = draws(logits, 20000, seed=5, **parameters)
    assert_drawn_from(tokens, weights / weights.sum())


@pytest.mark.parametrize("n", [40, 3000])
def test_masks_are_those_of_transformers(n):
    """One filter at a time, and all in the order in which transformers applies them."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = rand(1, n, scale=3)

    def mask(*warpers):
        scores = logits
        for warper in warpers:
            scores = warper(None, scores)
        return torch.isfinite(scores[0])

    heat = process.TemperatureLogitsWarper
    top_k, top_p, min_p = (
        process.TopKLogitsWarper,
        process.TopPLogitsWarper,
        process.MinPLogitsWarper,
    )
    row = logits[0]
    for k in (1, 2, 7, 39):
        assert torch.equal(kept_weights(row, 1.0, top_k=k) > 0, mask(top_k(k)))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.99):
        assert torch.equal(kept_weights(row, 1.0, top_p=p) > 0, mask(top_p(p)))
    for p in (0.01, 0.2, 0.999, 1.0):
        assert torch.equal(kept_weights(row, 1.0, min_p=p) > 0, mask(min_p(p)))
    expected = mask(heat(1.5), top_k(30), top_p(0.8), min_p(0.1))
    assert torch.equal(kept_weights(row, 1.5, 30, 0.8, 0.1) > 0, expected)


@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = rand(1, V), torch.tensor([[3, 7, 3, 39, 0]])
    expected = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)[0]
    assert torch.equal(penalized(logits[0], ids[0].tolist(), 2, repetition=penalty), expected)


def all_parameters(rows, n, generator):
    """Random parameters for each row, extremes among them."""

    def pick(values, dtype=torch.float32):
        index = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[index]

    room = 12
    return {
        "temperature": pick([0.0, 1e-6, 0.3, 1.0, 2.0, 100.0]),
        "top_k": pick([-1, 0, 1, 2, 5, n - 1, n, n + 1, 2**31 - 1], torch.int32),
        "top_p": pick([0.0, 1e-9, 0.2, 0.5, 0.9, 0.9999, 1.0, 2.0, -1.0]),
        "min_p": pick([0.0, 1e-9, 0.1, 0.5, 1.0, 3.0]),
        "repetition_penalty": pick([1.0, 0.5, 1.2, 100.0]),
        "presence_penalty": pick([0.0, 0.5, -2.0]),
        "frequency_penalty": pick([0.0, 0.3, -0.3]),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "position": torch.randint(0, 2**31 - 1, (rows,), generator=generator, dtype=torch.int32),
        "history": torch.randint(-2, n + 3, (rows, room), generator=generator, dtype=torch.int32),
        "prompt_lens": pick([-1, 0, 3, 12, 99], torch.int32),
        "history_lens": pick([-5, 0, 5, 12, 99], torch.int32),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([1, 2, 17, 64, 100, 1025]),
    scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    coarse=st.booleans(),
)
def test_random_parameters_against_the_reference(seed, n, scale, coarse):
    rows = 16
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, n, generator=generator) * scale
    if coarse:  # many equal logits
        logits = logits.round()
    parameters = all_parameters(rows, n, generator)
    token, logprob = sample(logits, **parameters, backend="cpu")
    expected, expected_logprob = sample(logits, **parameters, backend="reference")
    # Weights are rounded exponentials, so a number that falls between two tokens may go to either.
    assert (token != expected).sum() <= 1
    same = token == expected
    torch.testing.assert_close(logprob[same], expected_logprob[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 17, 1025, 5000])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("backend", ["triton"])
def test_a_device_draws_the_cpu_kernels_tokens(n, coarse, backend):
    rows = 12
    generator = torch.Generator("cpu").manual_seed(n)
    logits = rand(rows, n, scale=5)
    if coarse:  # many equal logits
        logits = logits.round()
    parameters = all_parameters(rows, n, generator)
    # Some rows are cut by nothing, some by one thing.
    parameters["top_k"][::3] = 0
    parameters["top_p"][1::3] = 1
    parameters["temperature"][3:] += 0.5
    token, logprob = sample(
        logits, **{k: v.to(logits.device) for k, v in parameters.items()}, backend=backend
    )
    expected, expected_logprob = sample(
        logits.cpu(), **{k: v.cpu() for k, v in parameters.items()}, backend="cpu"
    )
    # Weights are rounded exponentials; without fused multiply-adds they may differ in the last bit.
    allowed = 1 if _C.isa() == "baseline" else 0
    assert (token.cpu() != expected).sum() <= allowed
    same = token.cpu() == expected
    torch.testing.assert_close(logprob.cpu()[same], expected_logprob[same], rtol=1e-5, atol=1e-5)


def test_equal_logits_at_a_cut_keep_the_lowest_ids():
    logits = torch.full((V,), 1.0)
    logits[30] = 2.0
    assert set(draws(logits, 500, top_k=4).tolist()) == {30, 0, 1, 2}
    # exp(-1) = 0.3679: the first three have 1.736 of 15.35
    assert set(draws(logits, 500, top_p=1.73 / 15.35).tolist()) == {30, 0, 1}
    flat = torch.zeros(V)
    assert set(draws(flat, 500, top_p=0.125).tolist()) == {0, 1, 2, 3, 4}
    assert set(draws(flat, 500, top_p=0.1, top_k=3).tolist()) == {0}
    assert set(draws(flat, 500, min_p=1.0, top_k=3).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("n", [300, 49152])
def test_large_vocabularies_keep_what_the_reference_keeps(n):
    logits = rand(n, scale=2)
    for parameters in ({"top_k": 50}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.9, "min_p": 0.05}):
        weights = kept_weights(logits, 1.0, **parameters)
        assert_drawn_from(draws(logits, 2000, **parameters), weights / weights.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalties_by_hand(backend):
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.5, 1.0]])
    past = {
        "history": torch.tensor([[2, 1, 1, 2, 2, 4]], dtype=torch.int32),
        "prompt_lens": torch.tensor([2], dtype=torch.int32),
        "history_lens": torch.tensor([5], dtype=torch.int32),
    }

    def greedy(**penalties):
        tensors = {name: torch.tensor([value]) for name, value in penalties.items()}
        return sample(logits, **tensors, **past, backend=backend)[0].item()

    assert greedy() == 2
    assert greedy(repetition_penalty=1.49) == 2  # 3 / 1.49 > 2
    assert greedy(repetition_penalty=1.51) == 0
    assert greedy(presence_penalty=0.9) == 2
    assert greedy(presence_penalty=1.1) == 0
    assert greedy(frequency_penalty=0.49) == 2  # it was generated twice
    assert greedy(frequency_penalty=0.51) == 0
    assert greedy(frequency_penalty=-5.0) == 2
    assert greedy(presence_penalty=-6.0, repetition_penalty=0.1) == 2


def test_a_row_does_not_depend_on_the_others():
    rows, n = 24, 500
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, n, generator=generator)
    parameters = all_parameters(rows, n, generator)
    token, logprob = sample(logits, **parameters)
    for i in range(rows):
        alone = sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in parameters.items()})
        assert torch.equal(alone[0], token[i : i + 1])
        assert torch.equal(alone[1], logprob[i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_strides_and_empty(backend):
    wide = torch.full((4, 80), float("nan"))
    wide[:, :64] = rand(4, 64)
    out = torch.full((4,), -7, dtype=torch.int32), torch.full((4,), float("nan"))
    assert sample(wide[:, :64], out=out, backend=backend) is out
    assert torch.equal(out[0].long(), wide[:, :64].argmax(-1))
    assert torch.isfinite(out[1]).all()
    token, logprob = sample(torch.empty(0, 64), backend=backend)
    assert token.shape == logprob.shape == (0,)
    assert sample(wide[:, :64], logprobs=False, backend=backend)[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 8).half()}, "logits: expected float32"),
        ({"logits": torch.zeros(2, 0)}, "expected 1 to"),
        ({"logits": torch.zeros(8, 2).t()}, "contiguous last dimension"),
        ({"temperature": torch.ones(3)}, r"temperature: expected float32\[R\].*\(R is 2\)"),
        ({"top_k": torch.ones(2)}, "top_k: expected int32"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed: expected int64"),
        ({"history": torch.zeros(2, 4, dtype=torch.int32)}, "come together"),
        ({"presence_penalty": torch.ones(2)}, "penalties need history"),
        ({"out": (torch.zeros(2), None)}, "token: expected int32"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(arguments, message, backend):
    with pytest.raises(ValueError, match=message):
        sample(**{"logits": torch.zeros(2, 8), "backend": backend, **arguments})
