"""Modules made of pyllm's ops."""

from pyllm.nn.linear import Embedding, FusedLinear
from pyllm.nn.norm import RMSNorm
from pyllm.nn.rotary import rotary_table

__all__ = ["Embedding", "FusedLinear", "RMSNorm", "rotary_table"]
