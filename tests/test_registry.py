"""Which backend serves."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pyllm.ops import device, registry, rms_norm
from pyllm.ops.registry import OPS, RULES, BackendError, Op


@pytest.fixture
def all_built(monkeypatch):
    """As if this build had the kernels of every backend."""
    monkeypatch.setattr(device, "missing", lambda *_: None)
    monkeypatch.setattr(device, "_installed", lambda _: True)


class OnDevice:
    """A tensor as the rules see it."""

    def __init__(self, dtype, arch):
        self.dtype, self.device = dtype, arch


@pytest.fixture
def op(monkeypatch, all_built):
    monkeypatch.setattr(registry.device, "arch", lambda arch: arch)

    def make(name, backends=("reference", "cuda", "triton")):
        registry._rules.cache_clear()
        made = Op(name)
        made.backends = dict.fromkeys(backends)
        return made

    before = dict(OPS)
    yield make
    OPS.clear()
    OPS.update(before)


def test_rules_by_dtype_and_arch(op):
    half, single = OnDevice(torch.float16, 90), OnDevice(torch.float32, 90)
    assert op("quant_matmul").choose("cuda", x=half) == "cuda"
    assert op("quant_matmul").choose("cuda", x=single) == "triton"
    assert op("quant_matmul", ("reference", "cuda")).choose("cuda", x=single) == "reference"
    assert op("rms_norm").choose("cuda", x=single) == "cuda"
    assert op("rms_norm", ("reference", "triton")).choose("cuda", x=half) == "triton"
    attention = op("flash_attention")
    chosen = [attention.choose("cuda", x=OnDevice(torch.half, a)) for a in (80, 90, 100, 120)]
    assert chosen == ["cuda", "triton", "triton", "cuda"]


def test_without_a_tensor_only_general_rules_count(op):
    assert op("quant_matmul").choose("cuda") == "cuda"


def test_other_devices_have_the_reference(op):
    assert op("rms_norm").choose("xpu") == "reference"
    with pytest.raises(BackendError, match="no backend serves tensors on xpu"):
        op("rms_norm", ()).choose("xpu")


def test_what_is_asked_for_goes_before_rules(op, monkeypatch):
    quant_matmul = op("quant_matmul")
    single = OnDevice(torch.float32, 90)
    assert quant_matmul.choose("cuda", "cuda", single) == "cuda"
    with registry.use("reference"):
        assert quant_matmul.choose("cuda", x=single) == "reference"
    monkeypatch.setenv("PYLLM_BACKEND", "emulator,triton")
    assert quant_matmul.choose("cuda", x=single) == "triton"


def test_the_first_of_several_that_has_the_op():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(BackendError, match="'cuda,emulator' was asked for, but"):
        Op.choose(OPS["embedding"], "cpu", "cuda,emulator")
    y = rms_norm(x, weight, backend="cuda,reference")
    assert torch.equal(y, rms_norm(x, weight, backend="reference"))
    with pytest.raises(BackendError, match="no such backend"):
        rms_norm(x, weight, backend="fpga")


def test_rules_name_ops_and_backends():
    for rule in RULES:
        assert set(rule.backends) <= set(registry.BACKENDS)
        assert rule.ops == "*" or set(rule.ops.split()) <= set(OPS)
        assert rule.why


@pytest.fixture
def current(monkeypatch):
    """The current device as a list of one, without a GPU."""
    now = [0]

    @contextmanager
    def use(index):
        before, now[0] = now[0], index
        try:
            yield
        finally:
            now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", use)
    return now


def on(index):
    return SimpleNamespace(is_cuda=True, device=index, get_device=lambda: index)


def test_kernels_are_launched_on_the_device_of_their_tensors(current):
    launch = device.guarded(on(1), lambda x, *, out: (x, out, current[0]))
    assert launch(1, out=2) == (1, 2, 1)
    assert current == [0]


@pytest.mark.parametrize("x", [on(0), torch.zeros(1)])
def test_nothing_is_changed_where_the_device_is_the_current_one(current, x):
    def function():
        raise AssertionError

    assert device.guarded(x, function) is function


def test_the_environment_is_read_in_every_call(monkeypatch):
    x, weight = torch.ones(2, 8), torch.ones(8)
    y = rms_norm(x, weight)
    monkeypatch.setenv("PYLLM_BACKEND", "fpga")
    with pytest.raises(BackendError, match="no such backend"):
        rms_norm(x, weight)
    monkeypatch.setenv("PYLLM_BACKEND", "")
    assert torch.equal(rms_norm(x, weight), y)
    monkeypatch.delenv("PYLLM_BACKEND")
    assert torch.equal(rms_norm(x, weight), y)


def test_a_backend_registered_later_serves():
    op = Op("registered_later")
    try:
        op.register("reference")("first")
        assert op.implementation(torch.ones(1)) == "first"
        op.register("cpu")("second")
        assert op.implementation(torch.ones(1)) == "second"
    finally:
        del OPS["registered_later"]
