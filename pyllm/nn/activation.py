"""Activation functions as modules know them."""

from torch import nn

from pyllm.nn.swap import Swapped, Unfit
from pyllm.ops import gelu, gelu_mul, relu, silu_mul

# Class of an activation module -> what it computes. (tanh stands for GELU's approximation by it.)
KINDS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "ReLU": "relu",
}
_APPROXIMATE = {"gelu": "none", "tanh": "tanh"}


def kind_of(module) -> str | None:
    """``silu``, ``gelu``, ``tanh`` or ``relu``; None for another activation."""
    if isinstance(module, nn.GELU):
        return {"none": "gelu"}.get(module.approximate, module.approximate)
    if not isinstance(module, nn.Module):
        module = getattr(module, "__self__", None)
    return KINDS.get(type(module).__name__)


def gated(kind, gate, up, quantize=None, backend=None):
    """``activation(gate) * up``, of the kinds ``silu``, ``gelu`` and ``tanh``."""
    if kind == "silu":
        return silu_mul(gate, up, quantize=quantize, backend=backend)
    return gelu_mul(gate, up, _APPROXIMATE[kind], quantize=quantize, backend=backend)


def gated_kind(module, activation, *projections):
    """The kind of a gated unit with its activation and its linear layers under these names.

    Raises:
        Unfit: if it is none that `gated` computes.
    """
    for name in projections:
        if not isinstance(getattr(module, name, None), nn.Module):
            raise Unfit(f"expected a module {name}")
    kind = kind_of(getattr(module, activation, None))
    if kind not in ("silu", "gelu", "tanh"):
        raise Unfit("its activation is none of silu, gelu and tanh")
    return kind


class Activation(Swapped):
    """An activation module on pyllm's kernel."""

    @classmethod
    def settings(cls, module):
        kind = kind_of(module)
        if kind not in ("gelu", "tanh", "relu"):
            raise Unfit("there is no kernel of it on its own")
        return {"kind": kind}

    def forward(self, x):
        if x.stride(-1) != 1:
            x = x.contiguous()
        if self.kind == "relu":
            return relu(x, backend=self.backend)
        return gelu(x, _APPROXIMATE[self.kind], backend=self.backend)
