"""Every op as PyTorch sees it: opcheck, derivatives, compile, export, autocast and torch.func."""

import pytest
import torch
from cases import rand
from compare import assert_close
from torch.library import opcheck

from pyllm import ops
from pyllm.ops.library import dispatches
from pyllm.ops.registry import use

EPS = 1e-5


def leaf(*shape, seed=0, dtype=torch.float32):
    return rand(*shape, seed=seed).to(dtype).requires_grad_()


def norm_case(op, parameters, residual=False):
    """Of a norm: what calls it, its inputs, and what PyTorch calls so."""
    names = ["x", *(["residual"] if residual else []), *parameters]
    shapes = [(32,) if name in ("weight", "bias") else (3, 5, 32) for name in names]

    def call(*tensors, backend=None):
        return getattr(ops, op)(**dict(zip(names, tensors, strict=True)), eps=EPS, backend=backend)

    def formula(*tensors):
        given = dict(zip(names, tensors, strict=True))
        x = given.pop("x")
        total = x + given.pop("residual") if residual else x
        y = getattr(torch.nn.functional, op)(total, (32,), **given, eps=EPS)
        return (y, total) if residual else y

    return call, shapes, formula


# name -> (function of tensors and backend=, shapes of the tensors, the same in plain PyTorch); all
# tensors can be differentiated.
DIFFERENTIABLE = {
    "rms_norm": norm_case("rms_norm", ["weight"]),
    "rms_norm of a sum": norm_case("rms_norm", ["weight"], residual=True),
    "layer_norm": norm_case("layer_norm", ["weight", "bias"]),
    "layer_norm without parameters": norm_case("layer_norm", []),
    "layer_norm with a bias": norm_case("layer_norm", ["bias"]),
    "layer_norm of a sum": norm_case("layer_norm", ["weight", "bias"], residual=True),
}
differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)

x, residual, weight, bias = rand(3, 5, 32), rand(3, 5, 32, seed=1), rand(32, seed=2), rand(32)
# Arguments of torch.ops.pyllm.<op>; the differentiable ones are checked with leaves.
OPS = [
    ("rms_norm", x, weight, EPS, None),
    ("add_rms_norm", x, residual, weight, EPS, None),
    ("rms_norm_backward", residual, x, weight, None, EPS, None),
    ("rms_norm_backward", residual, x, weight, residual, EPS, None),
    ("layer_norm", x, weight, bias, EPS, None),
    ("layer_norm", x, None, None, EPS, None),
    ("add_layer_norm", x, residual, weight, bias, EPS, None),
    ("layer_norm_backward", residual, x, weight, residual, EPS, None),
    ("layer_norm_backward", residual, x, None, None, EPS, None),
]


@pytest.mark.parametrize(
    ("op", "arguments"), [(op, rest) for op, *rest in OPS], ids=[case[0] for case in OPS]
)
def test_opcheck(op, arguments):
    if not op.endswith("_backward"):
        arguments = [
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a for a in arguments
        ]  # fmt: skip
    assert set(opcheck(getattr(torch.ops.pyllm, op).default, arguments).values()) == {"SUCCESS"}


