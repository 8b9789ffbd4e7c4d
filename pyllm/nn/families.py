"""What `pyllm.patch` replaces by what: the tables.

Classes of transformers are known by their names and checked by their attributes; nothing here
imports transformers.
"""

from torch import nn

from pyllm.nn.activation import Activation
from pyllm.nn.attention import Encoder, EncoderLayer, MultiheadAttention
from pyllm.nn.decoder import DecoderLayer
from pyllm.nn.encoders import AddNorm, DistilBertBlock, RaggedEncoder, T5GatedMLP
from pyllm.nn.linear import Linear
from pyllm.nn.mlp import FusedGatedMLP, GatedMLP
from pyllm.nn.norm import LayerNorm, RMSNorm
from pyllm.nn.swap import Swapped, Unfit, original_class
from pyllm.ops import rms_norm


class HuggingFaceRMSNorm(Swapped):
    """Of Llama and most others: ``weight * normalized``, with `eps` under one of two names."""

    @classmethod
    def settings(cls, module):
        return {"pyllm_eps": _eps(module)}

    def forward(self, x, residual=None, quantize=None):
        return rms_norm(
            x, self.factor(), self.pyllm_eps, residual=residual, quantize=quantize,
            backend=self.backend,
        )  # fmt: skip

    def factor(self):
        return self.weight


class GemmaRMSNorm(HuggingFaceRMSNorm):
    """Of Gemma: ``(1 + weight) * normalized``."""

    def factor(self):
        return self.weight.float() + 1


def _eps(module):
    for name in ("variance_epsilon", "eps"):
        if hasattr(module, name):
            return getattr(module, name)
    raise Unfit("expected an attribute variance_epsilon or eps")


# Of torch: only the class itself, not subclasses, which may compute something else.
# class -> (parts, the class that it is swapped to)
TORCH = {
    nn.Linear: ("mlp", Linear),
    nn.LayerNorm: ("norms", LayerNorm),
    nn.RMSNorm: ("norms", RMSNorm),
    nn.GELU: ("mlp", Activation),
    nn.ReLU: ("mlp", Activation),
    nn.MultiheadAttention: ("attention", MultiheadAttention),
    nn.TransformerEncoderLayer: ("attention norms mlp", EncoderLayer),
    nn.TransformerEncoder: ("attention norms mlp", Encoder),
}

# Families whose modules are BERT's under other names.
_BERT = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")

# Of transformers: name of the class -> (parts, the class that is put before it)
HUGGING_FACE = {
    **dict.fromkeys(
        [
            "LlamaRMSNorm",
            "MistralRMSNorm",
            "Qwen2RMSNorm",
            "Qwen3RMSNorm",
            "Phi3RMSNorm",
            "T5LayerNorm",
        ],
        ("norms", HuggingFaceRMSNorm),
    ),
    **dict.fromkeys(["Gemma2RMSNorm", "Gemma3RMSNorm"], ("norms", GemmaRMSNorm)),
    **dict.fromkeys(
        ["LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma2MLP", "Gemma3MLP"],
        ("mlp", GatedMLP),
    ),
    "Phi3MLP": ("mlp", FusedGatedMLP),
    "T5DenseGatedActDense": ("mlp", T5GatedMLP),
    **dict.fromkeys(
        [f"{n}{part}" for n in _BERT for part in ("SelfOutput", "Output")], ("norms", AddNorm)
    ),
    "TransformerBlock": ("norms", DistilBertBlock),
    **dict.fromkeys(
        [*(f"{name}Encoder" for name in _BERT), "Transformer"], ("attention", RaggedEncoder)
    ),
    **dict.fromkeys(
        [
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen3DecoderLayer",
            "Phi3DecoderLayer",
            "Gemma2DecoderLayer",
            "Gemma3DecoderLayer",
        ],
        ("attention norms mlp", DecoderLayer),
    ),
    **dict.fromkeys(
        ["GELUActivation", "GELUTanh", "NewGELUActivation", "FastGELUActivation"],
        ("mlp", Activation),
    ),
}

# Attention modules of transformers that reach attention through its interface, tested here.
ATTENTION = {
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Gemma2Attention",
    "Gemma3Attention", "Phi3Attention", "GPT2Attention", "GPTNeoXAttention", "OPTAttention",
    *(f"{name}{kind}Attention" for name in _BERT for kind in ("Self", "Cross")),
    "DistilBertSelfAttention", "T5Attention", "BartAttention", "MarianAttention",
    "WhisperAttention", "ViTAttention",
}  # fmt: skip


def is_linear(module) -> bool:
    """Whether it is a linear layer and nothing more, of torch or of GPT-2 in transformers."""
    cls = type(module)
    return cls is nn.Linear or (cls.__name__, cls.__module__) == ("Conv1D", _CONV1D)


_CONV1D = "transformers.pytorch_utils"


def is_attention(module) -> bool:
    """Whether it is an attention module of transformers that has a configuration."""
    cls = original_class(module)
    return (
        cls.__module__.startswith("transformers.models.")
        and "Attention" in cls.__name__
        and hasattr(module.__dict__.get("config"), "_attn_implementation")
    )


def is_tested_attention(module) -> bool:
    return original_class(module).__name__ in ATTENTION


def swap_for(module):
    """``(parts, class)``: what takes a module's place, or None."""
    cls = original_class(module)
    if cls.__module__.startswith("transformers."):
        return HUGGING_FACE.get(cls.__name__)
    return TORCH.get(cls)
