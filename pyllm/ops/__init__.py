"""The functional API: one function an op. See `pyllm.ops.registry` for how a backend is chosen."""

from pyllm.ops._sdpa import scaled_dot_product_attention
from pyllm.ops.activation import activation_backward, gelu, gelu_mul, relu, silu_mul
from pyllm.ops.embedding import embedding
from pyllm.ops.flash_attention import flash_attention, flash_attention_backward
from pyllm.ops.layer_norm import layer_norm, layer_norm_backward
from pyllm.ops.matmul import matmul
from pyllm.ops.paged_attention import paged_attention
from pyllm.ops.quant_matmul import pack_fragments, quant_matmul, quantize_activation
from pyllm.ops.rms_norm import rms_norm, rms_norm_backward
from pyllm.ops.rope_cache import rope_cache
from pyllm.ops.sample import sample

__all__ = [
    "activation_backward",
    "embedding",
    "flash_attention",
    "flash_attention_backward",
    "gelu",
    "gelu_mul",
    "layer_norm",
    "layer_norm_backward",
    "matmul",
    "pack_fragments",
    "paged_attention",
    "quant_matmul",
    "quantize_activation",
    "relu",
    "rms_norm",
    "rms_norm_backward",
    "rope_cache",
    "sample",
    "scaled_dot_product_attention",
    "silu_mul",
]