def leaves(shapes, dtype=torch.float32):
    return [leaf(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def gradients(function, tensors):
    """The gradients of a weighted sum of all that `function` returns."""
    results = as_tuple(function(*tensors))
    weights = [rand(*r.shape, seed=90 + i).to(r.dtype) for i, r in enumerate(results)]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    return torch.autograd.grad(loss, tensors)


@differentiable
def test_gradcheck(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    small = [shape[1:] if len(shape) > 1 else shape for shape in shapes]
    inputs = leaves(small, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call(*t, backend="reference"), inputs)


@differentiable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_close_to_those_of_the_formula(name, dtype):
    call, shapes, formula = DIFFERENTIABLE[name]
    inputs = leaves(shapes, dtype)
    actual, same_dtype = gradients(call, inputs), gradients(formula, inputs)
    exact = gradients(formula, [t.detach().double().requires_grad_() for t in inputs])
    for i, (a, e, b) in enumerate(zip(actual, exact, same_dtype, strict=True)):
        assert a.dtype == dtype
        assert_close(a, e, b, what=f"gradient {i}")


@differentiable
def test_compiles_as_one_graph_for_all_lengths(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (5, 7, 12):
        inputs = leaves([(3, length, 32) if len(shape) > 1 else shape for shape in shapes])
        for x in inputs:
            if x.ndim > 1:
                torch._dynamo.mark_dynamic(x, 1)
        for a, b in zip(gradients(compiled, inputs), gradients(call, inputs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@differentiable
def test_torch_func(name):
    call, shapes, formula = DIFFERENTIABLE[name]

    def loss(function):
        return lambda *tensors: sum((r * r).sum() for r in as_tuple(function(*tensors)))

    inputs = [t.detach() for t in leaves(shapes)]
    every = tuple(range(len(inputs)))
    in_dims = tuple(0 if t.ndim > 1 else None for t in inputs)

    def sum_of_mapped(function):
        mapped = torch.vmap(loss(function), in_dims)
        return lambda *tensors: mapped(*tensors).sum()

    for transform in [
        lambda f: torch.func.grad(loss(f), every),
        lambda f: torch.vmap(torch.func.grad(loss(f), every), in_dims),
        lambda f: torch.func.grad(sum_of_mapped(f), every),
        lambda f: torch.vmap(f, in_dims),
        lambda f: torch.vmap(f, in_dims, out_dims=1),
    ]:
        check_same(transform(call), transform(formula), inputs)
    # over the last dimension of all, parameters too
    stacked = [torch.stack((t, 2 * t, t - 1), -1) for t in inputs]
    check_same(torch.vmap(call, -1), torch.vmap(formula, -1), stacked)


def check_same(function, formula, inputs):
    actual, same_dtype = as_tuple(function(*inputs)), as_tuple(formula(*inputs))
    exact = as_tuple(formula(*(t.double() for t in inputs)))
    for a, e, b in zip(actual, exact, same_dtype, strict=True):
        assert_close(a, e, b)


@differentiable
def test_exports(name):
    call, shapes, _ = DIFFERENTIABLE[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    inputs = leaves(shapes)
    length = torch.export.Dim("length")
    dynamic = {"tensors": tuple({1: length} if len(s) > 1 else None for s in shapes)}
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("pyllm.") for target in targets)
    other = leaves([(3, 9, 32) if len(shape) > 1 else shape for shape in shapes])
    for a, b in zip(as_tuple(program.module()(*other)), as_tuple(call(*other)), strict=True):
        assert torch.equal(a, b)


@differentiable
def test_second_derivatives_raise(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    inputs = leaves(shapes)
    y = as_tuple(call(*inputs))[0]
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once only"):
        first[0].sum().backward()


@differentiable
def test_inductor(name):
    call, shapes, _ = DIFFERENTIABLE[name]

    def model(*tensors):  # with work before it whose result has another layout
        return call(*(t.transpose(0, 1).sin().transpose(0, 1) if t.ndim > 1 else t + 1
                      for t in tensors))  # fmt: skip

    inputs = leaves(shapes)
    compiled = gradients(torch.compile(model, fullgraph=True), inputs)
    with use("reference"):
        exact = gradients(model, [t.detach().double().requires_grad_() for t in inputs])
    for a, e, b in zip(compiled, exact, gradients(model, inputs), strict=True):
        assert_close(a, e, b)


def test_an_eager_call_does_not_dispatch(monkeypatch):
    x, weight = leaf(3, 32), leaf(32)
    plain = x.detach(), weight.detach(), None
    assert not dispatches(*plain)
    assert dispatches(x, weight)
    assert dispatches(plain[0], weight)
    with torch.no_grad():
        assert not dispatches(x, weight)
    with torch.inference_mode():
        assert not dispatches(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatches(*plain)
    seen = []
    torch.vmap(lambda t: seen.append(dispatches(t)) or t)(plain[0])
    with torch._subclasses.FakeTensorMode() as mode:
        seen.append(dispatches(mode.from_tensor(plain[0])))
    assert seen == [True, True]


def test_out_is_for_calls_without_gradients():
    x, weight, out = leaf(3, 32), rand(32), torch.empty(3, 32)
    with pytest.raises(ValueError, match="rms_norm: out: expected None where a gradient is needed"):
        ops.rms_norm(x, weight, out=out)
    with torch.no_grad():
        assert ops.rms_norm(x, weight, out=out) is out
    compiled = torch.compile(
        lambda x, w, out: ops.rms_norm(x, w, out=out), fullgraph=True, backend="aot_eager"
    )
    other = torch.empty(3, 32)
    compiled(x.detach(), weight, other)
    assert torch.equal(out, other)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_backend_that_was_asked_for_serves(op, monkeypatch):
    from pyllm.ops.registry import OPS, Op

    chosen = []
    choose = Op.choose

    def record(self, *arguments):
        chosen.append((self.name, choose(self, *arguments)))
        return chosen[-1][1]

    monkeypatch.setattr(Op, "choose", record)
    x, weight = leaf(3, 32), leaf(32)
    function = getattr(ops, op)

    def run(call=function, **options):
        chosen.clear()
        call(x, weight, **options).sum().backward()
        return chosen.copy()

    # The emulator has kernels for both directions, the CPU none for the backward.
    emulated = [(op, "emulator"), (f"{op}_backward", "emulator")]
    assert run() == run(backend="cpu") == [(op, "cpu"), (f"{op}_backward", "reference")]
    assert run(backend="emulator") == emulated
    with use("emulator"):
        assert run() == emulated
    with use("emulator"):
        y = function(x, weight)
    chosen.clear()
    y.sum().backward()
    assert chosen == emulated[1:]
    monkeypatch.setenv("PYLLM_BACKEND", "emulator")
    assert run() == emulated
    monkeypatch.delenv("PYLLM_BACKEND")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    run(compiled)
    with use("emulator"):
        assert run(compiled) == emulated
    assert OPS[op].choose("cpu") == "cpu"


def test_autocast_promotes_the_residual():
    x, residual = leaf(3, 32, dtype=torch.bfloat16), leaf(3, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = ops.rms_norm(x, rand(32), residual=residual)
    assert y.dtype == total.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
