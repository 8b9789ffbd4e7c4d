"""Attention as modules (Vaswani et al., 2017, arXiv:1706.03762)."""

import warnings

import torch
from torch import nn

from pyllm.nn.linear import multiply
from pyllm.nn.swap import Swapped
from pyllm.ops import flash_attention
from pyllm.ops._attention import as_bias


class MultiheadAttention(nn.MultiheadAttention):
    """As ``torch.nn.MultiheadAttention``, without the matrix of weights.

    Takes its masks. Where the weights are wanted (`need_weights`, torch's default), and for dropout
    in training, `add_bias_kv` and `add_zero_attn`, torch computes, with a warning. A query that may
    see no key gives what a result of 0 gives, not NaN.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.
    """

    backend = None

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        why = (
            "the attention weights are wanted (need_weights)"
            if need_weights
            else "there is dropout"
            if self.dropout and self.training
            else "of add_bias_kv or add_zero_attn"
            if self.bias_k is not None or self.add_zero_attn
            else None
        )
        if why is not None:
            if not torch.compiler.is_compiling():
                warnings.warn(f"pyllm: torch computes attention: {why}", stacklevel=2)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched, same = query.ndim == 3, query is key and key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = self._project(query, key, value, same)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        causal = is_causal and q.shape[1] == k.shape[1]
        bias = None if causal else self._mask(attn_mask, q)
        if key_padding_mask is not None:
            padding = _as_bias(key_padding_mask, q.dtype).view(q.shape[0], 1, 1, -1)
            bias = padding if bias is None else bias + padding
        y = flash_attention(q, k, v, causal=causal, bias=bias, backend=self.backend)
        y = multiply(y.flatten(2), self.out_proj.weight, self.out_proj.bias, self.backend)
        if not batched:
            return y.squeeze(0), None
        return y if self.batch_first else y.transpose(0, 1), None

    def _project(self, query, key, value, same):
        """q, k and v of all heads."""
        if self._qkv_same_embed_dim and same:
            qkv = multiply(query, self.in_proj_weight, self.in_proj_bias, self.backend)
            return qkv.chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return [multiply(x, weight, bias, self.backend) for x, weight, bias in inputs]

    def _mask(self, mask, q):
        """``attn_mask``, ``[L, S]`` or ``[B * heads, L, S]``, as a bias."""
        if mask is None:
            return None
        bias = _as_bias(mask, q.dtype)
        return bias[None, None] if bias.ndim == 2 else bias.unflatten(0, (-1, self.num_heads))


def _as_bias(mask, dtype):
    """A mask of torch's modules, whose bools say what is hidden."""
    return as_bias(~mask, dtype) if mask.dtype == torch.bool else mask.to(dtype)


class Attention(nn.Module):
    """Self- or cross-attention with grouped keys and values, as in Llama and with its names.

    Args:
        embed_dim: of the input and the output.
        num_heads: of the queries.
        num_kv_heads: of keys and values, a divisor of `num_heads`; None: as many.
        head_dim: None: ``embed_dim / num_heads``.
        bias: of the linear layers.
        causal, window, softcap, scale: as of `pyllm.ops.flash_attention`.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.

    Raises:
        ValueError: for numbers of heads that do not divide what they should.
    """

    backend = None

    def __init__(
        self, embed_dim, num_heads, num_kv_heads=None, *, head_dim=None, bias=False, causal=False,
        window=None, softcap=None, scale=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads or (head_dim is None and embed_dim % num_heads):
            raise ValueError(
                f"Attention: expected num_heads to divide embed_dim and be a multiple of "
                f"num_kv_heads, got {num_heads}, {embed_dim} and {num_kv_heads}"
            )
        self.head_dim = head_dim or embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **options)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, **options)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, **options)

    def forward(self, x, context=None, mask=None):
        """``[B, S, embed_dim]`` of `x` of that shape.

        Args:
            context: ``[B, Sk, embed_dim]``, where keys and values come from; None: `x`.
            mask: as of ``F.scaled_dot_product_attention``: what broadcasts to ``[B, H, S, Sk]``,
                bool (True: seen) or added to the logits.
        """
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim))
            for y in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        if mask is not None and mask.dtype == torch.bool:
            mask = as_bias(mask, q.dtype)
        y = flash_attention(q, k, v, bias=mask, backend=self.backend, **self.options)
        return self.o_proj(y.flatten(2))


class EncoderLayer(Swapped):
    """``nn.TransformerEncoderLayer`` that calls its parts also where it could be `in_one_call`."""

    @classmethod
    def settings(cls, module):
        return {"activation_relu_or_gelu": 0}


class Encoder(Swapped):
    """``nn.TransformerEncoder`` that passes its layers no nested tensors."""

    @classmethod
    def settings(cls, module):
        return {"use_nested_tensor": False}


def in_one_call(layer) -> bool:
    """Whether torch computes an ``nn.TransformerEncoderLayer`` in one call at inference.

    It was up to 1.2 times as fast as calling pyllm's parts.
    """
    attention = layer.self_attn
    return bool(
        layer.activation_relu_or_gelu
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and layer.norm1.eps == layer.norm2.eps
    )
