"""Modules made of pyllm's ops, and `patch`, which puts them into other people's models."""

import importlib

from pyllm.nn.linear import Embedding, FusedLinear, Linear
from pyllm.nn.norm import LayerNorm, RMSNorm
from pyllm.nn.rotary import rotary_table

# What the engine does not need is imported on first use.
_LAZY = {
    "Attention": "pyllm.nn.attention",
    "GeGLU": "pyllm.nn.mlp",
    "MultiheadAttention": "pyllm.nn.attention",
    "PatchReport": "pyllm.nn.report",
    "QuantLinear": "pyllm.nn.quant_linear",
    "SwiGLU": "pyllm.nn.mlp",
    "patch": "pyllm.nn.patching",
    "unpatch": "pyllm.nn.patching",
}

__all__ = ["Embedding", "FusedLinear", "LayerNorm", "Linear", "RMSNorm", "rotary_table", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'pyllm.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
