"""The sizes and options of a decoder, and reading them from a checkpoint's metadata."""

import math
from dataclasses import dataclass


class ModelError(ValueError):
    """The checkpoint describes a model that this version cannot run; the message says what."""


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-like decoder.

    Attributes:
        rope_scaling: None or Hugging Face's rope parameters (``rope_type``, ``factor``, ...).
        rope_interleaved: rotate pairs (2i, 2i+1) rather than (i, i + R/2).
        window: sliding attention window in tokens, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_dim: int
    rope_scaling: dict | None = None
    rope_interleaved: bool = False
    window: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads"):
            self._in_range(name, 1, 2**24)
        self._in_range("n_kv_heads", 1, self.n_heads)
        self._in_range("head_dim", 1, 256)
        self._in_range("max_context", 1, 2**31 - 1)
        self._in_range("rope_dim", 2, self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ModelError(
                f"n_heads: expected a multiple of n_kv_heads ({self.n_kv_heads}), "
                f"got {self.n_heads}"
            )
        if self.rope_dim % 2:
            raise ModelError(f"rope_dim: expected an even number, got {self.rope_dim}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ModelError(f"{name}: expected a finite number >= 0, got {value!r}")

    def _in_range(self, name, low, high):
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ModelError(f"{name}: expected an integer from {low} to {high}, got {value!r}")


def from_gguf(metadata, arch: str, tensors) -> DecoderConfig:
    """Reads ``<arch>.*`` keys (source: the GGUF specification, "Standardized key-value pairs")."""

    def get(key, default=None):
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ModelError(f"the metadata has no {arch}.{key}")
        return value

    n_heads = get("attention.head_count")
    hidden_size = get("embedding_length")
    default_head = hidden_size // n_heads if isinstance(n_heads, int) and n_heads > 0 else 0
    head_dim = get("attention.key_length", default_head)
    if get("attention.value_length", head_dim) != head_dim:
        raise ModelError("attention.value_length: expected the same as attention.key_length")
    scaling = None
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", None):
        scaling = {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": metadata.get(
                f"{arch}.rope.scaling.original_context_length"
            ),
            "attention_factor": metadata.get(f"{arch}.rope.scaling.attn_factor"),
        }
    vocab = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        n_layers=get("block_count"),
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        max_context=get("context_length"),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.get(f"{arch}.rope.freq_base", 10000.0),
        rope_dim=get("rope.dimension_count", head_dim),
        rope_scaling=scaling,
        # Converters to GGUF permute Llama's queries and keys so that pairs lie side by side.
        rope_interleaved=arch == "llama",
        window=metadata.get(f"{arch}.attention.sliding_window") or None,
    )


def from_huggingface(config: dict) -> DecoderConfig:
    """Reads ``config.json`` (source: transformers' configurations of these families)."""

    def get(key, default=None):
        value = config.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"config.json has no {key}")
        return value

    if get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act: expected silu, got {config['hidden_act']!r}")
    n_heads, hidden_size = get("num_attention_heads"), get("hidden_size")
    default_head = hidden_size // n_heads if isinstance(n_heads, int) and n_heads > 0 else 0
    head_dim = get("head_dim", default_head)
    # transformers 5 has rope_parameters; before, rope_theta stood beside rope_scaling.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_type"] = kind
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    uses_window = config.get("use_sliding_window", True)
    return DecoderConfig(
        vocab_size=get("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size"),
        n_layers=get("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", n_heads),
        head_dim=head_dim,
        max_context=get("max_position_embeddings"),
        norm_eps=get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        rope_dim=int(head_dim * config.get("partial_rotary_factor", 1.0)),
        rope_scaling=None if kind == "default" else rope,
        window=config.get("sliding_window") if uses_window else None,
    )
