"""Every op as ``torch.ops.pyllm.<op>``: what autograd, torch.compile, export, autocast, vmap see.

An eager call goes straight to its binding. Only where one of these has a say does `Op.serve` send a
call the way through here, and PyTorch's dispatcher. What computes is the same implementation,
chosen by the same rules.
"""

from pyllm.ops.library.activation import activation
from pyllm.ops.library.attention import flash_attention
from pyllm.ops.library.decode import paged_attention, rope_cache, sample
from pyllm.ops.library.matmul import embedding, matmul, quant_matmul, quantize_activation
from pyllm.ops.library.norm import layer_norm, rms_norm

__all__ = [
    "activation",
    "embedding",
    "flash_attention",
    "layer_norm",
    "matmul",
    "paged_attention",
    "quant_matmul",
    "quantize_activation",
    "rms_norm",
    "rope_cache",
    "sample",
]
