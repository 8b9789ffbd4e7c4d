"""`pyllm.patch` and `pyllm.unpatch` themselves: what they touch, report, refuse and restore."""

import copy
import pickle

import pytest
import torch
from compare import assert_close
from torch import nn

import pyllm
from pyllm.nn import QuantLinear


class Block(nn.Module):
    """Plain PyTorch, with a module in two places and an input for each of several branches."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-5)
        self.up, self.down, self.act = nn.Linear(32, 64), nn.Linear(64, 32), nn.GELU()
        self.again, self.odd = self.norm, nn.Linear(32, 7, bias=False)
        self.last = nn.Linear(7, 32)
        self.to(dtype)

    def forward(self, x):
        x = self.rms(x + self.down(self.act(self.up(self.norm(x)))))
        return self.again(x) + self.last(self.odd(x))


def frozen():
    return torch.jit.freeze(torch.jit.script(nn.Linear(3, 4).eval()))


Sharded = type("FullyShardedDataParallel", (nn.Identity,), {})


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


def of(model):
    """Everything that `unpatch` has to restore, by identity."""
    modules = [(name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t)) for name, t in model.named_parameters(remove_duplicate=False)]
    dicts = [sorted(m.__dict__) for m in model.modules()]
    return modules, tensors, dicts, list(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_restoring(dtype):
    torch.manual_seed(0)
    block, x = Block(dtype).eval(), torch.randn(3, 5, 32, dtype=dtype)
    before, y = of(block), block(x)
    exact = copy.deepcopy(block).double()(x.double())
    report = pyllm.patch(block)
    assert {r.name: r.after for r in report.replaced} == {
        "norm": "pyllm.LayerNorm", "rms": "pyllm.RMSNorm", "act": "pyllm.GELU",
        **dict.fromkeys(["up", "down", "odd", "last"], "pyllm.Linear"),
    }  # fmt: skip
    assert_close(block(x), exact, y)
    assert list(block.state_dict()) == before[3]
    pyllm.unpatch(block)
    assert of(block) == before
    assert torch.equal(block(x), y)


@torch.no_grad()
@pytest.mark.parametrize("linear", ["int8", "int4"])
def test_linear(block, linear):
    x, before = torch.randn(4, 32), of(block)
    y = block(x)
    report = pyllm.patch(block, linear=linear)
    assert isinstance(block.up, QuantLinear)
    assert block.up.bits == int(linear[3:])
    assert [(x.name, x.why) for x in report.left] == [
        ("last", "its input's size is no multiple of 16")
    ]
    other = Block().eval()
    pyllm.patch(other, linear=linear)
    other.load_state_dict(block.state_dict(), strict=True)
    assert torch.equal(other(x), block(x))
    pyllm.unpatch(block)
    assert of(block) == before
    assert torch.equal(block(x), y)


def test_only_this_instance(block):
    other = copy.deepcopy(block)
    pyllm.patch(block)
    assert type(other.norm) is nn.LayerNorm
    assert isinstance(block.norm, nn.LayerNorm)
    assert block.norm.weight is block.again.weight


def test_options(block):
    report = pyllm.patch(block, mlp=False, backend="reference")
    assert [r.name for r in report.replaced] == ["norm", "rms"]
    assert block.norm.backend == "reference"
    pyllm.unpatch(block)
    assert "backend" not in vars(block.norm)


def test_report_and_again(block):
    report, again = pyllm.patch(block), pyllm.patch(block)
    assert [report.already, again.already] == [False, True]
    assert again.replaced == report.replaced
    assert "torch.LayerNorm -> pyllm.LayerNorm: norm" in str(report)
    assert "already patched: 7 modules" in str(again)
    with pytest.raises(
        ValueError, match=r"patched already, with .*linear=None.* pyllm.unpatch it before"
    ):
        pyllm.patch(block, linear="int8")
    assert not isinstance(block.up, QuantLinear)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(block, copied):
    x = torch.randn(4, 32)
    y = block(x)
    pyllm.patch(block, linear="int8")
    other = copied(block)
    assert torch.equal(other(x), block(x))
    assert type(other.norm) is type(block.norm)
    pyllm.unpatch(other)
    assert torch.equal(other(x), y)
    assert isinstance(block.up, QuantLinear)


def test_hooks_stay(block):
    seen = []
    block.norm.register_forward_hook(lambda *_: seen.append(1))
    pyllm.patch(block)
    block(torch.randn(2, 32))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.to("meta"), "norm.weight: expected a tensor with data, got one on meta"),
        (lambda b: b.double(), "norm.weight: expected float32, bfloat16 or float16, got float64"),
        (lambda b: nn.Sequential(b, torch.jit.script(nn.ReLU())), "got TorchScript"),
        (lambda b: nn.Sequential(b, frozen()), "got TorchScript"),
        (lambda b: nn.Sequential(b, Sharded()), "1: expected whole modules, got FullySharded"),
        (torch.compile, "the model itself: expected a model that is compiled after the patch"),
        (lambda b: nn.Sequential(nn.Dropout()), "found nothing to replace; looked for attention, "),
    ],
)
def test_bad_models_stay_as_they_are(block, change, message):
    model = change(block)
    before = of(model)
    with pytest.raises(ValueError, match=message):
        pyllm.patch(model)
    assert of(model) == before


@torch.no_grad()
def test_frozen_parameters(block):
    """Parameters that take no gradient are parameters like others."""
    y = block.requires_grad_(False)(torch.ones(2, 32))
    pyllm.patch(block)
    torch.testing.assert_close(block(torch.ones(2, 32)), y)
    assert not any(p.requires_grad for p in block.parameters())


def test_old_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = transformers.activations.GELUActivation()
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"expected transformers 5 or later, got 4\.57\.1"):
        pyllm.patch(model)


def test_all_or_nothing(block, monkeypatch):
    """Whatever goes wrong on the way is undone."""
    before = of(block)
    original = nn.Module.__setattr__

    def refuse(self, name, value):
        if name == "down":
            raise RuntimeError("no")
        original(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="no"):
        pyllm.patch(block, linear="int8")
    monkeypatch.undo()
    assert of(block) == before


def test_bad_arguments(block):
    with pytest.raises(ValueError, match="linear: expected None, 'int8' or 'int4', got 'fp8'"):
        pyllm.patch(block, linear="fp8")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'gpu'"):
        pyllm.patch(block, backend="gpu")
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        pyllm.patch({})
    with pytest.raises(ValueError, match=r"unpatch: expected a model that pyllm.patch was called"):
        pyllm.unpatch(block)
