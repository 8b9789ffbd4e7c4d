"""What `rms_norm` and `layer_norm` share: gradients; on CUDA any width, quantized rows, traffic."""

import pytest
import torch
from cases import BACKENDS, BAD_NORM_ARGUMENTS, CUDA, DEVICES, DTYPES, dtype_name, rand, strided
from compare import EPS as EPS_OF
from compare import assert_close, poisoned

from pyllm import _C
from pyllm.ops import device, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from pyllm.quant import QuantRows

EPS = 1e-5
OPS = ["rms_norm", "layer_norm"]
# (rows, width): rows that share a warp, a warp each, a block each; held in one, four or sixteen
# vectors a thread, in shared memory too (65536 of float32), and beyond that; odd widths of each.
SHAPES = [(300, 64), (7, 1), (37, 100), (5, 2048), (3, 2055), (2, 4096), (2, 16400), (2, 40001)]
SHAPES += [(1, 65536), (1, 100008)]
# Of the gradients: many rows a block, one, and rows too wide for the sums to be held beside them.
BACKWARD_SHAPES = [(700, 64), (7, 1), (37, 100), (9, 1000), (300, 2055), (3, 8192), (70, 8200)]
BACKWARD_SHAPES += [(2, 16391), (2, 65536)]
BACKWARD_CASES = [(s, b) for b in ["reference", "cpu", *CUDA] for s in BACKWARD_SHAPES]
# Fewer rows in Triton's interpreter, which takes its time for each tile.
BACKWARD_CASES += [(s, "triton") for s in [(40, 64), (7, 1), (9, 1000), (4, 8192), (9, 8200)]]
BACKWARD_CASES += [((2, 20000), "triton")]


def forward(op, x, weight, bias, **options):
    """Either op; RMSNorm has no bias."""
    if op == "rms_norm":
        return rms_norm(x, weight, EPS, **options)
    return layer_norm(x, weight, bias, EPS, **options)


def backward(op, dy, x, weight, **options):
    """``(dx, dweight)``, and dbias."""
    function = rms_norm_backward if op == "rms_norm" else layer_norm_backward
    return function(dy, x, weight, EPS, **options)


def torch_forward(op, x, weight, bias):
    """PyTorch's own, in x's dtype."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if op == "rms_norm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def gradients(function, op, dy, *tensors, residual_grad=None):
    """By autograd, of x, weight and, for LayerNorm, bias."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    function(op, *leaves).backward(dy)
    x, weight, bias = (leaf.grad for leaf in leaves)
    x = x if residual_grad is None else x + residual_grad
    return (x, weight) if op == "rms_norm" else (x, weight, bias)


def reference(op, x, weight, bias):
    return forward(op, x, weight, bias, backend="reference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", DEVICES)
