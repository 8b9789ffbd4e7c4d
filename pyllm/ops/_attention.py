"""What `flash_attention` and `paged_attention` share: the formula and the window's two sides."""

import torch

from pyllm import _C

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


def as_bias(seen, dtype):
    """A mask of bool, true where a key is seen, as one that is added to the logits."""
    zeros = torch.zeros_like(seen, dtype=dtype, memory_format=torch.contiguous_format)
    return zeros.masked_fill_(~seen, float("-inf"))


def attend(q, k, v, *, scale, sides, softcap, alibi_slopes, bias, sinks, dtype=None):
    """Attention of one sequence as the formula reads.

    Args:
        q: ``[Sq, H, D]``; k and v ``[Sk, Hkv, D]``; bias ``[H|1, Sq, Sk]`` or None.
        sides: as from `window_sides`.
        dtype: what to compute in; by default float64 for float64 inputs, else float32.

    Returns:
        ``[Sq, H, D]`` and the log-sum-exp ``[Sq, H]``, in `dtype`.
    """
    q, k, v = _widened(dtype, q, k, v)
    logits, _ = _logits(q, k, scale, sides, softcap, alibi_slopes, bias)
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[0], 1)
        logits = torch.cat((logits, sink), -1)
    lse = logits.logsumexp(-1)
    weights = _weights(logits, lse)
    out = torch.einsum("hqk,khd->qhd", weights[..., : k.shape[0]], v)
    return out, lse.transpose(0, 1)


def attend_backward(
    do, q, k, v, out, lse, dlse, *, scale, sides, softcap, alibi_slopes, bias, dtype=None
):
    """The gradients of `attend` by its results.

    Returns:
        ``dq, dk, dv``, the gradient of the logits with bias ``[H, Sq, Sk]``, and ``sum(do * out) -
        dlse`` ``[Sq, H]``, in `dtype`.
    """
    kv_heads = k.shape[1]
    do, q, k, v, out, lse = _widened(dtype, do, q, k, v, out, lse)
    logits, slope = _logits(q, k, scale, sides, softcap, alibi_slopes, bias)
    weights = _weights(logits, lse.transpose(0, 1))
    delta = (do * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dlogits = weights * (torch.einsum("qhd,khd->hqk", do, v) - delta.t()[..., None])
    dproducts = dlogits * slope * scale
    dq = torch.einsum("hqk,khd->qhd", dproducts, k)
    dk = torch.einsum("hqk,qhd->khd", dproducts, q).unflatten(1, (kv_heads, -1)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", weights, do).unflatten(1, (kv_heads, -1)).sum(2)
    return dq, dk, dv, dlogits, delta


def _widened(dtype, *tensors):
    """The tensors in `dtype`, all with as many heads as the first."""
    heads, first = tensors[0].shape[1], tensors[0].dtype
    dtype = dtype or (torch.float64 if first == torch.float64 else torch.float32)
    return [x.to(dtype).repeat_interleave(heads // x.shape[1], dim=1) for x in tensors]


def _logits(q, k, scale, sides, softcap, alibi_slopes, bias):
    """The logits ``[H, Sq, Sk]``, and their derivative by those before the soft cap."""
    logits, slope = torch.einsum("qhd,khd->hqk", q, k) * scale, 1
    if softcap:
        capped = torch.tanh(logits / softcap)
        logits, slope = softcap * capped, 1 - capped.square()
    queries = torch.arange(q.shape[0], device=q.device) + k.shape[0] - q.shape[0]
    distance = queries[:, None] - torch.arange(k.shape[0], device=q.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    if bias is not None:
        logits = logits + bias.to(q.dtype)
    left, right = sides
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return logits.masked_fill(hidden, float("-inf")), slope


def _weights(logits, lse):
    """The softmax; 0 for a query that sees nothing."""
    nothing = (lse == float("-inf"))[..., None]
    return (logits - lse[..., None]).exp().masked_fill(nothing, 0)


def sinks_gradient(sinks, lse, delta):
    """A sink has a weight as a key has, and no value."""
    weights = (sinks - lse).exp().masked_fill(lse == float("-inf"), 0)
    return -(weights * delta).flatten(0, -2).sum(0).to(sinks.dtype)


def expanded(bias, q, k):
    """`bias` as ``[B, H, Sq, Sk]`` without a copy, if it broadcasts to that."""
    if bias is None or q.ndim != 4 or k.ndim != 4:
        return bias
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"flash_attention: bias: expected what broadcasts to {list(shape)}, got "
            f"{list(bias.shape)}"
        ) from None


def check_triton(op, arguments, q, keys, scale, softcap, alibi_slopes, sinks):
    """Raises ValueError for arguments that the Triton kernels cannot take.

    Args:
        arguments: lines of `_C.check` that name the dimensions H, Hkv and D.
        keys: whose last dimensions are Hkv and D.
    """
    f32 = torch.float32
    options = [(alibi_slopes, "alibi_slopes", "H", f32), (sinks, "sinks", "H", f32)]
    _C.check(op, arguments + options)
    heads, kv_heads, dim = q.shape[-2], keys.shape[-2], q.shape[-1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: q: expected a multiple of the {kv_heads} KV heads, got {heads} heads"
        )
    if not 1 <= dim <= 256:
        raise ValueError(f"{op}: q: expected a head dim from 1 to 256, got {dim}")
    if scale != scale or (softcap or 0) < 0:
        raise ValueError(
            f"{op}: scale and softcap: expected numbers, softcap at least 0, got {scale} and "
            f"{softcap}"
        )
