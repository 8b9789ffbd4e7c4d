"""Attention for Hugging Face transformers.

Importing this module registers it, so that models take it by its name::

    import pyllm.nn.huggingface
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pyllm")

`pyllm.patch` does the same for one model that is loaded already.
"""

import copy
import sys
import warnings

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.output_capturing import _active_collector

from pyllm.nn.attend import NAME, attend
from pyllm.nn.swap import original_class
from pyllm.ops import flash_attention
from pyllm.ops._attention import as_bias

MAX_HEAD_SIZE = 256
NOTES = (
    "attention weights (output_attentions) are computed by transformers, with a warning",
    "attention dropout in training is computed by transformers, with a warning",
)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    **kwargs,
):
    """What transformers calls for ``attn_implementation="pyllm"``.

    Args:
        query: ``[B, H, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``.
        attention_mask: ``[B, 1|H, Sq, Sk]``, bool (True: seen) or added to the logits. None: a
            single query sees all keys, others in a causal module those up to their own index.
        position_bias: added to the logits.
        s_aux: ``[H]``, sinks.
        cu_seq_lens_q, cu_seq_lens_k: ``int[N + 1]``, where each of several sequences that lie end
            to end in a batch of one begins, and the total; without a mask and `position_bias`.

    Returns:
        ``([B, Sq, H, D], None)``; with attention weights instead of None where these are wanted.
    """
    if kwargs.get("cache") is not None:
        raise ValueError('attn_implementation="pyllm" does not serve paged caches of transformers')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    ragged = attention_mask is None and position_bias is None and cu_seq_lens_q is not None
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = as_bias(bias, query.dtype)
    if position_bias is not None:
        if causal:
            bias = _causal(query, key, sliding_window)
        bias = position_bias if bias is None else position_bias + bias
    if dropout or _wants_weights(kwargs):
        if bias is None and causal:
            bias = _causal(query, key, sliding_window)
        if ragged:
            apart = as_bias(_same_sequence(cu_seq_lens_q, cu_seq_lens_k), query.dtype)
            bias = apart if bias is None else bias + apart
        return _by_transformers(
            module, query, key, value, bias, dropout=dropout, scaling=scaling, softcap=softcap,
            s_aux=s_aux, **kwargs,
        )  # fmt: skip
    options = {
        "causal": causal, "scale": scaling, "window": sliding_window, "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.float(),
        "backend": getattr(module, "backend", None),
    }  # fmt: skip
    if ragged:
        options["window"] = sliding_window if causal else None
        y = flash_attention(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seqlens_q=cu_seq_lens_q.int(), cu_seqlens_k=cu_seq_lens_k.int(), **options,
        )  # fmt: skip
        return y[None], None
    return attend(query.transpose(1, 2), key, value, bias, **options), None


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    dtype=torch.float32,
    **kwargs,
):
    """The mask that transformers makes for `attention`: float, 0 or -inf, or None.

    None means causal, and within the sliding window of the module where there is one.
    """
    if (
        allow_is_causal_skip
        and local_size is not None
        and not torch.compiler.is_compiling()
        and q_length == kv_length
        and isinstance(q_offset, int)
        and q_offset == kv_offset
        and (attention_mask is None or (attention_mask.ndim == 2 and attention_mask.all()))
    ):
        return None
    if mask_function is bidirectional_mask_function and local_size is None:
        # Padding alone is the same for all queries.
        q_length = 1
    seen = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip
    return None if seen is None else as_bias(seen, dtype)


def recording():
    """Whether transformers keeps what modules return, for its caller."""
    return not torch.compiler.is_compiling() and bool(_active_collector.get())


def serves(module):
    """Whether an attention module of transformers calls `attention`."""
    return module.config._attn_implementation == NAME


def _same_sequence(cu_seq_lens_q, cu_seq_lens_k):
    """``bool [1, 1, Tq, Tk]``: which query and which key are of one sequence."""
    q, k = (
        torch.repeat_interleave(torch.arange(len(x) - 1, device=x.device), x.diff())
        for x in (cu_seq_lens_q, cu_seq_lens_k)
    )
    return (q[:, None] == k)[None, None]


def _causal(query, key, window):
    """The mask that None stands for where a module is causal."""
    row, column = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    distance = row[:, None] - column
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return as_bias(seen[None, None], query.dtype)


def _wants_weights(kwargs):
    if kwargs.get("output_attentions"):
        return True
    # Some models take the argument away before it comes here.
    collector = None if torch.compiler.is_compiling() else _active_collector.get()
    return collector is not None and any("attentions" in key for key in collector)


def _by_transformers(module, query, key, value, bias, dropout, **options):
    """What pyllm's kernel does not do."""
    what = "dropout" if dropout else "attention weights"
    if not torch.compiler.is_compiling():
        warnings.warn(f"pyllm: attention with {what} is computed by transformers", stacklevel=3)
    if bias is not None:
        # A query that sees nothing is to give a number.
        bias = bias.clamp(min=torch.finfo(query.dtype).min)
    options = {name: option for name, option in options.items() if option is not None}
    eager = sys.modules[original_class(module).__module__].eager_attention_forward
    return eager(module, query, key, value, bias, dropout=dropout, **options)


def config_changes(model, chosen):
    """``[(module, "config", its configuration with our attention)]``.

    Modules that share a configuration share its copy. The configurations themselves stay as they
    are: other models may have them.

    Args:
        chosen: configurations by their id.
    """

    def concerned(config):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        return id(config) in chosen or any(id(part) in chosen for part in parts)

    memo, changes = {}, []
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and concerned(config):
            # With the memo, a part of another configuration is that part of its copy.
            changes.append((module, "config", copy.deepcopy(config, memo)))
    for original in chosen:
        memo[original]._attn_implementation_internal = NAME
    return changes


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