def test_rows_of_any_width(op, shape, dtype, backend):
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight, bias = rand(shape[1], dtype=dtype, seed=2), rand(shape[1], dtype=dtype, seed=3)
    out = poisoned(shape, dtype)
    y, total = forward(op, x, weight, bias, residual=residual, out=out, backend=backend)
    assert torch.equal(total, x + residual)
    exact = reference(op, total.double(), weight, bias)
    same_dtype = torch_forward(op, total, weight, bias)
    assert_close(y, exact, same_dtype)
    assert_close(forward(op, total, weight, bias, backend=backend), exact, same_dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "backend"), BACKWARD_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_gradients_are_those_of_autograd(op, shape, dtype, with_residual, backend):
    x, dy = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight, bias = rand(shape[1], dtype=dtype, seed=2), rand(shape[1], dtype=dtype, seed=3)
    extra = rand(*shape, dtype=dtype, seed=4) if with_residual else None
    out = poisoned(shape, dtype)
    actual = backward(op, dy, x, weight, residual_grad=extra, out=out, backend=backend)
    assert actual[0] is out
    doubles = [t.double() for t in (x, weight, bias)]
    wide = None if extra is None else extra.double()
    exact = gradients(reference, op, dy.double(), *doubles, residual_grad=wide)
    same_dtype = gradients(torch_forward, op, dy, x, weight, bias, residual_grad=extra)
    # dx is a difference of terms as large as dy * weight / deviation, of which, for a width of 1,
    # next to nothing is left: one float32 ulp of those, and one of the result in its dtype.
    spread = doubles[0].square() if op == "rms_norm" else doubles[0].var(1, correction=0)
    deviation = (spread.view(len(x), -1).mean(1, keepdim=True) + EPS).sqrt()
    terms = (dy.double() * doubles[1] / deviation).abs().max()
    floors = [EPS_OF[dtype] * exact[0].abs().max() + EPS_OF[torch.float32] * terms, None, None]
    names = ("dx", "dweight", "dbias")
    for name, a, e, s, floor in zip(names, actual, exact, same_dtype, floors, strict=False):
        assert a.dtype == dtype
        assert_close(a, e, s, what=name, floor=floor)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_layer_norm_without_weight_and_weights_of_other_dtypes(backend):
    x, dy = rand(20, 72), rand(20, 72, seed=1)
    ones = torch.ones(72)
    plain = layer_norm_backward(dy, x, backend=backend)
    for a, b in zip(plain, layer_norm_backward(dy, x, ones, backend=backend), strict=True):
        assert torch.equal(a, b)
    dx, dweight = rms_norm_backward(dy, x, ones.bfloat16(), backend=backend)
    assert dweight.dtype == torch.bfloat16
    assert torch.equal(dx, rms_norm_backward(dy, x, ones, backend=backend)[0])
    assert torch.equal(
        layer_norm(x, ones.half(), backend=backend), layer_norm(x, ones, backend=backend)
    )
    assert torch.equal(
        layer_norm(x, bias=0 * ones, backend=backend), layer_norm(x, backend=backend)
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("width", "backend"),
    [
        *((w, b) for b in ["cpu", *CUDA] for w in (72, 1000, 4096, 16392)),
        (72, "triton"),
        (1000, "triton"),
    ],
)
def test_bits_depend_on_nothing_but_the_row(op, width, backend):
    """Not on other rows, nor on how the tensors lie in memory and so on the accesses used."""
    x, dy = rand(20, width, dtype=torch.float16), rand(20, width, dtype=torch.float16, seed=1)
    weight, bias = rand(width, seed=2), rand(width, seed=3)
    y = forward(op, x, weight, bias, backend=backend)
    results = backward(op, dy, x, weight, backend=backend)
    for i in (0, 7, 19):
        row = slice(i, i + 1)
        assert torch.equal(forward(op, x[row], weight, bias, backend=backend), y[row])
        assert torch.equal(
            backward(op, dy[row], x[row], weight, backend=backend)[0], results[0][row]
        )
    for extra in (5, 8):
        loose = (strided(t, extra) for t in (dy, x))
        for a, b in zip(backward(op, *loose, weight, backend=backend), results, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(forward(op, strided(x, extra), weight, bias, backend=backend), y)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(3, 20), (1000, 72), (37, 3, 1000)], ids=str)
