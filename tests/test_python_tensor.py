"""How bindings read tensors: through DLPack where torch has it, else by their attributes."""

import warnings

import pytest
import torch
from cases import rand, strided
from compare import poisoned
from torch._subclasses.fake_tensor import FakeTensorMode

from pyllm import _C

EXCHANGE = "__dlpack_c_exchange_api__"


@pytest.fixture(params=["dlpack", "attributes"], autouse=True)
def reader(request):
    if request.param == "dlpack" and not hasattr(torch.Tensor, EXCHANGE):
        pytest.skip("this torch has no DLPack exchange API")
    before = _C.use_dlpack(request.param == "dlpack")
    yield request.param
    _C.use_dlpack(before)


def relu(x, out):
    _C.activation("relu", x, None, out, None, 0)
    return out


class Subclass(torch.Tensor):
    pass


LAYOUTS = {
    "plain": lambda x: x,
    "strided": strided,
    "offset": lambda x: torch.cat((x, x))[3:],
    "expanded": lambda x: x[:1].expand(5, -1),
    "transposed": lambda x: x.unflatten(1, (4, 6)).transpose(0, 1),
    "one of 3d": lambda x: x[None],
    "one row": lambda x: x[0],
    "empty": lambda x: x[:0],
    "parameter": torch.nn.Parameter,
    "requires grad": lambda x: x.clone().requires_grad_() * 2,
    "inference": lambda x: torch.inference_mode()(x.clone)(),
    "subclass": lambda x: x.as_subclass(Subclass),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_is_read_where_it_is(layout, dtype):
    x = LAYOUTS[layout](rand(3, 24, dtype=dtype))
    assert torch.equal(relu(x, poisoned(x.shape, dtype)), x.detach().relu())
    out = LAYOUTS[layout](poisoned((3, 24), dtype)) if layout != "expanded" else None
    if out is not None:
        assert torch.equal(relu(x, out).detach(), x.detach().relu())


def test_dtypes_and_sizes(reader):
    for dtype in [
        torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
        torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn,
    ]:  # fmt: skip
        x = torch.zeros(2, 3, 4).to(dtype)
        _C.check("op", [(x, "x", "2 3 4", dtype)])
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"x: expected \w+\[5\], got {name}\[2, 3, 4\]"):
            _C.check("op", [(x, "x", "5", dtype)])
    for dtype in [torch.complex64, torch.float8_e5m2, torch.int16]:
        with pytest.raises(TypeError, match="a dtype that pyllm knows"):
            _C.check("op", [(torch.zeros(2).to(dtype), "x", "2", torch.float32)])
    with pytest.raises(TypeError, match="at most 4 dimensions, got 5"):
        _C.check("op", [(torch.zeros(1, 1, 1, 1, 1), "x", "_", torch.float32)])
    _C.check("op", [(torch.tensor(1.0), "x", "", torch.float32)])


def freed(begin=0):
    x = torch.ones(5, 8)[begin : begin + 4]
    x.untyped_storage().resize_(0)
    return x


def fake():
    with FakeTensorMode():
        return torch.ones(4, 8)


def fake_parameter():
    with FakeTensorMode():
        return torch.nn.Parameter(torch.ones(4, 8))


def csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4).to_sparse_csr()


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])


class Wrapper(torch.Tensor):
    """A subclass that has a shape and no memory."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (4, 8), dtype=torch.float32)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __torch_dispatch__(self, *_):
        raise NotImplementedError


WITHOUT_MEMORY = {
    "fake": fake,
    "fake parameter": fake_parameter,
    "functional": lambda: torch._to_functional_tensor(torch.ones(4, 8)),
    "zero tensor": lambda: torch._efficientzerotensor((4, 8)),
    "freed": freed,
    "freed, with an offset": lambda: freed(1),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse csr": csr,
    "mkldnn": lambda: torch.ones(4, 8).to_mkldnn(),
    "nested": nested,
    "wrapper": Wrapper,
    "uninitialized": torch.nn.UninitializedParameter,
    "meta": lambda: torch.ones(4, 8, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8),
    "text": lambda: "text",
}


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_memory_is_refused(kind):
    x, y = WITHOUT_MEMORY[kind](), torch.ones(4, 8)
    for arguments in [(x, y), (y, x)]:
        with pytest.raises(TypeError, match=r"expected a (dense torch|torch|CPU t|dtype)"):
            relu(*arguments)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_tensors_of_function_transforms_are_refused(transform):
    def refused(x):
        with pytest.raises(TypeError, match=r"expected a dense torch\.Tensor that has memory"):
            relu(x, torch.ones(3))
        return x.sum()

    x = torch.ones(2, 3) if transform == "vmap" else torch.ones(3)
    if transform == "jvp":
        torch.func.jvp(refused, (x,), (x,))
    else:
        getattr(torch.func, transform)(refused)(x)


def test_an_error_of_attributes_is_the_cause():
    with pytest.raises(TypeError) as caught:
        relu(torch.eye(4).to_sparse(), torch.ones(4, 4))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_arguments_that_are_no_tensors():
    x, y = torch.ones(2, 8), torch.empty(2, 8)
    with pytest.raises(TypeError, match="expected 7 arguments, got 1"):
        _C.layer_norm(x)
    with pytest.raises(TypeError, match="real number, not str"):
        _C.layer_norm(x, None, None, "eps", None, y, None)
    with pytest.raises(TypeError):
        _C.activation(1, x, None, y, None, 0)
    with pytest.raises(TypeError, match="integer"):
        _C.activation("relu", x, None, y, None, "0")
    for number in (1 << 40, 1 << 80):
        with pytest.raises((ValueError, OverflowError)):
            _C.activation("relu", x, None, y, None, number)
    with pytest.raises(TypeError):
        _C.layer_norm(x, None, None, eps=1e-5)
