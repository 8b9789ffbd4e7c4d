import itertools
import threading

import gguf
import numpy as np
import pytest
import torch
from cases import rand
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm import memory
from pyllm.quant import QuantTensor

# name -> where the float16 scales lie in a block, as byte offsets
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
FORMATS = list(itertools.product((4, 8), (16, 32, 64, 128, None), (False, True)))


def random_blocks(name, rows, blocks, seed):
    """Raw bytes of valid blocks (any bits, finite scales), and what gguf makes of them."""
    kind = gguf.GGMLQuantizationType[name]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        half = generator.normal(size=(rows, blocks, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = half.view(np.uint8)
    raw = raw.reshape(rows, -1)
    return raw, torch.from_numpy(gguf.quants.dequantize(raw, kind))


def check(weight, exact, name):
    w = weight.dequantize()
    assert w.shape == exact.shape == weight.shape
    if not name.endswith("K"):
        assert torch.equal(w, exact)
        return
    # Scale and minimum are rounded to float16: half an ulp, 2^-11, of each of the two terms.
    q, d, m = weight.parts()
    steps = (q.float() - weight.offset).abs().unflatten(1, (-1, weight.group_size))
    m = torch.zeros_like(d) if m is None else m
    term = (d.abs().unsqueeze(2) * steps + m.abs().unsqueeze(2)).flatten(1)
    subnormal = (steps.flatten(1) + 1) * 2**-25
    assert ((w - exact).abs() <= 2**-11 * 1.001 * term + subnormal).all()


@pytest.mark.parametrize("name", HALVES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_gguf_blocks_are_what_the_gguf_package_reads(name, rows, blocks, seed):
    raw, exact = random_blocks(name, rows, blocks, seed)
    check(QuantTensor.from_gguf(raw.tobytes(), name, exact.shape), exact, name)


@pytest.mark.parametrize("name", HALVES)
def test_gguf_packing_agrees_with_the_layout_in_pytorch(name):
    raw, exact = random_blocks(name, 21, 2, 5)
    weight = QuantTensor.from_gguf(raw, name, exact.shape)
    again = QuantTensor.from_parts(*weight.parts(), bits=weight.bits)
    assert again.group_size == weight.group_size
    # Rows that pad the last panel are zero in both.
    assert torch.equal(again.packed, weight.packed)
    assert weight.nbytes == weight.packed.numel()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.asarray, torch.from_numpy])
def test_raw_bytes_of_any_kind(kind):
    raw, exact = random_blocks("Q4_1", 3, 2, 0)
    flat = raw.reshape(-1)
    source = kind(flat) if kind is torch.from_numpy else kind(flat.copy())
    assert torch.equal(QuantTensor.from_gguf(source, "Q4_1", (3, 64)).dequantize(), exact)


def test_rows_of_several_tensors_in_one():
    parts = [random_blocks("Q4_0", rows, 2, rows) for rows in (5, 30, 16)]
    fused = QuantTensor.from_gguf_rows([(raw, len(raw)) for raw, _ in parts], "Q4_0", 64)
    assert torch.equal(fused.dequantize(), torch.cat([exact for _, exact in parts]))
    joined = QuantTensor.cat([QuantTensor.from_gguf(r, "Q4_0", w.shape) for r, w in parts])
    assert torch.equal(joined.packed, fused.packed)
    assert joined.shape == fused.shape == (51, 64)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (16, 2), (37, 5)])
