import pytest
import torch
from cases import BACKENDS, BAD_NORM_ARGUMENTS, DTYPES, ROWS, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm.ops import quantize_activation, rms_norm

EPS = 1e-5


def torch_rms_norm(x, weight, residual=None):
    """PyTorch's own, in the dtype of its inputs."""
    x = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), EPS)


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(shape, dtype, layout, with_residual, backend):
    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight = rand(shape[-1], seed=2)
    if layout == "strided":
        x, residual = strided(x), strided(residual)
    out = poisoned(shape, dtype)
    if not with_residual:
        y = rms_norm(x, weight, EPS, out=out, backend=backend)
        total = x
    else:
        y, total = rms_norm(x, weight, EPS, residual=residual, out=out, backend=backend)
        assert torch.equal(total, x + residual)
    assert y is out
    exact = rms_norm(total.double(), weight.double(), EPS, backend="reference")
    assert_close(y, exact, torch_rms_norm(total, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_heads_of_a_fused_projection(backend):
    qkv = rand(6, 5 * 32)
    heads = qkv[:, : 3 * 32].view(6, 3, 32)
    weight = rand(32, seed=1)
    whole = rms_norm(heads.contiguous(), weight, backend=backend)
    assert torch.equal(rms_norm(heads, weight, backend=backend), whole)


def test_non_finite_values_stay_in_their_row():
    x = rand(3, 40)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = rms_norm(x, torch.ones(40))
    reference = rms_norm(x, torch.ones(40), backend="reference")
    assert torch.equal(torch.isnan(y), torch.isnan(reference))
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend):
    x, weight = rand(50, 96), rand(96, seed=1)
    whole = rms_norm(x, weight, backend=backend)
    alone = [rms_norm(x[i : i + 1], weight, backend=backend)[0] for i in range(50)]
    assert torch.equal(torch.stack(alone), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    BAD_NORM_ARGUMENTS,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(arguments, message, backend):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(8), "backend": backend}
    with pytest.raises(ValueError, match=message):
        rms_norm(**{**good, **arguments})


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_quantized_output_is_what_quantizing_the_output_gives(group_size, with_residual):
    x, weight = rand(9, 576), rand(576, seed=1)
    residual = rand(9, 576, seed=2) if with_residual else None
    y = rms_norm(x, weight, EPS, residual=residual)
    q = rms_norm(x, weight, EPS, residual=residual, quantize=group_size)
    if with_residual:
        assert torch.equal(q[1], y[1])
        y, q = y[0], q[0]
    assert torch.equal(q.dequantize(), quantize_activation(y, group_size).dequantize())
    with pytest.raises(ValueError, match="multiple of the group size"):
        rms_norm(rand(2, 40), rand(40), quantize=group_size)
