"""What `flash_attention` and `paged_attention` share: the formula and the window's two sides."""

import torch


def window_sides(window, causal: bool) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own; -1 for no limit."""
    left = right = -1
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window: expected at least 1 key, got {window}")
        left = window - 1
    elif window is not None:
        try:
            left, right = (int(side) for side in window)
        except (TypeError, ValueError):
            raise ValueError(f"window: expected an int or (left, right), got {window!r}") from None
    return left, min(right, 0) if causal and right >= 0 else 0 if causal else right


def attend(q, k, v, *, scale, sides, softcap, alibi_slopes, bias, sinks, dtype=None):
    """Attention of one sequence as the formula reads.

    Args:
        q: ``[Sq, H, D]``; k and v ``[Sk, Hkv, D]``; bias ``[H|1, Sq, Sk]`` or None.
        sides: as from `window_sides`.
        dtype: what to compute in; by default float64 for float64 inputs, else float32.

    Returns:
        ``[Sq, H, D]`` and the log-sum-exp ``[Sq, H]``, in `dtype`.
    """
    dtype = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    queries = torch.arange(q.shape[0], device=q.device) + k.shape[0] - q.shape[0]
    distance = queries[:, None] - torch.arange(k.shape[0], device=q.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    if bias is not None:
        logits = logits + bias.to(dtype)
    left, right = sides
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(-1, q.shape[0], 1)
        logits = torch.cat((logits, sink), -1)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill((lse == float("-inf"))[..., None], 0)
    out = torch.einsum("hqk,khd->qhd", weights[..., : k.shape[0]], v)
    return out, lse.transpose(0, 1)
