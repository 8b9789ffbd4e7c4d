"""Encoders: padding is left out, and the residual add is a part of the norm that follows.

A batch of texts of different lengths is padded to the longest, and the encoders of transformers
compute every padded position and throw it away. Here the real positions of the batch are put end to
end at the encoder's entrance and back into their places at its exit; between them attention gets
where each sequence begins, and linear layers, norms and activations see no padding. At padded
positions, of which nothing depends but by mistake, the result is 0.
"""

import torch
from torch import nn

from pyllm.nn.activation import gated, gated_kind
from pyllm.nn.norm import LayerNorm
from pyllm.nn.swap import Swapped, Unfit, original_class

# On a CPU the sequences go through the layers in groups of at most about so many positions, so that
# what one layer hands to the next stays in the caches, and buffers are small enough for malloc to
# reuse. Measured for MiniLM, 64 texts of 58 tokens on average, two Zen 4 cores: 0.71 s in groups of
# 512, 0.64 of 1024, 0.66 of 2048, 0.76 all at once; 1.39 s padded.
GROUP = 1024


class RaggedEncoder(Swapped):
    """A stack of layers ``forward(hidden_states, attention_mask, ...)`` that hand all keywords on.

    The layers are called with ``[1, T, D]`` and the keywords that transformers has for such
    batches, ``cu_seq_lens_q`` and the like. Where that would not give the same, the batch stays as
    it is: see `_why_padded`.
    """

    @classmethod
    def settings(cls, module):
        if not isinstance(getattr(module, "layer", None), nn.ModuleList):
            raise Unfit("expected a list of modules, layer")
        return {}

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if args or _why_padded(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        real = _real(attention_mask)
        if real is None or not real.any():
            return super().forward(hidden_states, attention_mask, **kwargs)
        lengths = real.sum(1).tolist()
        places = real.flatten().nonzero().squeeze(1)
        rows = hidden_states.flatten(0, 1)
        outputs = []
        parts = list(_groups(lengths, GROUP if rows.device.type == "cpu" else sum(lengths)))
        counts = [sum(part) for part in parts]
        for part, x in zip(parts, rows.index_select(0, places).split(counts), strict=True):
            starts = torch.tensor([0, *part]).cumsum(0).to(rows.device, torch.int32)
            ragged = {
                "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
                "max_length_q": max(part), "max_length_k": max(part),
            }  # fmt: skip
            result = super().forward(x[None], None, **kwargs, **ragged)
            outputs.append(result.last_hidden_state[0])
        y = torch.cat(outputs)
        y = y.new_zeros(rows.shape).index_copy(0, places, y)
        result.last_hidden_state = y.view(hidden_states.shape)
        return result


def _why_padded(encoder, hidden_states, mask, kwargs):
    """Why a batch has to stay padded; None if it need not."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the shapes would depend on the mask's values"
    if encoder.training:
        return "dropout would meet other elements"
    batch, length, _ = hidden_states.shape
    if mask is None or mask.shape != (batch, 1, 1, length) or length == 1:
        return "the mask says more than which positions are padding, or there is none"
    from pyllm.nn import families, huggingface  # what is there for transformers only

    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_hidden_states") is not None:
        return "the keys are not those of this batch"
    if huggingface.recording() or any(kwargs.get(f"output_{x}") for x in ("attentions", _STATES)):
        return "what is recorded within has to have the batch's shape"
    for module in encoder.modules():
        if any(_is_foreign(hook) for hooks in _hooks(module) for hook in hooks.values()):
            return "a hook would be given another shape"
        if families.is_attention(module) and not huggingface.serves(module):
            return "attention is not ours"
    return None


_STATES = "hidden_states"


def _hooks(module):
    return module._forward_hooks, module._forward_pre_hooks


def _is_foreign(hook):
    # transformers leaves its own, which do nothing unless something is recorded.
    return not getattr(hook, "__module__", "").startswith("transformers.")


def _real(mask):
    """``bool [B, S]``: which positions are not padding; None for a mask that weighs them."""
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask
    real = mask == 0
    padding = mask <= torch.finfo(mask.dtype).min / 2
    return real if bool((real | padding).all()) else None


def _groups(lengths, limit):
    """The lengths of consecutive sequences, in lists whose sums reach `limit` at most.

    A longer sequence is a list by itself.
    """
    part, total = [], 0
    for length in lengths:
        if total and length and total + length > limit:
            yield part
            part, total = [], 0
        part.append(length)
        total += length
    yield part


class AddNorm(Swapped):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of each half layer of BERT."""

    @classmethod
    def settings(cls, module):
        _check_norms(module, "LayerNorm")
        return {}

    def forward(self, hidden_states, input_tensor):
        y = self.dropout(self.dense(hidden_states))
        return self.LayerNorm(y, residual=input_tensor)[0]


class DistilBertBlock(Swapped):
    """A layer of DistilBERT with both residual adds in the norms."""

    @classmethod
    def settings(cls, module):
        _check_norms(module, "sa_layer_norm", "output_layer_norm")
        return {}

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        y, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x, _ = self.sa_layer_norm(y, residual=hidden_states)
        return self.output_layer_norm(self.ffn(x), residual=x)[0]


def _check_norms(module, *names):
    for name in names:
        norm = getattr(module, name, None)
        if norm is None or original_class(norm) not in (nn.LayerNorm, LayerNorm):
            raise Unfit(f"expected a LayerNorm {name}")


class T5GatedMLP(Swapped):
    """``wo(activation(wi_0(x)) * wi_1(x))``, of T5 1.1."""

    @classmethod
    def settings(cls, module):
        return {"pyllm_kind": gated_kind(module, "act", "wi_0", "wi_1", "wo")}

    def forward(self, hidden_states):
        y = gated(
            self.pyllm_kind, self.wi_0(hidden_states), self.wi_1(hidden_states),
            backend=self.backend,
        )  # fmt: skip
        weight = getattr(self.wo, "weight", None)  # float32 in half precision models
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            y = y.to(weight.dtype)
        return self.wo(self.dropout(y))