@pytest.mark.parametrize("n_threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(op, shape, n_threads):
    x, dy, weight = rand(*shape), rand(*shape, seed=1), rand(shape[-1], seed=2)

    def results():
        y = forward(op, x, weight, weight, residual=dy, backend="cpu")
        return *y, *backward(op, dy, x, weight, residual_grad=y[1], backend="cpu")

    before = _C.num_threads()
    try:
        _C.set_num_threads(1)
        expected = results()
        _C.set_num_threads(n_threads)
        actual = results()
    finally:
        _C.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_rows_that_are_not_finite(op):
    x, dy, weight = rand(40, 96), rand(40, 96, seed=1), rand(96, seed=2)
    x[3, 5], dy[20, 7] = float("nan"), float("inf")
    dx, *_ = backward(op, dy, x, weight, backend="cpu")
    broken = torch.zeros(40, dtype=torch.bool)
    broken[[3, 20]] = True
    assert torch.equal(dx.isfinite().all(1), ~broken)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x: expected float32"),
        ({"dy": torch.ones(2, 7)}, r"dy: expected .*\(D is 8\)"),
        ({"dy": torch.ones(2, 8).half()}, "dy: expected float32"),
        ({"weight": torch.ones(7)}, r"weight: expected .*\[D\], got float32\[7\] \(D is 8\)"),
        ({"residual_grad": torch.ones(3, 8)}, r"residual_grad: expected .*\(T is 2\)"),
        ({"out": torch.ones(2, 8).half()}, "out: expected float32"),
    ],
)
def test_bad_arguments_of_the_gradients(op, arguments, message):
    good = {"dy": torch.ones(2, 8), "x": torch.ones(2, 8), "weight": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        backward(op, **{**good, **arguments}, backend="cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [24, 1000, 4096, 9000])
def test_any_order_of_lanes_gives_the_same_bits(op, width):
    x, dy, weight = rand(40, width), rand(40, width, seed=1), rand(width, seed=2)
    emulator = device.library("emulator")
    results = []
    try:
        for seed in (1, 2, 3):
            emulator.configure(seed=seed, threads=2)
            results.append(
                (
                    *forward(op, x, weight, weight, residual=dy, backend="emulator"),
                    *backward(op, dy, x, weight, residual_grad=dy, backend="emulator"),
                    forward(op, x, weight, weight, quantize=torch.int8, backend="emulator").q,
                )
            )
    finally:
        emulator.configure(seed=1, threads=2)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(40, 64), (3, 4, 60), (3, 77), (2, 3000), (1, 40000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("backend", ["reference", *DEVICES])
def test_quantized_rows(op, shape, dtype, to, backend):
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight, bias = rand(shape[-1], seed=2), rand(shape[-1], seed=3)
    q, total = forward(op, x, weight, bias, residual=residual, quantize=to, backend=backend)
    assert torch.equal(total, x + residual)
    assert q.q.dtype == to
    assert q.scale.shape == shape[:-1]
    exact = reference(op, total.double(), weight, bias)
    top = exact.abs().amax(-1)
    # Two roundings: of y in float32, and of the scale.
    torch.testing.assert_close(q.scale.double(), top / QuantRows.LIMITS[to], rtol=1e-5, atol=0)
    error = (q.dequantize().double() - exact).abs()
    scale = q.scale.double()[..., None]
    # Half a step: of integers; of three bits of mantissa, or of the subnormals' 2^-9.
    half = 0.5 * scale if to == torch.int8 else (exact.abs() / 16).maximum(scale * 2**-10)
    assert (error <= half + 1e-5 * top[..., None]).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn], ids=dtype_name)
@pytest.mark.parametrize("backend", ["reference", *DEVICES])
def test_quantized_rows_that_are_zero_or_not_finite(op, to, backend):
    x = rand(4, 96)
    x[0] = 0
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    q = forward(op, x, torch.ones(96), torch.zeros(96), quantize=to, backend=backend)
    assert q.scale[0] == 0
    assert q.q[0].float().eq(0).all()
    assert q.scale[1:3].isnan().all()
    assert q.dequantize()[1:3].isnan().all()
    assert q.dequantize()[3].isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_rows(op, backend):
    x, weight = torch.empty(0, 64), torch.ones(64)
    assert forward(op, x, weight, weight, backend=backend).shape == (0, 64)
    if backend != "cpu":
        q = forward(op, x, weight, weight, quantize=torch.int8, backend=backend)
        assert q.scale.shape == (0,)
    dx, *parameters = backward(op, x, x, weight, backend=backend)
    assert dx.shape == (0, 64)
    assert all(torch.equal(p, torch.zeros(64)) for p in parameters)


def moved(launches, name, way):
    """Bytes of the sectors that launches read from a buffer or wrote to it."""
    return sum(32 * launch["buffers"].get(name, {way: 0})[way] for launch in launches)


def traffic(function):
    device.emulator_report()
    function()
    return device.emulator_report()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(512, 64), (64, 1024), (20, 4096), (8, 65536)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_forward_moves_the_least_there_is(op, dtype, shape, with_residual):
    x = rand(*shape, dtype=dtype)
    weight, bias = rand(shape[1], dtype=dtype, seed=1), rand(shape[1], dtype=dtype, seed=2)
    residual = rand(*shape, dtype=dtype, seed=3) if with_residual else None
    launches = traffic(lambda: forward(op, x, weight, bias, residual=residual, backend="emulator"))
    (launch,) = launches
    assert moved(launches, "x", "read_sectors") == x.nbytes
    assert moved(launches, "out", "written_sectors") == x.nbytes
    assert moved(launches, "out", "read_sectors") == 0
    if with_residual:
        assert moved(launches, "residual", "read_sectors") == x.nbytes
        assert moved(launches, "residual_out", "written_sectors") == x.nbytes
        assert moved(launches, "residual_out", "read_sectors") == 0
    # Every row reads the parameters, from L1; where rows share a warp they read them together.
    assert moved(launches, "weight", "read_sectors") <= shape[0] * weight.nbytes
    assert launch["buffers"]["weight"]["distinct_read"] == weight.nbytes
    # Nothing is read or written in pieces.
    sites = [site for site in launch["sites"] if site["space"] == "global"]
    assert all(site["transactions"] <= site["ideal"] for site in sites)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(64, 64), (16, 4096)], ids=str)
