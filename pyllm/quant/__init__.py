"""Quantized weights: `QuantTensor`, the one form between file formats and kernels."""

from pyllm.quant.activation import QuantActivation
from pyllm.quant.fragments import QuantFragments
from pyllm.quant.rows import QuantRows
from pyllm.quant.tensor import QuantTensor

__all__ = ["QuantActivation", "QuantFragments", "QuantRows", "QuantTensor"]
