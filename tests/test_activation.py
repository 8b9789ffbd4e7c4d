import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, ROWS, dtype_name, rand, strided
from compare import EPS, assert_close, poisoned

from pyllm.ops import activation_backward, gelu, gelu_mul, quantize_activation, relu, silu_mul
from pyllm.ops.registry import use

BACKENDS = ["cpu", "triton"]
UNARY = {
    "relu": (relu, F.relu),
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (lambda x, **k: gelu(x, "tanh", **k), lambda x: F.gelu(x, approximate="tanh")),
}
GATED = {
    "silu_mul": (silu_mul, F.silu),
    "gelu_mul": (gelu_mul, F.gelu),
    "gelu_mul_tanh": (lambda g, u, **k: gelu_mul(g, u, "tanh", **k), UNARY["gelu_tanh"][1]),
}


def assert_matches_reference(backend, shape, dtype, layout, name):
    op, torch_function = (UNARY | GATED)[name]
    inputs = [rand(*shape, dtype=dtype, scale=3, seed=i) for i in range(1 + (name in GATED))]
    if layout == "strided":
        inputs = [strided(x) for x in inputs]
    out = poisoned(shape, dtype)
    assert op(*inputs, out=out, backend=backend) is out
    exact = op(*(x.double() for x in inputs), backend="reference")
    same_dtype = torch_function(inputs[0])
    if name in GATED:
        same_dtype = same_dtype * inputs[1]
    assert_close(out, exact, same_dtype)


