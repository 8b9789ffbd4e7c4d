"""`pyllm.patch`: the modules of a model that somebody else wrote, on pyllm's kernels.

Everything is planned and checked first. What is then done is a list of changed attributes, each
noted with what was there before: to undo it, in the reverse order, is to roll back and to unpatch.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from pyllm.nn import families
from pyllm.nn.attention import Encoder, in_one_call
from pyllm.nn.linear import Linear
from pyllm.nn.quant_linear import QuantLinear
from pyllm.nn.report import Left, PatchReport, Replaced
from pyllm.nn.swap import Swapped, Unfit, swapped
from pyllm.ops._norm import FLOATS
from pyllm.ops.registry import check_names

_BITS = {"int4": 4, "int8": 8}
_RECORD = "_pyllm_patch"
_ABSENT = "pyllm: no such attribute"  # a string, so that a copy of it is the same


@dataclass
class _Record:
    """What was done to a model, kept on it."""

    options: dict
    report: PatchReport
    done: list


@dataclass
class _Plan:
    options: dict
    replaced: list = field(default_factory=list)
    left: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    # (object, attribute, value)
    changes: list = field(default_factory=list)

    def swap(self, name, module, cls, settings):
        self.replaced.append(Replaced(name, _name(type(module)), _name(cls)))
        for attribute, value in settings.items():
            self.changes.append((module, attribute, value))
        if self.options["backend"] is not None:
            self.changes.append((module, "backend", self.options["backend"]))
        self.changes.append((module, "__class__", cls))


def patch(model, attention=True, norms=True, mlp=True, linear=None, backend=None) -> PatchReport:
    """Lets the modules of `model` compute with pyllm's kernels, in place.

    Acts on this instance only. Parameters are shared, not copied, and keep their names; hooks,
    ``isinstance`` and ``copy.deepcopy`` go on working. What is replaced is in
    ``pyllm/nn/families.py``. Models of Hugging Face and plain PyTorch ones are served.

    Args:
        model: an ``nn.Module``.
        attention: replace attention.
        norms: replace layer and RMS normalization.
        mlp: replace gated feed-forward blocks, activation functions and, for few rows at
            inference, the products of linear layers.
        linear: None, or quantize the weights of linear layers: ``"int8"`` or ``"int4"``, in groups
            of 32.
        backend: of the ops; None: as `pyllm.ops.registry` chooses.

    Returns:
        What was replaced, and what was left and why. Called again with the same options, it
        changes nothing and says what the first call did.

    Raises:
        ValueError: if there is nothing to replace, the model was patched with other options, or it
            has meta or sharded tensors, TorchScript, a dtype or a head size that no kernel takes.
            The model is as it was then.
    """
    options = {
        "attention": bool(attention), "norms": bool(norms), "mlp": bool(mlp), "linear": linear,
        "backend": backend,
    }  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a torch.nn.Module, got {type(model).__name__}")
    if linear is not None and linear not in _BITS:
        raise ValueError(f"patch: linear: expected None, 'int8' or 'int4', got {linear!r}")
    check_names(backend)
    record = model.__dict__.get(_RECORD)
    if record is not None:
        if record.options != options:
            raise ValueError(
                f"patch: the model is patched already, with {_described(record.options)}; "
                f"pyllm.unpatch it before you patch it with {_described(options)}"
            )
        report = record.report
        return PatchReport(report.replaced, report.left, report.notes, already=True)
    _check(model)
    plan = _Plan(options)
    _plan_swaps(plan, model)
    if options["attention"]:
        _plan_attention(plan, model)
    if linear is not None:
        _plan_linear(plan, model)
    if not plan.replaced:
        raise ValueError(_nothing(plan))
    report = PatchReport(tuple(plan.replaced), tuple(plan.left), tuple(plan.notes))
    done = []
    try:
        for change in plan.changes:
            done.append(_change(*change))
    except BaseException:
        _undo(done)
        raise
    object.__setattr__(model, _RECORD, _Record(options, report, done))
    return report


def unpatch(model) -> None:
    """Makes a patched model exactly what it was.

    Raises:
        ValueError: if `model` itself was not patched.
    """
    record = getattr(model, "__dict__", {}).get(_RECORD)
    if record is None:
        raise ValueError("unpatch: expected a model that pyllm.patch was called with")
    _undo(record.done)
    object.__delattr__(model, _RECORD)


def _plan_swaps(plan, model):
    whole = None
    for name, module in model.named_modules():
        if whole is not None and name.startswith(whole):
            continue
        is_layer = type(module) is nn.TransformerEncoderLayer
        if is_layer and plan.options["linear"] is None and in_one_call(module):
            plan.left.append(Left(name, _name(type(module)), "torch computes it in one call"))
            whole = f"{name}." if name else ""
        else:
            _plan_swap(plan, name, module)


def _plan_swap(plan, name, module):
    found = families.swap_for(module)
    if found is None:
        return
    parts, cls = found
    if not all(plan.options[part] for part in parts.split()) or isinstance(module, cls):
        return
    quantized = plan.options["linear"] is not None
    if (cls is Linear and quantized) or (cls is Encoder and not quantized):
        return
    try:
        settings = cls.settings(module) if issubclass(cls, Swapped) else {}
    except Unfit as why:
        plan.left.append(Left(name, _name(type(module)), str(why)))
        return
    _check_dtypes(name, module)
    if issubclass(cls, Swapped):
        cls = swapped(cls, type(module))
    plan.swap(name, module, cls, settings)


def _plan_attention(plan, model):
    """Models of transformers take our attention by its name in their configuration."""
    modules = [(n, m) for n, m in model.named_modules() if families.is_attention(m)]
    if not modules:
        return
    from pyllm.nn import huggingface

    # A configuration is of some attention modules: all are of tested families, or none is replaced.
    untested = {id(m.config): m for _, m in modules if not families.is_tested_attention(m)}
    chosen = {}
    for name, module in modules:
        before = f"{_name(type(module))}, {module.config._attn_implementation}"
        if (other := untested.get(id(module.config))) is not None:
            why = f"{_name(type(other))} is not of a tested family"
            plan.left.append(Left(name, before, why))
        elif module.config._attn_implementation != huggingface.NAME:
            _check_dtypes(name, module)
            _check_head_size(name, module, huggingface.MAX_HEAD_SIZE)
            chosen[id(module.config)] = module.config
            plan.replaced.append(Replaced(name, before, "pyllm.ops.flash_attention"))
            if plan.options["backend"] is not None:
                plan.changes.append((module, "backend", plan.options["backend"]))
    plan.changes += huggingface.config_changes(model, chosen)
    plan.notes += huggingface.NOTES if chosen else ()


def _plan_linear(plan, model):
    """Linear layers become modules of another kind; the originals are kept for `unpatch`."""
    bits, made = _BITS[plan.options["linear"]], {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not families.is_linear(module):
            continue
        if module is model:
            plan.left.append(
                Left(name, _name(type(module)), "there is no module that it is part of")
            )
            continue
        if module not in made:
            _check_dtypes(name, module)
            made[module] = _quantized(module, bits)
            if made[module] is not None:
                made[module].backend = plan.options["backend"]
        if made[module] is None:
            why = "its input's size is no multiple of 16"
            plan.left.append(Left(name, _name(type(module)), why))
            continue
        parent, _, attribute = name.rpartition(".")
        plan.changes.append((model.get_submodule(parent), attribute, made[module]))
        after = f"pyllm.QuantLinear, {bits} bits"
        plan.replaced.append(Replaced(name, _name(type(module)), after))


def _quantized(linear, bits):
    k = linear.weight.shape[1 if isinstance(linear, nn.Linear) else 0]
    if k == 0 or k % 16:
        return None
    return QuantLinear.from_linear(linear, bits=bits, group_size=16 if k % 32 else 32)


def _check(model):
    for name, module in model.named_modules():
        where = name or "the model itself"
        if type(module).__module__.startswith("transformers.") and _old_transformers():
            raise ValueError(f"patch: expected transformers 5 or later, got {_old_transformers()}")
        if type(module).__name__ == "OptimizedModule":
            raise ValueError(f"patch: {where}: expected a model that is compiled after the patch")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"patch: {where}: expected Python modules, got TorchScript")
        if type(module).__name__ in _SHARDED:
            raise ValueError(f"patch: {where}: expected whole modules, got {_name(type(module))}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"patch: {name}: expected a tensor with data, got one on meta: load it"
            )
        if type(tensor).__name__ in _SHARDED:
            raise ValueError(f"patch: {name}: expected a whole tensor, got {_name(type(tensor))}")


def _old_transformers():
    """The version, if its layers take and return other things than those that are replaced."""
    version = sys.modules["transformers"].__version__
    return version if int(version.partition(".")[0]) < 5 else None


_SHARDED = {"DTensor", "ShardedTensor", "FlatParameter", "FullyShardedDataParallel"}


def _check_dtypes(name, module):
    for parameter_name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in FLOATS:
            raise ValueError(
                f"patch: {name}.{parameter_name}: expected float32, bfloat16 or float16, got "
                f"{str(parameter.dtype).removeprefix('torch.')}"
            )


def _check_head_size(name, module, limit):
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", 1)
    if size > limit:
        raise ValueError(
            f"patch: {name}: expected heads of at most {limit}, got {size}; attention=False leaves "
            "attention as it is"
        )


def _change(owner, attribute, value):
    """Sets an attribute; returns how it was, as `_change` takes it."""
    if attribute == "__class__":
        before = owner.__class__
    elif attribute in getattr(owner, "_modules", {}):
        before = owner._modules[attribute]
    else:
        before = owner.__dict__.get(attribute, _ABSENT)
    if isinstance(value, str) and value == _ABSENT:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, value)
    return owner, attribute, before


def _undo(done):
    while done:
        _change(*done.pop())


def _nothing(plan):
    parts = [part for part in ("attention", "norms", "mlp") if plan.options[part]]
    parts += ["linear"] if plan.options["linear"] else []
    text = f"patch: found nothing to replace; looked for {', '.join(parts) or 'nothing at all'}"
    names = ", ".join(sorted({cls.__name__ for cls in families.TORCH} | set(families.HUGGING_FACE)))
    text += f": {names}, {', '.join(sorted(families.ATTENTION))}"
    return text + "".join(f"; left {x.name}: {x.why}" for x in plan.left[:3])


def _described(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _name(cls):
    room = cls.__module__.partition(".")[0]
    return f"{room}.{cls.__name__}" if room in ("torch", "pyllm") else cls.__name__