def test_quantizing_moves_no_more(op, shape):
    x, weight = rand(*shape, dtype=torch.bfloat16), rand(shape[1], dtype=torch.bfloat16, seed=1)
    launches = traffic(
        lambda: forward(op, x, weight, weight, quantize=torch.int8, backend="emulator")
    )
    assert moved(launches, "x", "read_sectors") == x.nbytes
    assert moved(launches, "out", "written_sectors") == x.numel()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_backward_moves_the_least_there_is(op, dtype):
    parameters = 1 if op == "rms_norm" else 2
    x, dy = rand(8192, 96, dtype=dtype), rand(8192, 96, dtype=dtype, seed=1)
    weight = rand(96, seed=2)
    launches = traffic(lambda: backward(op, dy, x, weight, backend="emulator"))
    for name in ("x", "dy"):
        assert moved(launches, name, "read_sectors") == x.nbytes
    assert moved(launches, "out", "written_sectors") == x.nbytes
    parts = 4 * 256 * 96 * parameters
    assert moved(launches, "scratch", "written_sectors") == parts
    assert moved(launches, "scratch", "read_sectors") == parts
    if parameters == 1:
        assert 2 * parts <= 0.05 * 3 * x.nbytes


@pytest.mark.parametrize("op", OPS)
def test_backward_of_wide_rows_reads_them_twice(op):
    x, dy = rand(20, 16384, dtype=torch.float16), rand(20, 16384, dtype=torch.float16, seed=1)
    launches = traffic(lambda: backward(op, dy, x, rand(16384), backend="emulator"))
    for name in ("x", "dy"):
        assert moved(launches, name, "read_sectors") == pytest.approx(2 * x.nbytes, rel=0.01)
    assert moved(launches, "out", "written_sectors") == pytest.approx(x.nbytes, rel=0.01)


def misaligned(*shape):
    """A tensor of float32 that begins two bytes too late."""
    size = torch.Size(shape).numel()
    data = bytearray(4 * size + 4)
    return torch.frombuffer(data, dtype=torch.float32, offset=2, count=size).view(shape)


HUGE = torch.zeros(1, 64).expand(2**25, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD_NORM_ARGUMENTS,
        ({"x": misaligned(2, 8)}, "x: expected data aligned to its 4 bytes"),
        ({"x": HUGE, "out": HUGE, "weight": torch.ones(64)}, r"x: expected fewer than 2\^31"),
        ({"weight": torch.ones(8, device="meta")}, "weight: expected it on cpu, got meta"),
        ({"weight": torch.ones(8).double()}, "weight: expected float32"),
        ({"quantize": torch.int16}, "quantize: expected int8 or float8_e4m3fn, got torch.int16"),
        ({"quantize": torch.int8, "out": torch.ones(2, 8)}, "out: expected None with quantize"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_bad_arguments(function, arguments, message):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(8), "backend": "emulator"}
    with pytest.raises(ValueError, match=message):
        function(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight: expected .*\[D\], got float32\[7\] \(D is 8\)"),
        ({"dy": torch.ones(2, 8).half()}, "dy: expected float32"),
        ({"dy": torch.ones(3, 8)}, r"dy: expected .*\(T is 2\)"),
        ({"dy": misaligned(2, 8)}, "dy: expected data aligned to its 4 bytes"),
        ({"residual_grad": torch.ones(2, 9)}, r"residual_grad: expected .*\(D is 8\)"),
        ({"out": torch.ones(2, 8).half()}, "out: expected float32"),
        ({"dy": torch.ones(2, 8, device="meta")}, "dy: expected it on cpu, got meta"),
    ],
)
@pytest.mark.parametrize("function", [rms_norm_backward, layer_norm_backward])
def test_bad_arguments_of_gradients(function, arguments, message):
    ones = torch.ones(2, 8)
    good = {"dy": ones, "x": ones, "weight": torch.ones(8), "backend": "emulator"}
    with pytest.raises(ValueError, match=message):
        function(**{**good, **arguments})


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_the_cpu_quantizes_no_rows(function):
    with pytest.raises(ValueError, match=r"quantize: expected .* on the CPU, got torch.int8"):
        function(torch.ones(2, 8), torch.ones(8), quantize=torch.int8, backend="cpu")