def test_from_float_rounds_to_the_nearest_quant(bits, group, symmetric, n, groups):
    w = rand(n, groups * max(group or 32, 32))
    weight = QuantTensor.from_float(w, bits=bits, group_size=group, symmetric=bool(symmetric))
    group = group or w.shape[1]
    assert (weight.bits, weight.group_size, weight.has_minimum) == (bits, group, not symmetric)
    q, d, m = weight.parts()
    assert q.shape == w.shape
    assert d.shape == (n, w.shape[1] // group)
    again = QuantTensor.from_parts(q, d, m, bits=bits)
    assert repr(again) == repr(weight)
    assert torch.equal(again.packed, weight.packed)
    step = d.float().abs().repeat_interleave(group, 1)
    error = (weight.dequantize() - w).abs()
    # Half a step. At the ends of the range, also what rounding the scale to float16 cut off; and a
    # symmetric range has one step less above zero than below.
    top = 2**bits - 1
    half = m.float().abs().repeat_interleave(group, 1) if m is not None else 0
    allowed = 0.5 * step + 2**-11 * (top * step + half) + (0.5 * step if symmetric else 0) + 1e-6
    assert (error <= allowed).all()


@pytest.mark.parametrize("k", [16, 48, 64, 320])
def test_one_group_a_row(k):
    """As groups of 16 that all have the row's scale; and as rows of int8."""
    weight = QuantTensor.from_float(rand(20, k), bits=8, group_size=None, symmetric=True)
    q, d, _ = weight.parts()
    assert d.shape == (20, 1)
    small = QuantTensor.from_parts(q, d.repeat(1, k // 16), bits=8)
    assert torch.equal(small.dequantize(), weight.dequantize())
    rows = weight.rows()
    assert rows.q.dtype == torch.int8
    assert torch.equal(rows.dequantize(), weight.dequantize())


def test_only_symmetric_weights_with_a_group_a_row_have_rows():
    w = rand(4, 64)
    for options in ({"bits": 4}, {"symmetric": False}, {"group_size": 32}):
        format = {"bits": 8, "symmetric": True, "group_size": None, **options}
        with pytest.raises(ValueError, match="expected 8 bits, symmetric, with one group a row"):
            QuantTensor.from_float(w, **format).rows()


@pytest.mark.parametrize("symmetric", [False, True])
def test_from_float_rounds_rows_on_their_own_and_takes_a_quant_tensor(symmetric):
    """As many rows as are rounded at a time, and some more that do not fill a panel."""
    w = rand(4096 + 20, 32)
    whole = QuantTensor.from_float(w, symmetric=symmetric)
    parts = [QuantTensor.from_float(part, symmetric=symmetric) for part in w.split(2000)]
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    fine = QuantTensor.from_float(w, bits=8, symmetric=True)
    again = QuantTensor.from_float(fine, symmetric=symmetric)
    expected = QuantTensor.from_float(fine.dequantize(), symmetric=symmetric)
    assert torch.equal(again.packed, expected.packed)


def test_refits_bring_no_group_further_away():
    w = rand(64, 128)
    w[0] = 3.0  # constants, one of them of one group only
    w[1, :32] = 0.0

    def error(refits):
        weight = QuantTensor.from_float(w, refits=refits)
        return (weight.dequantize() - w).unflatten(1, (-1, 32)).square().sum(2)

    errors = [error(refits) for refits in range(4)]
    for fewer, more in itertools.pairwise(errors):
        assert (more <= fewer * (1 + 1e-6) + 1e-12).all()
    assert errors[2].sum() < 0.95 * errors[0].sum()


def test_from_float_keeps_constants_and_zeros():
    w = torch.tensor([[0.0] * 32 + [2.5] * 32])
    for symmetric in (False, True):
        weight = QuantTensor.from_float(w, symmetric=symmetric)
        assert torch.equal(weight.dequantize(), w)


def test_weights_share_slabs_and_do_not_overlap():
    sizes = [1, 64, 65, 1 << 20, 20 << 20, 3]
    parts = [memory.allocate(size).fill_(i) for i, size in enumerate(sizes)]
    assert [part.numel() for part in parts] == sizes
    assert all(part.data_ptr() % 64 == 0 for part in parts)
    assert all((part == i).all() for i, part in enumerate(parts))


def test_populating_memory_keeps_what_is_written_to_it_meanwhile():
    before = threading.active_count()
    with memory.populated(40 << 20):
        parts = [memory.allocate(1 << 20).fill_(i) for i in range(40)]
    assert threading.active_count() == before
    assert all((part == i).all() for i, part in enumerate(parts))
    addresses = sorted(part.data_ptr() for part in parts)
    assert addresses[-1] - addresses[0] == 39 << 20  # all from the one slab
    with pytest.raises(KeyError), memory.populated(1 << 20):
        raise KeyError
    assert threading.active_count() == before
    with memory.populated(0):
        assert memory.allocate(3).numel() == 3


def test_repr():
    weight = QuantTensor.from_float(rand(3, 64))
    assert repr(weight) == "QuantTensor([3, 64], 4 bits, groups of 32, minimum)"
    weight = QuantTensor.from_float(rand(3, 64), bits=8, group_size=None, symmetric=True)
    assert repr(weight) == "QuantTensor([3, 64], 8 bits, one group a row)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantTensor.from_float(rand(4, 33)), "K to be a multiple of 32, got K = 33"),
        (
            lambda: QuantTensor.from_float(rand(4)),
            r"expected a float tensor \[N, K\], got float32\[4\]",
        ),
        (lambda: QuantTensor.from_float(rand(4, 32), bits=3), "expected bits 4 or 8, got 3"),
        (lambda: QuantTensor.from_float(rand(4, 96), group_size=48), "or one of .* got 48"),
        (lambda: QuantTensor.from_float(rand(4, 96), group_size=64), "multiple of 64, got K = 96"),
        (lambda: QuantTensor.from_float(rand(4, 40), group_size=None), "of 16, got K = 40"),
        (
            lambda: QuantTensor.from_parts(
                torch.zeros(4, 96).byte(), torch.ones(4, 2).half(), bits=4
            ),
            r"expected scale \[4, 96 / group size\].* got float16\[4, 2\]",
        ),
        (
            lambda: QuantTensor.from_float(torch.full((1, 32), float("nan"))),
            "expected finite weights",
        ),
        (lambda: QuantTensor.from_float(torch.full((1, 32), 1e30)), "range of float16"),
        (lambda: QuantTensor.from_gguf(b"", "Q3_K", (1, 256)), "expected a type of .*got 'Q3_K'"),
        (
            lambda: QuantTensor.from_gguf(bytes(18), "Q4_0", (1, 33)),
            "multiple of 32 for Q4_0, got K = 33",
        ),
        (
            lambda: QuantTensor.from_gguf(bytes(17), "Q4_0", (1, 32)),
            "1 rows of 18 bytes .* got 17 bytes",
        ),
        (lambda: QuantTensor.from_gguf(bytes(18), "Q4_0", (2**62, 32)), "got 18 bytes"),
        (lambda: QuantTensor.from_gguf(bytes(18), "Q4_0", (1, 2**62)), "multiple of 32 for Q4_0"),
        (lambda: QuantTensor.from_gguf(bytes(18), "Q4_0", (-1, 32)), "expected -1 rows"),
        (lambda: QuantTensor.from_gguf_rows([], "Q4_0", 32), "1 to 2.31 rows, got 0"),
        (
            lambda: QuantTensor.cat([QuantTensor.from_float(rand(4, 32), bits=b) for b in (4, 8)]),
            "expected one format and K",
        ),
        (
            lambda: QuantTensor.from_parts(
                torch.full((1, 32), 16, dtype=torch.uint8), torch.ones(1, 1).half(), bits=4
            ),
            "below 16, got 16",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
