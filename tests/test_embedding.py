import itertools

import pytest
import torch
from cases import DTYPES, dtype_name, rand, strided
from compare import poisoned

from pyllm import _C
from pyllm.ops import embedding
from pyllm.quant import QuantTensor

BACKENDS = ["cpu", "triton"]


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_copied(dtype, out_dtype, backend):
    weight = rand(50, 100, dtype=dtype)
    which = ids(*range(50), 49, 0, 7)
    out = None if out_dtype is None else poisoned((53, 100), out_dtype)
    for table in (weight, strided(weight)):
        y = embedding(which, table, out=out, backend=backend)
        assert torch.equal(y, weight[which].to(out_dtype or dtype))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), list(itertools.product((4, 8), (16, 32), (False, True)))
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_rows_are_exact(bits, group_size, symmetric, backend):
    weight = QuantTensor.from_float(
        rand(37, 96), bits=bits, group_size=group_size, symmetric=symmetric
    )
    which = ids(*range(36, -1, -1), 3, 3)
    exact = embedding(which, weight, backend="reference")
    y = embedding(which, weight, out=poisoned((39, 96), torch.float32), backend=backend)
    assert torch.equal(y, exact)
    assert torch.equal(embedding(which, weight, backend=backend), exact)
    half = embedding(which, weight, out=poisoned((39, 96), torch.float16), backend=backend)
    assert torch.equal(half, exact.half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    assert embedding(ids(), rand(5, 8), backend=backend).shape == (0, 8)
    assert embedding(ids(), QuantTensor.from_float(rand(5, 32)), backend=backend).shape == (0, 32)


@pytest.mark.parametrize("backend", ["triton"])
def test_ids_that_do_not_exist_are_nan_on_a_device(backend):
    for table in (rand(20, 32), QuantTensor.from_float(rand(20, 32))):
        y = embedding(ids(4, 20, -1, 2**31 - 1, 19), table, backend=backend)
        assert torch.equal(y[[0, 4]], embedding(ids(4, 19), table, backend=backend))
        assert y[1:4].isnan().all()


def test_ids_that_do_not_exist_raise_or_are_nan_in_a_plan():
    tables = [rand(20, 32), QuantTensor.from_float(rand(20, 32))]
    for table in tables:
        for bad in (20, -1, 2**31 - 1, -(2**31)):
            with pytest.raises(ValueError, match=f"ids from 0 to 19, got {bad} at position 1"):
                embedding(ids(3, bad), table, backend="cpu")
        which, out = ids(1, 2, 3), torch.zeros(3, 32)
        plan = _C.Plan()
        plan.begin()
        embedding(which, table, out=out, backend="cpu")
        plan.end()
        which.copy_(ids(4, 20, -7))
        plan.replay()
        assert torch.equal(out[0], embedding(ids(4), table)[0])
        assert out[1:].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: embedding(torch.tensor([1]), rand(5, 8)),
            "token_ids: expected int32.*int64",
        ),
        (lambda: embedding(ids(1), rand(5, 8).int()), "weight: expected float32"),
        (lambda: embedding(ids(1), rand(5, 8), out=rand(1, 9)), r"out: expected .*\(D is 8\)"),
        (
            lambda: embedding(ids(1), QuantTensor.from_float(rand(5, 32)), out=rand(1, 31)),
            r"out: expected .*\[_ 32\], got float32\[1, 31\]",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
