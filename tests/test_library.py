"""Every op as PyTorch sees it: opcheck, derivatives, compile, export, autocast and torch.func."""

import pytest
import torch
from cases import rand
from compare import EPS as EPS_OF
from compare import assert_close
from library_cases import DIFFERENTIABLE, leaf, leaves, opcheck_cases
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from pyllm import ops
from pyllm.ops.registry import dispatches, use

differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)
# Those whose derivative is PyTorch's can be differentiated on.
TWICE = {"relu", "gelu", "silu_mul", "gelu_mul", "matmul", "embedding"}
# Ops that no derivative goes through, and derivatives.
CONSTANT = {"rope_cache", "paged_attention", "sample", "quantize_activation", "quant_embedding"}
CASES = [(op, rest) for op, *rest in opcheck_cases()]


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=[op for op, _ in CASES])
def test_opcheck(op, arguments):
    if not op.endswith("_backward") and op not in CONSTANT:
        arguments = [
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a for a in arguments
        ]  # fmt: skip
    assert set(opcheck(getattr(torch.ops.pyllm, op).default, arguments).values()) == {"SUCCESS"}


def test_all_ops_are_checked():
    registered = {
        name.removeprefix("pyllm::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyllm::")
    }
    assert registered == {op for op, _ in CASES}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def weighted_sum(results):
    """Of all that an op returns, so that every derivative takes part."""
    total = 0
    for i, r in enumerate(as_tuple(results)):
        total = total + (r * torch.linspace(-1, 1 + i, r.numel()).to(r.dtype).view(r.shape)).sum()
    return total


def gradients(function, tensors):
    return torch.autograd.grad(weighted_sum(function(*tensors)), tensors)


