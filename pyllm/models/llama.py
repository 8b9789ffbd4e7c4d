"""Llama and the families that differ from it by options: Mistral, Qwen2 and 2.5, Qwen3, SmolLM.

A model is a plain module: it takes a `Batch` and returns hidden states. It has no loop, no cache
policy and no sampling.
"""

from torch import nn

from pyllm.nn import rotary_table
from pyllm.ops import paged_attention, rope_cache, silu_mul

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# ours: (Hugging Face, GGUF). {i} is the layer.
NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
    "rope_factors": (None, "rope_freqs.weight"),
    "norm1": ("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "q": ("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    "k": ("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    "v": ("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    "o": ("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    "q_bias": ("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    "k_bias": ("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    "v_bias": ("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    "o_bias": ("model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias"),
    "q_norm": ("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    "k_norm": ("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    "norm2": ("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "gate": ("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    "up": ("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    "down": ("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    "gate_bias": ("model.layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias"),
    "up_bias": ("model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias"),
    "down_bias": ("model.layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias"),
}
OPTIONAL = {"head", "rope_factors", "q_norm", "k_norm"} | {n for n in NAMES if n.endswith("_bias")}


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, config, weights):
        super().__init__()
        c, self.config = config, config
        self.qkv = weights.linear(
            "q",
            "k",
            "v",
            k=c.hidden_size,
            n=[c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim],
        )
        self.o = weights.linear("o", k=c.n_heads * c.head_dim, n=[c.hidden_size])
        self.q_norm = weights.rms_norm("q_norm", c.head_dim, c.norm_eps)
        self.k_norm = weights.rms_norm("k_norm", c.head_dim, c.norm_eps)

    def forward(self, x, batch, cache, angles, last):
        c = self.config
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in self.qkv(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        k_cache, v_cache = cache
        q = rope_cache(
            q, k, v, angles, batch.positions, k_cache, v_cache,
            cu_seqlens_q=batch.cu_seqlens, page_table=batch.page_table,
            interleaved=c.rope_interleaved, out=q,
        )  # fmt: skip
        cu_seqlens = batch.cu_seqlens
        if last:
            q, cu_seqlens = batch.outputs(q.flatten(1)).unflatten(1, q.shape[1:]), batch.cu_outputs
        y = paged_attention(
            q, k_cache, v_cache, cu_seqlens_q=cu_seqlens, page_table=batch.page_table,
            context_lens=batch.context_lens, window=c.window,
        )  # fmt: skip
        return self.o(y.flatten(1))[0]


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config, weights):
        super().__init__()
        c = config
        n = c.intermediate_size
        self.gate_up = weights.linear("gate", "up", k=c.hidden_size, n=[n, n])
        self.down = weights.linear("down", k=n, n=[c.hidden_size])

    def forward(self, x):
        return self.down(silu_mul(*self.gate_up(x), quantize=self.down.quantize))[0]


class Block(nn.Module):
    """Attention and MLP, each on the normalized residual stream.

    The last block needs the keys and values of all tokens, and the rest for those that are output.
    """

    def __init__(self, config, weights):
        super().__init__()
        self.norm1 = weights.rms_norm("norm1", config.hidden_size, config.norm_eps)
        self.attention = Attention(config, weights)
        self.norm2 = weights.rms_norm("norm2", config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, weights)

    def forward(self, x, residual, batch, cache, angles, last):
        if residual is None:
            y, residual = self.norm1(x, quantize=self.attention.qkv.quantize), x
        else:
            y, residual = self.norm1(x, residual, quantize=self.attention.qkv.quantize)
        y = self.attention(y, batch, cache, angles, last)
        if last:
            residual = batch.outputs(residual)
        y, residual = self.norm2(y, residual, quantize=self.mlp.gate_up.quantize)
        return self.mlp(y), residual


class Llama(nn.Module):
    """The decoder: token ids in, hidden states out; `logits` applies the output head."""

    def __init__(self, config, weights):
        super().__init__()
        self.config = config
        matrix = weights.matrix("embed", n=config.vocab_size, k=config.hidden_size)
        self.embed = weights.embedding(matrix)
        self.blocks = nn.ModuleList(Block(config, weights.layer(i)) for i in range(config.n_layers))
        self.norm = weights.rms_norm("norm", config.hidden_size, config.norm_eps)
        self.head = weights.head(matrix, k=config.hidden_size, n=config.vocab_size)
        self.factors = weights.vector("rope_factors", config.rope_dim // 2)
        self.angles = None

    def prepare(self, max_context: int):
        """Makes the table of rotary angles for contexts of up to `max_context` tokens."""
        c = self.config
        self.angles = rotary_table(
            c.rope_dim, max_context, c.rope_theta, c.rope_scaling, self.factors
        ).to(self.norm.weight.device)

    def forward(self, batch):
        x, residual = self.embed(batch.token_ids), None
        for block, cache in zip(self.blocks, batch.layers, strict=True):
            last = block is self.blocks[-1]
            x, residual = block(x, residual, batch, cache, self.angles, last)
        return self.norm(x, residual, quantize=self.head.quantize)[0]

    def logits(self, hidden):
        """float32 ``[R, vocab]`` of hidden states ``[R, hidden_size]``."""
        return self.head(hidden)[0]
