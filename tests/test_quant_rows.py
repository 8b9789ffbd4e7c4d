"""quant_matmul of int8 by int8 (and float8 by float8) with one scale a row of each."""

import pytest
import torch
from cases import DTYPES, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm.ops import device, quant_matmul, rms_norm
from pyllm.quant import QuantRows, QuantTensor

# (T, N, K): size one, empty, no multiples of anything; each size of tile (8, 16, 32, 64, 128 rows,
# and the larger one for many), with tiles that blocks share and with tiles of their own.
SHAPES = [(1, 1, 16), (0, 16, 32), (3, 50, 64), (1, 300, 1040), (8, 130, 208), (9, 50, 1024)]
SHAPES += [(20, 300, 96), (40, 72, 400), (70, 200, 176), (130, 100, 320), (130, 800, 208)]


def rows(*shape, seed=0, dtype=torch.int8):
    return QuantRows.from_float(rand(*shape, seed=seed), dtype)


def in_float32(x, weight):
    """What the kernel computes, rounding as it does."""
    total = x.q.long() @ weight.q.long().t()
    return total.float() * weight.scale * x.scale[..., None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sums_are_exact_and_scaled_once(shape, dtype):
    t, n, k = shape
    x, weight = rows(t, k), rows(n, k, seed=3)
    y = quant_matmul(x, weight, out=poisoned((t, n), dtype), backend="emulator")
    exact = in_float32(x, weight)
    assert torch.equal(y, exact.to(dtype))
    reference = quant_matmul(x, weight, backend="reference")
    assert reference.dtype == torch.float32
    if t:
        assert_close(exact, reference, exact)


def test_largest_sums():
    """Of -128 times -128 and -128 times 127, as many as int32 holds."""
    k = 2**17 - 16
    x = QuantRows(torch.full((1, k), -128, dtype=torch.int8), torch.ones(1))
    values = torch.tensor([-128, 127], dtype=torch.int8)
    weight = QuantRows(values[:, None].expand(2, k).contiguous(), torch.ones(2))
    y = quant_matmul(x, weight, backend="emulator")
    assert y.tolist() == [[float(2**14 * k), torch.tensor(-128 * 127 * k).float().item()]]


def test_every_value_at_every_place():
    """A product by the identity gives back all quants."""
    q = (torch.arange(256 * 256) * 7 % 256 - 128).to(torch.int8).view(256, 256)
    one = QuantRows(torch.eye(256, dtype=torch.int8), torch.ones(256))
    y = quant_matmul(one, QuantRows(q, torch.ones(256)), backend="emulator")
    assert torch.equal(y, q.t().float())
    assert torch.equal(quant_matmul(QuantRows(q, torch.ones(256)), one, backend="emulator"), y.t())


def test_a_row_does_not_depend_on_the_others():
    weight, x = rows(800, 208), rows(130, 208, seed=1)
    whole = quant_matmul(x, weight, backend="emulator")
    for some in (range(1), range(9), range(5, 22), range(17, 80), range(2, 129), range(129, 130)):
        part = QuantRows(x.q[list(some)], x.scale[list(some)])
        assert torch.equal(quant_matmul(part, weight, backend="emulator"), whole[list(some)])


@pytest.mark.parametrize("t", [1, 40])
def test_order_of_lanes_and_blocks_does_not_change_bits(t):
    """Tiles shared by blocks; the counters are zero again after each launch."""
    weight, x = rows(50, 4096), rows(t, 4096, seed=1)
    library = device.library("emulator")
    try:
        for seed, threads in ((1, 2), (7, 1), (23, 2)):
            library.configure(seed=seed, threads=threads)
            y = quant_matmul(x, weight, backend="emulator")
            assert torch.equal(y, in_float32(x, weight))
    finally:
        library.configure(seed=1, threads=2)


@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bias_strides_alignment_and_leading_dimensions(n, dtype):
    weight, bias = rows(n, 96), rand(n, seed=3)
    x, out = rows(2, 3, 96), poisoned((6, n), dtype)
    plain = quant_matmul(x, weight, bias, backend="emulator")
    assert plain.shape == (2, 3, n)
    exact = quant_matmul(x, weight, backend="reference").double() + bias.double()
    assert_close(plain, exact, in_float32(x, weight) + bias)
    flat = QuantRows(x.q.flatten(0, 1), x.scale.flatten())
    out = strided(out)
    for before, after in ((0, 16), (0, 5), (1, 0)):  # rows apart, then not aligned to 16 bytes
        wide = torch.cat([flat.q.new_zeros(6, before), flat.q, flat.q.new_zeros(6, after)], dim=1)
        x = QuantRows(wide[:, before : before + 96], flat.scale)
        y = quant_matmul(x, weight, bias, out=out, backend="emulator")
        assert torch.equal(y, plain.flatten(0, 1).to(dtype))
    single = QuantRows(flat.q[2], flat.scale[2])
    assert torch.equal(quant_matmul(single, weight, bias, backend="emulator"), plain[0, 2])


def test_from_a_norm_and_a_quant_tensor():
    x, norm = rand(5, 96, dtype=torch.bfloat16), torch.ones(96, dtype=torch.bfloat16)
    q = rms_norm(x, norm, quantize=torch.int8, backend="emulator")
    weight = QuantTensor.from_float(rand(40, 96), bits=8, group_size=None, symmetric=True)
    y = quant_matmul(q, weight, backend="emulator")
    assert torch.equal(y, in_float32(q, weight.rows()))
    assert quant_matmul(q, weight, backend="emulator") is not y
    assert torch.equal(weight.forms["rows"].dequantize(), weight.dequantize())
    # Beside the product of what was not rounded: each value of either side is off by half a step.
    exact = (
        rms_norm(x.double(), norm.double(), backend="reference") @ weight.dequantize().double().t()
    )
    steps = q.scale[:, None].double() * weight.dequantize().double().abs().sum(1)
    assert ((y - exact).abs() <= 0.51 * steps + 2**-8 * exact.abs().amax()).all()


def test_rows_that_are_not_finite_are_nan():
    x = rand(20, 64)
    x[3, 5], x[7, 40] = float("nan"), float("inf")
    y = quant_matmul(QuantRows.from_float(x, torch.int8), rows(30, 64), backend="emulator")
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 7]
    assert y[[3, 7]].isnan().all()


