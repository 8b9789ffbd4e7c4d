import itertools
from dataclasses import replace

import pytest
import torch
from cases import CUDA, DEVICES, DTYPES, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm import _C
from pyllm.ops import device, pack_fragments, quant_matmul, quantize_activation
from pyllm.quant import QuantActivation, QuantRows, QuantTensor

FORMATS = list(itertools.product((4, 8), (32, 16), (False, True)))
LARGE_GROUPS = list(itertools.product((4, 8), (64, 128, None), (False, True)))
# (T, N, K): size one, empty, N that is no multiple of a panel, a model's, many panels and groups.
SHAPES = [(1, 1, 32), (0, 16, 32), (3, 17, 64), (1, 576, 576), (25, 40, 1536), (40, 100, 96)]


def quantized(n, k, bits=4, group_size=32, symmetric=False, seed=7):
    w = rand(n, k, seed=seed)
    return QuantTensor.from_float(w, bits=bits, group_size=group_size, symmetric=symmetric)


def terms(x, weight):
    """What the kernel adds up, in PyTorch: ``[T, N, G]`` dot * d_w * d_x and m * s, in float64."""
    q_x, d_x, s_x, _ = quantize_activation(x, weight.group_size, backend="reference").parts()
    q_w, d_w, m_w = weight.parts()
    x_groups = q_x.double().unflatten(1, (-1, weight.group_size))
    w_groups = (q_w.double() - weight.offset).unflatten(1, (-1, weight.group_size))
    dot = torch.einsum("tgk,ngk->tng", x_groups, w_groups)
    scaled = dot * d_w.double() * d_x.double().unsqueeze(1)
    minimum = torch.zeros_like(scaled) if m_w is None else m_w.double() * s_x.double().unsqueeze(1)
    return scaled, minimum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMATS)
