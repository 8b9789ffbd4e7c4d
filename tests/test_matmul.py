import pytest
import torch
from cases import DTYPES, dtype_name, rand, strided
from compare import assert_close, poisoned

from pyllm import _C
from pyllm.ops import matmul

# (T, N, K): size one, empty, odd everywhere, a model's, more than one chunk and tile.
SHAPES = [(1, 1, 1), (0, 16, 32), (3, 17, 65), (1, 576, 576), (9, 40, 1536), (30, 100, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_matches_reference(shape, dtype, weight_dtype, layout):
    t, n, k = shape
    x, weight, bias = rand(t, k, dtype=dtype), rand(n, k, dtype=weight_dtype, seed=1), rand(n)
    out = poisoned((t, n), dtype)
    if layout == "strided":
        x, weight, out = strided(x), strided(weight), strided(out)
    y = matmul(x, weight, bias, out=out, backend="cpu")
    assert y is out
    exact = matmul(x.double(), weight, bias, backend="reference")
    same_dtype = (x.float() @ weight.float().t() + bias).to(dtype)
    assert_close(y, exact, same_dtype)


def test_a_row_does_not_depend_on_the_others():
    for weight_dtype in DTYPES:
        weight, x = rand(50, 100, dtype=weight_dtype), rand(40, 100, seed=1)
        alone = torch.cat([matmul(x[i : i + 1], weight, backend="cpu") for i in range(40)])
        for t in range(1, 41):
            assert torch.equal(matmul(x[:t], weight, backend="cpu"), alone[:t])
        assert torch.equal(matmul(x[13:31], weight, backend="cpu"), alone[13:31])


def test_long_prompts_in_blocks_of_tokens():
    weight, x = rand(20, 4096), rand(70, 4096)
    whole = matmul(x, weight, backend="cpu")
    for i in (0, 31, 32, 69):
        assert torch.equal(matmul(x[i : i + 1], weight, backend="cpu")[0], whole[i])


def test_threads_do_not_change_bits():
    weight, x = rand(301, 64), rand(30, 64)
    threads = _C.num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            _C.set_num_threads(n)
            results.append(matmul(x, weight, backend="cpu"))
    finally:
        _C.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_leading_dimensions_and_an_output_of_another_dtype():
    x, weight = rand(2, 3, 64), rand(20, 64)
    y = matmul(x, weight)
    assert y.shape == (2, 3, 20)
    assert torch.equal(matmul(x[0, 0], weight), y[0, 0])
    half = matmul(x, weight, out=torch.empty(2, 3, 20, dtype=torch.bfloat16))
    assert torch.equal(half, y.bfloat16())


def test_nothing_to_sum_over():
    y = matmul(torch.empty(2, 0), torch.empty(3, 0), torch.tensor([1.0, 2.0, 3.0]), backend="cpu")
    assert torch.equal(y, torch.tensor([[1.0, 2.0, 3.0]] * 2))


def test_non_finite_values_stay_in_their_row():
    x, weight = rand(9, 40), rand(30, 40)
    x[3, 5], x[7, 39] = float("nan"), float("inf")
    y = matmul(x, weight, backend="cpu")
    reference = matmul(x, weight, backend="reference")
    assert torch.equal(y.isnan(), reference.isnan())
    assert torch.equal(y[7], reference[7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3, 7)}, r"x: expected .*\[T K\], got float32\[2, 8\] \(K is 7\)"),
        ({"weight": torch.ones(3, 8).int()}, "weight: expected float32"),
        ({"x": torch.ones(2, 8).int(), "out": torch.ones(2, 3)}, "x: expected float32"),
        ({"bias": torch.ones(4)}, r"bias: expected float32\[N\]"),
        ({"bias": torch.ones(3).half()}, "bias: expected float32"),
        ({"out": torch.ones(2, 4)}, r"out: expected .*\(N is 3\)"),
        ({"weight": torch.ones(8, 3).t()}, "contiguous last dimension"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"x": torch.ones(2, 8), "weight": torch.ones(3, 8), "backend": "cpu"}
    with pytest.raises(ValueError, match=message):
        matmul(**{**good, **arguments})
