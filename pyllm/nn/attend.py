"""Attention over keys and values as caches of transformers hold them."""

import torch

from pyllm.ops import flash_attention
from pyllm.ops._attention import as_bias

# As transformers knows it.
NAME = "pyllm"


def attend(
    q, keys, values, mask, *, causal, scale, window=None, softcap=None, sinks=None, backend=None
):
    """The heads' results.

    Args:
        q: ``[B, Sq, H, D]``.
        keys, values: ``[B, Hkv, Sk, D]``.
        mask: ``[B|1, H|1, Sq, Sk]``, bool (True: seen) or added to the logits. None: a single query
            sees all keys, and so do more of them unless `causal`: then each sees those up to its
            own index, within `window`.

    Returns:
        ``[B, Sq, H, D]``.
    """
    queries = q.shape[1]
    causal = mask is None and causal and queries > 1
    if causal and keys.shape[2] > queries:
        # The first tokens in a static cache: what lies behind them was not written yet.
        keys, values = keys[:, :, :queries], values[:, :, :queries]
    if mask is not None and mask.dtype == torch.bool:
        mask = as_bias(mask, q.dtype)
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return flash_attention(
        q, keys.transpose(1, 2), values.transpose(1, 2), causal=causal, scale=scale,
        window=window if causal else None, softcap=softcap, bias=mask, sinks=sinks,
        backend=backend,
    )  # fmt: skip