def test_is_the_int8_computation(shape, bits, group_size, symmetric):
    t, n, k = shape
    x, weight = rand(t, k), quantized(n, k, bits, group_size, symmetric)
    y = quant_matmul(x, weight, out=poisoned((t, n), torch.float32), backend="cpu")
    scaled, minimum = terms(x, weight)
    exact = (scaled + minimum).sum(-1)
    # Each group rounds its scale once and the sum twice: the standard bound of a float32 sum.
    bound = 1.2e-7 * (2 * k / group_size + 2) * (scaled.abs() + minimum.abs()).sum(-1)
    assert ((y - exact).abs() <= bound).all()
    # And against the weights in float64: no worse than rounding the activations makes it.
    reference = quant_matmul(x.double(), weight, backend="reference")
    assert reference.dtype == torch.float64
    if t:
        assert_close(y, reference, exact.float())


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), LARGE_GROUPS)
def test_large_groups_are_groups_of_32_of_one_scale(bits, group_size, symmetric):
    x, weight = rand(5, 256), quantized(40, 256, bits, group_size, symmetric)
    times = weight.group_size // 32
    q, *parts = weight.parts()
    parts = (part if part is None else part.repeat_interleave(times, 1) for part in parts)
    small = QuantTensor.from_parts(q, *parts, bits=bits)
    y = quant_matmul(x, weight, backend="cpu")
    assert torch.equal(y, quant_matmul(x, small, backend="cpu"))
    assert torch.equal(y, quant_matmul(quantize_activation(x, 32), weight, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_dtypes_bias_and_strides(dtype, layout):
    x, weight, bias = rand(5, 96, dtype=dtype), quantized(50, 96), rand(50, seed=3)
    out = poisoned((5, 50), dtype)
    if layout == "strided":
        x, out = strided(x), strided(out)
    y = quant_matmul(x, weight, bias, out=out, backend="cpu")
    assert y is out
    plain = quant_matmul(x.float().contiguous(), weight, backend="cpu")
    assert torch.equal(y, (plain + bias).to(dtype))


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_activations_are_rounded_as_in_pytorch(group_size, dtype):
    x = rand(7, 192, dtype=dtype)
    x[0, :32] = 0
    x[1, 3], x[2, 40], x[3, 191] = float("nan"), float("inf"), -float("inf")
    x[4] *= 1e-6
    x[5, :64] *= 1e-4
    actual = quantize_activation(x, group_size, backend="cpu")
    expected = quantize_activation(x, group_size, backend="reference")
    q, d, s, c = actual.parts()
    e_q, e_d, e_s, e_c = expected.parts()
    assert torch.equal(d.isnan(), e_d.isnan())
    assert torch.equal(s.isnan(), e_s.isnan())
    assert d.isnan().sum() == 3
    finite = ~d.isnan()
    steps = finite.repeat_interleave(group_size, 1)
    assert torch.equal(q[steps], e_q[steps])
    for a, e in ((d, e_d), (s, e_s), (c, e_c)):
        assert torch.equal(a[finite], e[finite])
    error = (actual.dequantize() - x.float()).abs()
    assert (error <= 0.5001 * d.repeat_interleave(group_size, 1))[steps].all()


def test_a_row_does_not_depend_on_the_others():
    for bits, group_size, symmetric in FORMATS:
        weight = quantized(72, 160, bits, group_size, symmetric)
        x = rand(40, 160)
        alone = torch.cat([quant_matmul(x[i : i + 1], weight, backend="cpu") for i in range(40)])
        for t in range(1, 41):
            assert torch.equal(quant_matmul(x[:t], weight, backend="cpu"), alone[:t])
        assert torch.equal(quant_matmul(x[13:31], weight, backend="cpu"), alone[13:31])


def test_long_prompts_in_blocks_of_tokens():
    weight = quantized(48, 2048)
    x = rand(700, 2048)
    whole = quant_matmul(x, weight, backend="cpu")
    for i in (0, 255, 256, 511, 699):
        assert torch.equal(quant_matmul(x[i : i + 1], weight, backend="cpu")[0], whole[i])


def test_threads_do_not_change_bits():
    weight, x = quantized(600, 64), rand(30, 64)
    threads = _C.num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            _C.set_num_threads(n)
            results.append(quant_matmul(x, weight, backend="cpu"))
    finally:
        _C.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_quantized_activations_can_be_shared():
    x = rand(9, 128)
    shared = quantize_activation(x, 32)
    assert isinstance(shared, QuantActivation)
    assert shared.shape == (9, 128)
    for seed in (1, 2):
        weight = quantized(33, 128, seed=seed)
        assert torch.equal(quant_matmul(shared, weight), quant_matmul(x, weight))


def test_leading_dimensions():
    x, weight = rand(2, 3, 64), quantized(20, 64)
    y = quant_matmul(x, weight)
    assert y.shape == (2, 3, 20)
    assert torch.equal(y.flatten(0, 1), quant_matmul(x.flatten(0, 1), weight))
    assert torch.equal(quant_matmul(x[0, 0], weight), y[0, 0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_non_finite_values_stay_in_their_row_and_are_not_lost(bits, symmetric):
    x, weight = rand(15, 96), quantized(40, 96, bits, symmetric=symmetric)
    x[3, 5], x[7, 40], x[14, 95] = float("nan"), float("inf"), -float("inf")
    y = quant_matmul(x, weight, backend="cpu")
    bad = torch.zeros(15, dtype=torch.bool)
    bad[[3, 7, 14]] = True
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()


def test_extreme_quants_do_not_overflow():
    for bits, group_size, symmetric in FORMATS:
        for value in (0, 2**bits - 1):
            q = torch.full((16, 64), value, dtype=torch.uint8)
            scale = torch.ones(16, 64 // group_size).half()
            weight = QuantTensor.from_parts(q, scale, None if symmetric else scale, bits=bits)
            for sign in (1, -1):
                x = torch.full((2, 64), 127.0 * sign)
                y = quant_matmul(x, weight, backend="cpu")
                assert torch.equal(y, quant_matmul(x, weight, backend="reference"))


def test_bad_arguments():
    weight, x = quantized(20, 64), torch.ones(2, 64)
    cases = [
        (
            lambda: quant_matmul(torch.ones(2, 32), weight),
            r"x: expected \[T, 64\], got float32\[2, 32\]",
        ),
        (lambda: quant_matmul(x.int(), weight, out=torch.ones(2, 20)), "x: expected float32"),
        (
            lambda: quant_matmul(x, weight, torch.ones(7)),
            r"bias: expected float32\[N\], got float32\[7\]",
        ),
        (lambda: quant_matmul(x, weight, torch.ones(20).half()), "bias: expected float32"),
        (lambda: quant_matmul(x, weight, out=torch.ones(2, 21)), r"out: expected \[T, 20\]"),
        (lambda: quant_matmul(x, weight, out=torch.ones(3, 20)), r"out: expected .*T is 2"),
        (lambda: quant_matmul(quantize_activation(x, 16), weight), "in groups of 32, got .* of 16"),
        (lambda: quantize_activation(torch.ones(2, 40)), "multiple of the group size 32"),
        (lambda: quantize_activation(x, 8), "group_size 16 or 32, got .* and 8"),
        (
            lambda: quant_matmul(QuantRows.from_float(x, torch.int8), weight),
            "for QuantRows expected 8 bits, symmetric, with one group a row; got QuantTensor",
        ),
        (
            lambda: quant_matmul(*[QuantRows.from_float(x, torch.int8)] * 2),
            "backend 'cpu' takes no QuantRows; 'reference' does",
        ),
        (
            lambda: _C.quantize_matmul(x, weight.packed[1:], 20, 64, 4, 32, True, None, None),
            "weight: expected packed uint8",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for a, b, message in (
        (x, x, "expected a QuantTensor, got Tensor"),
        (x, QuantRows.from_float(x, torch.int8), "expected a QuantTensor, got QuantRows"),
        (QuantRows.from_float(x, torch.int8), x, "expected QuantRows or a QuantTensor, got Tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            quant_matmul(a, b)


# --- fragments, and the CUDA kernel on the emulator

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(1, 32, 32), (37, 160, 16), (64, 96, 32), (33, 48, 16), (37, 192, 64), (33, 384, 128)]
    + [(33, k, None) for k in (48, 96, 128, 160, 320)],
)
def test_fragments_are_the_same_bytes_wherever_packed(n, k, bits, group_size, symmetric):
    weight = quantized(n, k, bits, group_size, symmetric)
    in_torch, *others = (
        pack_fragments(weight, backend=backend) for backend in ("reference", "cpu", "emulator")
    )
    assert repr(in_torch.panels()) == repr(weight)
    assert torch.equal(in_torch.panels().packed, weight.packed)
    for other in others:
        assert repr(other) == repr(in_torch)
        assert torch.equal(other.packed, in_torch.packed)


def check_device(x, weight, bias=None, backend="emulator", **arguments):
    y = quant_matmul(x, weight, bias, backend=backend, **arguments)
    w = weight.dequantize()
    exact = x.double() @ w.double().t()
    in_torch = x @ w.to(x.dtype).t()
    if bias is not None:
        exact, in_torch = exact + bias.double(), in_torch + bias.to(x.dtype)
    assert_close(y, exact, in_torch)
    return y


# For tensor cores larger groups are formats of their own, with steps of a group or half of one.
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        *itertools.product(
            [*SHAPES, (1, 130, 1024), (9, 300, 256), (70, 20, 320)],
            (32, 16),
        ),
        *itertools.product(
            [(1, 130, 1024), (9, 300, 256), (40, 20, 128), (70, 20, 384)], (64, 128)
        ),
        *itertools.product([(2, 130, 1056), (25, 40, 96), (70, 20, 48)], (None,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("backend", CUDA)
def test_device_matches_reference(shape, bits, group_size, symmetric, dtype, backend):
    t, n, k = shape
    weight = quantized(n, k, bits, group_size, symmetric).to(torch.get_default_device())
    y = check_device(rand(t, k, dtype=dtype), weight, out=poisoned((t, n), dtype), backend=backend)
    assert weight.forms[backend].shape == (n, k)
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [*FORMATS, (4, 64, False), (4, 128, False), (8, 128, True)],
)
@pytest.mark.parametrize("backend", CUDA)
def test_device_row_does_not_depend_on_the_others(bits, group_size, symmetric, backend):
    """On either side of every change of tile size, with tiles that blocks share."""
    dtype = torch.float16 if symmetric else torch.bfloat16
    k = 640 if group_size == 128 else 576
    weight, x = quantized(200, k, bits, group_size, symmetric), rand(130, k, dtype=dtype)
    weight = weight.to(x.device)
    whole = check_device(x, weight, backend=backend)
    for rows in ([0], range(8), range(9), range(5, 22), range(17, 50), range(2, 67), [129]):
        part = quant_matmul(x[list(rows)], weight, backend=backend)
        assert torch.equal(part, whole[list(rows)])


@pytest.mark.parametrize("t", [1, 20])
def test_device_order_of_lanes_and_blocks_does_not_change_bits(t):
    """One tile shared by all blocks; the counters are zero again after each launch."""
    weight, x = quantized(50, 2048), rand(t, 2048, dtype=torch.float16)
    library = device.library("emulator")
    try:
        results = []
        for seed, threads in ((1, 2), (7, 1), (23, 2)):
            library.configure(seed=seed, threads=threads)
            results.append(check_device(x, weight))
    finally:
        library.configure(seed=1, threads=2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n", [48, 50])
def test_device_bias_strides_alignment_and_leading_dimensions(n):
    weight, bias = quantized(n, 96), rand(n, seed=3)
    x, out = rand(2, 3, 96, dtype=torch.bfloat16), poisoned((6, n), torch.bfloat16)
    plain = check_device(x, weight, bias)
    assert plain.shape == (2, 3, n)
    rows = x.flatten(0, 1)
    y = quant_matmul(strided(rows), weight, bias, out=strided(out), backend="emulator")
    assert torch.equal(y, plain.flatten(0, 1))
    # An address that is no multiple of 16.
    shifted = torch.cat([rows.new_zeros(6, 1), rows], dim=1)[:, 1:]
    assert torch.equal(quant_matmul(shifted, weight, bias, backend="emulator"), y)
    fragments = pack_fragments(weight)
    assert torch.equal(quant_matmul(rows[0], fragments, bias, backend="emulator"), y[0])
    assert torch.equal(
        quant_matmul(rows, fragments, bias, backend="reference"),
        quant_matmul(rows, weight, bias, backend="reference"),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_device_extremes(bits, symmetric, dtype):
    check_extremes(bits, symmetric, dtype, backend="emulator")


def check_extremes(bits, symmetric, dtype, backend):
    """All quants are exact, what is not finite stays in its row, and large sums do not overflow."""
    q = (torch.arange(64 * 256) * 7 % 2**bits).to(torch.uint8).view(64, 256)
    scale = torch.ones(64, 8).half()
    weight = QuantTensor.from_parts(q, scale, None if symmetric else scale, bits=bits)
    x = torch.zeros(256, 256, dtype=dtype).fill_diagonal_(1.0)
    assert torch.equal(quant_matmul(x, weight, backend=backend), weight.dequantize().t().to(dtype))
    x = rand(20, 256, dtype=dtype)
    x[3, 5], x[7, 40], x[14, 95] = float("nan"), float("inf"), -float("inf")
    finite = quant_matmul(x, weight, backend=backend).isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [3, 7, 14]
    x = torch.full((1, 256), 6e4, dtype=dtype)
    x[:, 1::2] *= -1
    small = QuantTensor.from_parts(
        q[:, :1].expand(64, 256).contiguous(), scale, None if symmetric else scale, bits=bits
    )
    assert torch.equal(quant_matmul(x, small, backend=backend), torch.zeros(1, 64, dtype=dtype))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_device_one_row_moves_little_more_than_the_weight(bits, group_size, symmetric):
    n, k = 1024, 2048
    weight = pack_fragments(quantized(n, k, bits, group_size, symmetric))
    x = rand(1, k, dtype=torch.float16)
    device.emulator_report()
    quant_matmul(x, weight, backend="emulator")
    (launch,) = device.emulator_report()
    buffers = launch["buffers"]
    assert buffers["weight"]["read_sectors"] * 32 == len(weight.packed)
    moved = sum(32 * (b["read_sectors"] + b["written_sectors"]) for b in buffers.values())
    least = len(weight.packed) + 2 * k + 2 * n
    assert moved <= 1.05 * least


@pytest.mark.parametrize("t", [1, 16, 64, 128])
@pytest.mark.parametrize("group_size", [32, 128])
def test_device_has_no_bank_conflicts(t, group_size):
    weight = pack_fragments(quantized(256, 512, group_size=group_size))
    x = rand(t, 512, dtype=torch.float16)
    device.emulator_report()
    quant_matmul(x, weight, backend="emulator")
    (launch,) = device.emulator_report()
    shared = [site for site in launch["sites"] if site["space"] == "shared"]
    assert sum(site["transactions"] for site in shared) > 1000
    assert sum(site["transactions"] - site["ideal"] for site in shared) == 0


def test_device_bad_arguments():
    weight, x = quantized(20, 64), torch.ones(2, 64).half()
    cases = [
        ({"x": torch.ones(2, 64)}, "x: expected bfloat16 or float16|x: expected float16"),
        ({"x": x[:, :32]}, r"x: expected \[T, 64\], got float16\[2, 32\]"),
        ({"bias": torch.ones(7)}, r"bias: expected float32\[N\], got float32\[7\]"),
        ({"out": torch.ones(2, 21).half()}, r"out: expected \[T, 20\]"),
        ({"out": torch.ones(2, 20).bfloat16()}, "out: expected float"),
        ({"x": quantize_activation(x)}, "takes no QuantActivation"),
        ({"bias": torch.ones(20, device="meta")}, "bias: expected it on cpu, got meta"),
        (
            {"weight": replace(pack_fragments(weight), shape=(64, 64))},
            "weight: expected packed uint8",
        ),
        ({"weight": pack_fragments(weight), "backend": "cpu"}, "call its panels"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quant_matmul(**{"x": x, "weight": weight, "backend": "emulator", **arguments})
    for empty in (x[:0], x[:0, None]):
        assert quant_matmul(empty, weight, backend="emulator").shape == (*empty.shape[:-1], 20)


@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("backend", DEVICES)
def test_device_float32_of_halves_is_what_would_be_rounded(n, dtype, backend):
    """As a head gives its logits."""
    x, bias = rand(5, 96, dtype=dtype), rand(n, seed=3)
    weight = quantized(n, 96).to(x.device)
    y = quant_matmul(x, weight, bias, out=poisoned((5, n), torch.float32), backend=backend)
    assert not torch.equal(y, y.to(dtype).float())
    assert torch.equal(y.to(dtype), quant_matmul(x, weight, bias, backend=backend))
    with pytest.raises(ValueError, match=r"out: expected .*float32"):
        quant_matmul(x, weight, out=torch.ones(5, n, dtype=torch.float64), backend=backend)


# --- Triton's kernel, in its interpreter where there is no device


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((1, 1, 32), 32),
        ((0, 16, 32), 32),
        ((3, 17, 48), 16),
        ((25, 40, 1536), 32),
        ((9, 300, 320), 64),
        ((70, 20, 384), 128),
        ((150, 40, 80), None),
        ((2, 130, 1056), None),
    ],
    ids=str,
)
@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product((4, 8), (False, True))))
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_matches_reference(shape, group_size, bits, symmetric, backend):
    t, n, k = shape
    weight, bias = quantized(n, k, bits, group_size, symmetric), rand(n, seed=3)
    for dtype in DTYPES:
        out = poisoned((t, n), dtype)
        assert check_device(rand(t, k, dtype=dtype), weight, bias, backend, out=out) is out


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_row_does_not_depend_on_the_others(bits, symmetric, backend):
    """On either side of every change of tile size, with splits in programs of their own or not."""
    weight, x = quantized(70, 1600, bits, 32, symmetric), rand(1100, 1600, dtype=torch.float16)
    whole = check_device(x, weight, backend=backend)
    for rows in ([0], range(17), range(5, 40), range(2, 102), [1099]):
        part = quant_matmul(x[list(rows)], weight, backend=backend)
        assert torch.equal(part, whole[list(rows)])
    y = quant_matmul(strided(x[:4].view(2, 2, -1)), weight, backend=backend)
    assert torch.equal(y.flatten(0, 1), whole[:4])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_extremes(bits, symmetric, dtype, backend):
    check_extremes(bits, symmetric, dtype, backend)


@pytest.mark.parametrize("dtype", QuantRows.LIMITS, ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(0, 5, 64), (1, 70, 1100), (40, 17, 200), (130, 30, 128)], ids=str
)
@pytest.mark.parametrize("backend", ["triton"])
def test_triton_multiplies_rows_as_they_are(dtype, shape, backend):
    t, n, k = shape
    x, weight = (QuantRows.from_float(rand(m, k, seed=m), dtype) for m in (t, n))
    bias = rand(n, seed=3)
    for to in DTYPES:
        out = poisoned((t, n), to)
        quant_matmul(x, weight, bias, out=out, backend=backend)
        exact = quant_matmul(x, weight, bias, out=torch.empty(t, n).double(), backend="reference")
        same = (x.q.to(to) @ weight.q.to(to).t()) * x.scale[:, None].to(to) * weight.scale.to(to)
        assert_close(out, exact, same + bias.to(to))
    if t > 1:
        one = QuantRows(x.q[-1:], x.scale[-1:])
        assert torch.equal(
            quant_matmul(one, weight, bias, out=out[:1].clone(), backend=backend), out[-1:]
        )


def test_triton_bad_arguments():
    weight, x = quantized(20, 64), torch.ones(2, 64).half()
    rows = QuantRows.from_float(x, torch.int8)
    cases = [
        ({"x": x[:, :32]}, r"x: expected .*\[T 64\], got float16\[2, 32\]"),
        ({"bias": torch.ones(7)}, r"bias: expected float32\[20\], got float32\[7\]"),
        ({"out": torch.ones(2, 21).half()}, r"out: expected float16\|float32\[T 20\]"),
        ({"out": torch.ones(2, 20).bfloat16()}, "out: expected float"),
        ({"x": quantize_activation(x)}, "takes no QuantActivation with QuantTensor"),
        ({"weight": pack_fragments(weight)}, "takes no Tensor with QuantFragments"),
        ({"bias": torch.ones(20, device="meta")}, "bias: expected it on cpu, got meta"),
        (
            {"x": rows, "weight": QuantRows.from_float(x, torch.float8_e4m3fn)},
            "weight: expected torch.int8 as x",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quant_matmul(**{"x": x, "weight": weight, "backend": "triton", **arguments})