def test_float8_in_the_reference():
    x, weight = (rows(n, 64, seed=n, dtype=torch.float8_e4m3fn) for n in (3, 20))
    y = quant_matmul(x, weight, backend="reference")
    exact = x.dequantize().double() @ weight.dequantize().double().t()
    assert_close(y, exact, (x.dequantize() @ weight.dequantize().t()))


def test_one_row_moves_little_more_than_the_weight():
    n, k = 1024, 2048
    x, weight = rows(1, k), rows(n, k)
    device.emulator_report()
    quant_matmul(x, weight, backend="emulator")
    (launch,) = device.emulator_report()
    buffers = launch["buffers"]
    assert buffers["weight"]["read_sectors"] * 32 == n * k
    moved = sum(32 * (b["read_sectors"] + b["written_sectors"]) for b in buffers.values())
    assert moved <= 1.05 * (n * k + k + 8 * n)


@pytest.mark.parametrize(("t", "n"), [(1, 256), (16, 256), (64, 256), (128, 256), (136, 1792)])
def test_no_bank_conflicts(t, n):
    x, weight = rows(t, 256), rows(n, 256)
    device.emulator_report()
    quant_matmul(x, weight, backend="emulator")
    (launch,) = device.emulator_report()
    shared = [site for site in launch["sites"] if site["space"] == "shared"]
    assert sum(site["transactions"] for site in shared) > 500
    assert sum(site["transactions"] - site["ideal"] for site in shared) == 0


def test_bad_arguments():
    x, weight = rows(2, 64), rows(20, 64)
    long = torch.empty(1, 2**17, dtype=torch.int8)
    cases = [
        ({"x": rows(2, 32)}, r"weight: expected int8\[N K\], got int8\[20, 64\] \(K is 32\)"),
        ({"x": rows(2, 24), "weight": rows(20, 24)}, "multiple of 16 and below 2.17"),
        ({"x": QuantRows(long, x.scale[:1]), "weight": QuantRows(long, x.scale[:1])}, "below 2.17"),
        ({"x": QuantRows(x.q, x.scale[:1])}, "x.scale: expected"),
        ({"weight": QuantRows(weight.q, weight.scale.half())}, "weight.scale: expected float32"),
        ({"weight": QuantRows(weight.q[:, ::2], weight.scale), "x": rows(2, 32)}, "contiguous"),
        ({"bias": torch.ones(7)}, r"bias: expected float32\[N\], got float32\[7\]"),
        ({"out": torch.ones(2, 21)}, "out: expected"),
        ({"weight": rows(20, 64, dtype=torch.float8_e4m3fn)}, "expected torch.int8 as x, got"),
        ({"bias": torch.ones(20, device="meta")}, "bias: expected it on cpu, got meta"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quant_matmul(**{"x": x, "weight": weight, "backend": "emulator", **arguments})
    float8 = rows(2, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="x: expected int8"):
        quant_matmul(float8, float8, backend="emulator")
    empty = QuantRows(x.q[:0], x.scale[:0])
    assert quant_matmul(empty, weight, backend="emulator").shape == (0, 20)