@differentiable
def test_gradcheck(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    inputs = leaves([(1, *s[1:]) if "L" in s else s for s in shapes], torch.float64, length=3)

    def reference(*tensors):
        return call(*tensors, backend="reference")

    assert torch.autograd.gradcheck(reference, inputs)
    if name in TWICE:
        assert torch.autograd.gradgradcheck(reference, inputs)


@differentiable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_close_to_those_of_the_formula(name, dtype):
    call, shapes, formula = DIFFERENTIABLE[name]
    inputs = leaves(shapes, dtype)
    actual, same_dtype = gradients(call, inputs), gradients(formula, inputs)
    exact = gradients(formula, [t.detach().double().requires_grad_() for t in inputs])
    check_close(name, actual, exact, same_dtype)
    assert all(a.dtype == dtype for a in actual)


@differentiable
def test_compiles_as_one_graph_for_all_lengths(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (5, 7, 12):
        inputs = leaves(shapes, length=length)
        for x, shape in zip(inputs, shapes, strict=True):
            for i, size in enumerate(shape):
                if size == "L":
                    torch._dynamo.mark_dynamic(x, i)
        for a, b in zip(gradients(compiled, inputs), gradients(call, inputs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@differentiable
def test_torch_func(name):
    call, shapes, formula = DIFFERENTIABLE[name]
    inputs = [t.detach() for t in leaves(shapes)]
    every = tuple(range(len(inputs)))

    def gradient(f):
        return torch.func.grad(lambda *t: weighted_sum(f(*t)), every)

    check_same(name, gradient(call), gradient(formula), inputs)
    # First what depends on a length is mapped over, then parameters too.
    for in_dims in (tuple(0 if "L" in s else None for s in shapes), (-1,) * len(inputs)):
        if not any(dim is not None for dim in in_dims):
            continue
        several = [
            t if dim is None else torch.stack((t, 2 * t, t - 1), dim)
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        mapped = as_tuple(torch.vmap(call, in_dims)(*several))
        for i in range(3):
            one = [
                t if dim is None else t.select(dim, i).contiguous()
                for t, dim in zip(several, in_dims, strict=True)
            ]
            for a, b in zip(mapped, as_tuple(call(*one)), strict=True):
                assert torch.equal(a[i], b)
        check_same(
            name,
            torch.vmap(gradient(call), in_dims),
            torch.vmap(gradient(formula), in_dims),
            several,
        )

        # and the other way round
        mapped, exact = torch.vmap(call, in_dims), torch.vmap(formula, in_dims)
        check_same(name, gradient(mapped), gradient(exact), several)


def check_same(name, function, formula, inputs):
    exact = as_tuple(formula(*(t.double() for t in inputs)))
    check_close(name, as_tuple(function(*inputs)), exact, as_tuple(formula(*inputs)))


def check_close(name, actual, exact, same_dtype):
    for i, (a, e, b) in enumerate(zip(actual, exact, same_dtype, strict=True)):
        floor = None
        if name.startswith("flash"):
            # The last place of the log-sum-exp, which is float32 and below 8 here, is a factor of
            # all weights.
            floor = max(EPS_OF[a.dtype], 8 * EPS_OF[torch.float32]) * max(e.abs().max().item(), 1)
        assert_close(a, e, b, what=f"result {i}", floor=floor)


@differentiable
def test_exports(name):
    call, shapes, _ = DIFFERENTIABLE[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    length = torch.export.Dim("length")
    dynamic = [{i: length for i, size in enumerate(s) if size == "L"} or None for s in shapes]
    program = torch.export.export(
        Module(), tuple(leaves(shapes)), dynamic_shapes={"tensors": tuple(dynamic)}
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("pyllm.") for target in targets)
    other = leaves(shapes, length=9)
    for a, b in zip(as_tuple(program.module()(*other)), as_tuple(call(*other)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - TWICE))
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
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True), inputs)
    with use("reference"):
        exact = gradients(model, [t.detach().double().requires_grad_() for t in inputs])
    check_close(name, compiled, exact, gradients(model, inputs))


@pytest.mark.parametrize("op", sorted(CONSTANT - {"quantize_activation", "quant_embedding"}))
def test_what_has_no_derivative_says_so(op):
    arguments = next(rest for name, rest in CASES if name == op)
    first = arguments[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{op} has no"):
        weighted_sum(getattr(torch.ops.pyllm, op)(first, *arguments[1:])).backward()


@pytest.mark.parametrize("name", ["matmul", "quant_matmul", "flash_attention, biased"])
def test_autocast_lowers(name):
    call, shapes, _ = DIFFERENTIABLE[name]
    inputs = leaves(shapes)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_caches_written_under_compile():
    arguments = next(rest for name, rest in CASES if name == "rope_cache")
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens, table, *_ = arguments

    def step(q, k_cache, v_cache):
        y = ops.rope_cache(q * 2, k, v, cos_sin, positions, k_cache, v_cache,
                           cu_seqlens_q=cu_seqlens, page_table=table)  # fmt: skip
        lens = positions[cu_seqlens[1:] - 1] + 1
        y = ops.paged_attention(y, k_cache, v_cache, cu_seqlens_q=cu_seqlens, page_table=table,
                                context_lens=lens, k_scale=2.0)  # fmt: skip
        tokens, logprobs = ops.sample(y.flatten(1))
        return y, k_cache.sum(), tokens, logprobs

    eager, compiled = ([k_cache.clone(), v_cache.clone()] for _ in range(2))
    a = step(q, *eager)
    b = torch.compile(step, fullgraph=True)(q, *compiled)
    for x, y in zip((*a, *eager), (*b, *compiled), strict=True):
        torch.testing.assert_close(x, y)
    assert eager[0].abs().sum() > 0


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


def test_an_eager_call_with_gradients_does_not_dispatch():
    x, weight = leaf(3, 32), leaf(32)

    def dispatched(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call().sum().backward()
        return {e.name for e in profile.events() if e.name.startswith("pyllm::")}

    assert dispatched(lambda: torch.ops.pyllm.rms_norm(x, weight, 1e-6, None)) == {
        "pyllm::rms_norm"
    }
    assert dispatched(lambda: ops.rms_norm(x, weight)) == set()


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
    implementation = Op.implementation

    def record(self, *arguments):
        function = implementation(self, *arguments)
        chosen.append((self.name, next(b for b, f in self.backends.items() if f is function)))
        return function

    monkeypatch.setattr(Op, "implementation", record)
    x, weight = leaf(3, 32), leaf(32)
    function = getattr(ops, op)

    def run(call=function, **options):
        chosen.clear()
        call(x, weight, **options).sum().backward()
        return chosen.copy()

    # Both have kernels for both directions.
    emulated = [(op, "emulator"), (f"{op}_backward", "emulator")]
    assert run() == run(backend="cpu") == [(op, "cpu"), (f"{op}_backward", "cpu")]
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