@pytest.mark.parametrize("shape", [*ROWS, (1, 5000), (2, 3, 9000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("name", [*UNARY, *GATED])
def test_matches_reference(shape, dtype, layout, name):
    assert_matches_reference("cpu", shape, dtype, layout, name)


# Few, as the interpreter is slow.
@pytest.mark.parametrize("shape", [(1, 1), (0, 64), (33, 17), (2, 3, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", [*UNARY, *GATED])
@pytest.mark.parametrize("backend", ["triton"])
def test_a_device_matches_reference(shape, dtype, name, backend):
    assert_matches_reference(backend, shape, dtype, "strided", name)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_accuracy_over_the_whole_range(name, backend):
    """A few units in the last place of every value that is a normal number."""
    op, _ = UNARY[name]
    x = torch.linspace(-12, 40, 100001)
    exact = op(x.double(), backend="reference")
    if name == "gelu":  # erfc has no cancellation where 1 + erf has
        exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    if name == "gelu_tanh":
        cubic = x.double() + 0.044715 * x.double() ** 3
        exact = x.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * cubic)
    error = (op(x, backend=backend).double() - exact).abs()
    # The argument of the exponential rounds too, and its error comes out multiplied by it.
    amplified = 1 + (x.double().abs() ** 3 * 0.08 if name == "gelu_tanh" else x.double() ** 2 / 16)
    normal = exact.abs() > 1e-36
    worst = (error / (exact.abs() * amplified).clamp(min=1e-38))[normal].max()
    assert worst < 4 * EPS[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_relative_accuracy(backend):
    x = torch.linspace(-80, 80, 100001)
    exact = F.silu(x.double())
    error = (silu_mul(x, torch.ones_like(x), backend=backend).double() - exact).abs()
    assert (error / exact.abs().clamp(min=1e-36)).max() < 4 * EPS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", [*UNARY, *GATED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_and_extreme_values(name, dtype, backend):
    op, torch_function = (UNARY | GATED)[name]
    huge = torch.finfo(dtype).max
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, huge, -huge, 0.0, -0.0, 1e-7, -50.0], dtype=dtype)
    up = [torch.ones_like(x)] if name in GATED else []
    y = op(x, *up, backend=backend)
    expected = torch_function(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_a_fused_projection(backend):
    gate, up = rand(6, 2 * 40).chunk(2, -1)
    whole = silu_mul(gate.contiguous(), up.contiguous(), backend=backend)
    assert torch.equal(silu_mul(gate, up, backend=backend), whole)


@pytest.mark.parametrize("width", [17, 96, 9000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(width, backend):
    gate, up = rand(20, width), rand(20, width, seed=1)
    whole = silu_mul(gate, up, backend=backend)
    for i in range(20):
        alone = silu_mul(gate[i : i + 1], up[i : i + 1], backend=backend)
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: silu_mul(x, torch.ones(2, 7)), r"up: expected .*\(D is 8\)"),
        (lambda x: silu_mul(x, x.half()), "up: expected float32"),
        (lambda x: relu(x.int()), "x: expected float32"),
        (lambda x: relu(x, out=torch.ones(3, 8)), r"out: expected .*\(T is 2\)"),
        (lambda x: relu(x.t()), "contiguous last dimension"),
        (lambda x: gelu(x, "exact"), "approximate: expected 'none' or 'tanh', got 'exact'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(call, message, backend):
    with pytest.raises(ValueError, match=message), use(backend):
        call(torch.ones(2, 8))


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
def test_quantized_output_is_what_quantizing_the_output_gives(op, group_size):
    both = rand(5, 2 * 4160)
    gate, up = both[:, :4160], both[:, 4160:]
    q = op(gate, up, quantize=group_size)
    expected = quantize_activation(op(gate, up), group_size)
    assert all(torch.equal(a, b) for a, b in zip(q.parts(), expected.parts(), strict=True))


KINDS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": UNARY["gelu_tanh"][1]}


def gradients(kind, dy, gate, up):
    """PyTorch's own, in the dtype of its arguments."""
    inputs = [x.detach().requires_grad_() for x in (gate, up) if x is not None]
    y = KINDS[kind](inputs[0])
    return torch.autograd.grad(y if up is None else y * inputs[1], inputs, dy)


@pytest.mark.parametrize("shape", [(1, 1), (0, 64), (64,), (33, 17), (2, 3, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients(kind, gated, dtype, shape, backend):
    inputs = [strided(rand(*shape, dtype=dtype, scale=3, seed=i)) for i in range(3)]
    inputs = inputs if gated else [*inputs[:2], None]
    up = inputs[2]
    found = activation_backward(kind, *inputs, backend=backend)
    assert gated or found[1] is None
    exact = gradients(kind, *(x if x is None else x.double() for x in inputs))
    # Near its zeros the derivative is a difference of terms of size 1, in float32.
    terms = inputs[0] if up is None else inputs[0] * up
    cancelled = EPS[torch.float32] * terms.abs().max() if terms.numel() else 0
    for grad, wide, same in zip(found, exact, gradients(kind, *inputs), strict=False):
        largest = wide.abs().max() if wide.numel() else 0
        assert_close(grad, wide, same, floor=max(EPS[dtype] * largest, cancelled))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_of_extreme_values(kind, backend):
    huge, inf = torch.finfo(torch.float32).max, float("inf")
    x = torch.tensor([float("nan"), inf, huge, 1e15, 90.0, -90.0, -1e15, -huge, -inf, 0.0])
    limits = [float("nan"), 1, 1, 1, 1, 0, 0, 0, 0, 0 if kind == "relu" else 0.5]
    if kind == "relu":  # PyTorch has it so
        limits[0] = 1
    dx, _ = activation_backward(kind, torch.ones_like(x), x, backend=backend)
    torch.testing.assert_close(dx, torch.tensor(limits).to(dx), rtol=0, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton"])
def test_gradients_of_a_row_do_not_depend_on_the_others(backend):
    dy, gate, up = (rand(9, 300, seed=i) for i in range(3))
    whole = activation_backward("silu", dy, gate, up, backend=backend)
    alone = activation_backward("silu", dy[4:5], gate[4:5], up[4:5], backend=backend)
    assert all(torch.equal(a[0], w[4]) for a, w in zip(alone, whole, strict=True))


def test_gradients_with_bad_arguments():
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"kind: expected one of relu, silu, .*, got 'swish'"):
        activation_backward("swish", x, x)
    with pytest.raises(ValueError, match="gate: expected float32"):
        activation_backward("silu", x, x.half(), backend="triton")
    with pytest.raises(ValueError, match=r"up: expected .*\(D is 8\)"):
        activation_backward("silu", x, x, torch.ones(2, 7), backend="triton")
