"""Gated feed-forward blocks (Shazeer, 2020, arXiv:2002.05202)."""

from torch import nn

from pyllm.nn.activation import gated, gated_kind
from pyllm.nn.swap import Swapped


class GatedMLP(Swapped):
    """``down(activation(gate(x)) * up(x))``, of models of transformers."""

    @classmethod
    def settings(cls, module):
        return {"pyllm_kind": gated_kind(module, "act_fn", "gate_proj", "up_proj", "down_proj")}

    def forward(self, x):
        return _forward(self, x)


class FusedGatedMLP(Swapped):
    """The same with gate and up in one matrix, gate first (Phi-3)."""

    @classmethod
    def settings(cls, module):
        kind = gated_kind(module, "activation_fn", "gate_up_proj", "down_proj")
        return {"pyllm_kind": kind}

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated(self.pyllm_kind, gate, up, backend=self.backend))


class _Gated(nn.Module):
    backend = None

    def __init__(self, dim, hidden_dim, bias, device, dtype):
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden_dim, **options)
        self.up_proj = nn.Linear(dim, hidden_dim, **options)
        self.down_proj = nn.Linear(hidden_dim, dim, **options)

    def forward(self, x):
        return _forward(self, x)


class SwiGLU(_Gated):
    """``down(silu(gate(x)) * up(x))``, the feed-forward block of Llama, with its names.

    Args:
        dim: of the input and the output.
        hidden_dim: between them.
        bias: of all three linear layers.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.
    """

    pyllm_kind = "silu"

    def __init__(self, dim, hidden_dim, bias=False, *, device=None, dtype=None):
        super().__init__(dim, hidden_dim, bias, device, dtype)


class GeGLU(_Gated):
    """``down(gelu(gate(x)) * up(x))``, the feed-forward block of Gemma and T5 v1.1.

    Args:
        dim: of the input and the output.
        hidden_dim: between them.
        bias: of all three linear layers.
        approximate: ``"none"`` or ``"tanh"``, as of ``torch.nn.GELU``.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.

    Raises:
        ValueError: for another `approximate`.
    """

    def __init__(self, dim, hidden_dim, bias=False, approximate="none", *, device=None, dtype=None):
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GeGLU: approximate: expected 'none' or 'tanh', got {approximate!r}")
        super().__init__(dim, hidden_dim, bias, device, dtype)
        self.pyllm_kind = "gelu" if approximate == "none" else "tanh"


def _forward(block, x):
    y = gated(block.pyllm_kind, block.gate_proj(x), block.up_proj(x), backend=block.backend)
    return block.down_proj(y)
