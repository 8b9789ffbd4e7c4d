import pytest
import torch
from cases import DTYPES, ROWS, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm.ops import layer_norm

EPS = 1e-5


def torch_layer_norm(x, weight, bias):
    """PyTorch's own, in the dtype of its inputs."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_matches_reference(shape, dtype, layout, with_residual):
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight, bias = rand(shape[-1], seed=2), rand(shape[-1], seed=3)
    if layout == "strided":
        x, residual = strided(x), strided(residual)
    out = poisoned(shape, dtype)
    if not with_residual:
        y, total = layer_norm(x, weight, bias, EPS, out=out, backend="cpu"), x
    else:
        y, total = layer_norm(x, weight, bias, EPS, residual=residual, out=out, backend="cpu")
        assert torch.equal(total, x + residual)
    assert y is out
    exact = layer_norm(*double(total, weight, bias), EPS, backend="reference")
    assert_close(y, exact, torch_layer_norm(total, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "both"])
def test_weight_and_bias_are_optional_and_of_any_float_dtype(dtype, parameters):
    x = rand(4, 70)
    weight = rand(70, dtype=dtype, seed=1) if parameters in ("weight", "both") else None
    bias = rand(70, dtype=dtype, seed=2) if parameters in ("bias", "both") else None
    exact = layer_norm(*double(x, weight, bias), EPS, backend="reference")
    same_dtype = torch_layer_norm(x, weight, bias)
    assert_close(layer_norm(x, weight, bias, EPS, backend="cpu"), exact, same_dtype)


@pytest.mark.parametrize("width", [1, 17, 768])
def test_a_large_offset_does_not_cancel(width):
    """E[x²] - E[x]² would lose every digit here."""
    x = rand(5, width) + 10000
    exact = layer_norm(x.double(), backend="reference")
    # The mean is a float32, and one ulp of it is an error of 1e-3 in values of size 1.
    same_dtype = torch_layer_norm(x, None, None)
    assert_close(layer_norm(x, backend="cpu"), exact, same_dtype, floor=9.8e-4)


def test_heads_of_a_fused_projection():
    heads = rand(6, 5 * 32)[:, : 3 * 32].view(6, 3, 32)
    weight = rand(32, seed=1)
    assert torch.equal(layer_norm(heads, weight), layer_norm(heads.contiguous(), weight))


def test_non_finite_values_stay_in_their_row():
    x = rand(3, 40)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = layer_norm(x)
    assert torch.isnan(y[:2]).all()
    assert torch.isfinite(y[2]).all()


def test_a_row_does_not_depend_on_the_others():
    x, weight, bias = rand(50, 96), rand(96, seed=1), rand(96, seed=2)
    whole = layer_norm(x, weight, bias)
    assert all(torch.equal(layer_norm(x[i : i + 1], weight, bias)[0], whole[i]) for i in range(50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight: expected .*\[D\], got float32\[7\] \(D is 8\)"),
        ({"bias": torch.ones(8).half()}, r"bias: expected the dtype of weight \(float32\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x: expected float32"),
        ({"residual": torch.ones(3, 8)}, r"residual: expected .*\(T is 2\)"),
        ({"x": torch.ones(8, 2).t()}, "contiguous last dimension"),
        ({"out": torch.ones(2, 8, dtype=torch.float16)}, "out: expected float32"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(8), "backend": "cpu"}
    with pytest.raises(ValueError, match=message):
        layer_norm(**{**good, **arguments})
