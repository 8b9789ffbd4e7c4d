"""How an op is told to PyTorch: schema, fake kernel, derivative, autocast and vmap rules."""

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from pyllm._C import needs_tracing
from pyllm.ops.registry import OPS, default_backend

_LIBRARY = torch.library.Library("pyllm", "DEF")
# Inductor must leave the inputs as they were traced: kernels want a contiguous last dimension.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def named(backend: str | None) -> str | None:
    """What an op is told of the backend: a backward may run in a thread that is in no `use` block.

    A compiled call is told only what `backend=` says; the rest counts when it runs.
    """
    return backend if backend or is_dynamo_compiling() else default_backend()


def implementation(op: str, x, backend: str | None):
    """The function that serves `op` for a first tensor `x`."""
    return OPS[op].implementation(x, backend)


def backward_implementation(op: str, x, backend: str | None):
    """The same for a backward op: where the forward's backend has no kernel, the reference."""
    asked = backend or default_backend()
    return OPS[op].implementation(x, asked and f"{asked},reference")


def into(op: str, out, y, *inputs):
    """`y`, written to `out` where there is one, as only a call without gradients may."""
    if out is None:
        return y
    if is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, out)):
        raise ValueError(f"{op}: out: expected None where a gradient is needed, got a tensor")
    return out.copy_(y)


def define(schema, run, fake, *, setup=None, backward=None, rows=(), autocast=None, fold=None):
    """Makes ``torch.ops.pyllm.<op>`` and returns what calls it.

    Args:
        schema: as torch.library takes it. No argument has a default: PyTorch would leave out those
            that are equal to it.
        run: what computes, on any device.
        fake: what says the shapes and dtypes of the outputs.
        setup: ``(ctx, inputs, output)``, what the derivative needs.
        backward: ``(ctx, *gradients)``, the gradients of all inputs. Without one the op raises
            when it is differentiated: a second derivative, too, is an error and not a wrong number.
        rows: names of the tensors with rows that do not depend on each other, or what returns them
            given the arguments: vmap adds a leading dimension to these. Batches of any other
            argument are run one after another.
        autocast: ``(dtype, *arguments) -> arguments``, what they are cast to under autocast.
        fold: ``(batch_size, arguments) -> (arguments, unfold)`` instead of the leading dimension,
            for the tensors in `rows`.
    """
    # Not torch.library.register_fake and register_autograd: each looks up its caller's source or
    # makes a class of its own, a millisecond every time.
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, fake, "Meta")
    op = getattr(torch.ops.pyllm, name).default
    if autocast is not None:
        for device_type in _AUTOCAST:
            _register_autocast(op, name, device_type, autocast)
    if op._schema.is_mutable:
        return _mutating(op, name)

    def below_autograd(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def autograd(*arguments):
        if is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        return below_autograd(*arguments)

    def call(*arguments):
        if not (is_dynamo_compiling() or needs_tracing(*arguments)):
            if is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                return apply_eager(*arguments)
            return run(*arguments)
        # The transforms of torch.func look into no autograd kernel.
        if is_dynamo_compiling() or not _transforms():
            return op(*arguments)
        return function.apply(*arguments)

    vmap = _vmap([argument.name for argument in op._schema.arguments], call, rows, fold)
    methods = {
        "forward": below_autograd,
        "setup_context": setup or (lambda ctx, inputs, output: None),
        "backward": backward or _no_derivative(name),
        "vmap": vmap,
    }
    methods = {method: staticmethod(function) for method, function in methods.items()}
    function = type(name, (torch.autograd.Function,), methods)
    # What `Function.apply` calls once it has bound the arguments to forward's signature, which
    # takes longer than a small kernel, and found no function transform.
    eager = type(name, (torch.autograd.Function,), {**methods, "forward": staticmethod(run)})
    apply_eager = super(torch.autograd.Function, eager).apply
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_vmap(f"pyllm::{name}", vmap, lib=_LIBRARY)
    return call


def _mutating(op, name):
    """The op, whose derivative is refused, and whose writes autograd and views are told of."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]

    def autograd(*arguments):
        if is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            raise NotImplementedError(f"pyllm: {name} has no derivative")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def in_place(*arguments):
        for i in written:
            torch.autograd.graph.increment_version(arguments[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*arguments)

    _LIBRARY.impl(name, autograd, "Autograd")
    _LIBRARY.impl(name, in_place, "ADInplaceOrView")
    return op


def _no_derivative(name):
    def backward(ctx, *gradients):
        once = name.removesuffix("_backward")
        what = f"{once} can be differentiated once only" if once != name else f"{name} has none"
        raise NotImplementedError(f"pyllm: derivative of {name}: {what}")

    return backward


def _register_autocast(op, name, device_type, cast):
    key = _AUTOCAST[device_type]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast(torch.get_autocast_dtype(device_type), *arguments))

    _LIBRARY.impl(name, kernel, key)


def _vmap(names, call, rows, fold):
    def rule(info, in_dims, *arguments):
        size = info.batch_size
        batched = {name for name, dim in zip(names, in_dims, strict=True) if dim is not None}
        leading = rows(arguments) if callable(rows) else rows
        if not batched <= set(leading):
            results = [call(*_each(arguments, in_dims, i)) for i in range(size)]
            if isinstance(results[0], torch.Tensor):
                return torch.stack(results), 0
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        arguments = [
            x if name not in leading or x is None else _leading(x, dim, size)
            for name, dim, x in zip(names, in_dims, arguments, strict=True)
        ]
        unfold = None
        if fold is not None:
            arguments, unfold = fold(size, arguments)
        result = call(*arguments)
        if unfold is not None:
            result = tree_map_only(torch.Tensor, unfold, result)
        return result, 0 if isinstance(result, torch.Tensor) else (0,) * len(result)

    return rule


def _each(arguments, in_dims, i):
    return [
        x if dim is None else x.select(dim, i).contiguous()
        for x, dim in zip(arguments, in_dims, strict=True)
    ]


def _leading(x, dim, size):
    """`x` with what is mapped over as its first dimension; who maps has no say in strides."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0).contiguous()
