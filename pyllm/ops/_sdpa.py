"""`flash_attention` as PyTorch calls it."""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from pyllm import _C
from pyllm.ops._attention import FLOATS, as_bias
from pyllm.ops.flash_attention import flash_attention

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, *, backend=None,
):  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` by `flash_attention`.

    Signature and results are PyTorch's: leading dimensions broadcast, `is_causal` is aligned to the
    first query, and a query that sees no key gives 0. Other than there, a value that no query sees
    cannot make a result NaN. What `flash_attention` cannot do, PyTorch does, with a warning that
    says why: dropout, values of another width than keys, widths over 256, float64.

    Args:
        query: ``[..., H, L, E]`` float32, bfloat16 or float16, as all; there may be no H.
        key, value: ``[..., H, S, E]``.
        attn_mask: broadcasts to ``[..., H, L, S]``: bool, true where a key is seen, or a float that
            is added, float32 or of query's dtype.
        dropout_p: the probability of dropping a weight.
        is_causal: query i sees keys ``j <= i``; with a mask, those of them that it lets through.
        scale: by default ``1 / sqrt(E)``.
        enable_gqa: whether key and value may have fewer heads, a divisor of H each.

    Returns:
        ``[..., H, L, E]`` like `query`, or what the leading dimensions broadcast to.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, and for nested or sparse tensors.
            Also, where a `backend` is named, for what would be left to PyTorch.
        BackendError: if `backend` cannot serve.
    """
    plain = dropout_p == 0 and not is_dynamo_compiling()
    if plain and _C.route(backend, query, key, value, attn_mask) == _C.PLAIN:
        out = _C.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal, scale, enable_gqa
        )
        if out is not None:
            return out
    tensors = {"query": query, "key": key, "value": value}
    _check(tensors, attn_mask)
    if why := _why_not(query, key, value, dropout_p):
        if backend is not None:
            raise ValueError(f"{_NAME}: backend {backend!r} was asked for, but {why}")
        if not is_dynamo_compiling():
            warnings.warn(f"{_NAME}: PyTorch's own serves: {why}", stacklevel=2)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    heads = query.ndim > 2 or key.ndim > 2 or value.ndim > 2
    if not heads or min(query.ndim, key.ndim, value.ndim) < 3:
        query, key, value = (x if x.ndim > 2 else x.unsqueeze(0) for x in (query, key, value))
    batch = _broadcast(tensors, query.shape[:-3], key.shape[:-3], value.shape[:-3])
    n_heads, kv_heads = _heads(query, key, value, enable_gqa)
    (n, dim), keys = query.shape[-2:], key.shape[-2]

    count = math.prod(batch)

    def dense(x, heads):  # [B, S, H, D]
        if x.shape[:-2] != (*batch, heads):
            x = x.expand(*batch, heads, *x.shape[-2:])
        x = x if len(batch) == 1 else x.reshape(count, heads, *x.shape[-2:])
        x = x.transpose(1, 2)
        return x if x.stride(-1) == 1 else x.contiguous()

    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (x.repeat_interleave(n_heads // x.shape[-3], -3) for x in (key, value))
    q, k, v = dense(query, n_heads), dense(key, kv_heads), dense(value, kv_heads)
    bias = None if attn_mask is None else _bias(attn_mask, query.dtype, batch, count, keys)
    window = None
    if is_causal and n < keys:  # the last keys are seen by nobody
        k, v = k[:, :n], v[:, :n]
        bias = bias if bias is None else bias[..., :n]
    elif is_causal and n > keys:  # the last queries see all
        is_causal, window = False, (-1, n - keys)
    out = flash_attention(
        q, k, v, causal=is_causal, scale=scale, window=window, bias=bias, backend=backend
    )
    out = out.transpose(1, 2)
    out = out if len(batch) == 1 else out.reshape(*batch, n_heads, n, dim)
    return out if heads else out.squeeze(0)


def _check(tensors, mask):
    for name, x in tensors.items():
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested" if x.is_nested else f"a {x.layout}"
            raise ValueError(f"{_NAME}: {name}: expected a dense tensor, got {kind} one")
        if x.ndim < 2:
            raise ValueError(f"{_NAME}: {name}: expected [..., H, S, E], got {list(x.shape)}")
    query, key, value = tensors.values()
    if key.shape[-2] != value.shape[-2] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{_NAME}: expected query [..., L, E], key [..., S, E] and value [..., S, Ev], got "
            + ", ".join(str(list(x.shape)) for x in tensors.values())
        )
    if not query.dtype == key.dtype == value.dtype and not _autocast(query):
        raise ValueError(
            f"{_NAME}: expected query, key and value of one dtype, got "
            + ", ".join(str(x.dtype) for x in tensors.values())
        )
    floats = (torch.bool, torch.float32, query.dtype)
    if mask is not None and mask.dtype not in floats and not _autocast(query):
        raise ValueError(
            f"{_NAME}: attn_mask: expected bool, float32 or {query.dtype}, got {mask.dtype}"
        )
    if mask is not None and mask.ndim < 2:
        raise ValueError(f"{_NAME}: attn_mask: expected [..., L, S], got {list(mask.shape)}")


def _autocast(x):
    return torch.is_autocast_enabled(x.device.type)


def _why_not(query, key, value, dropout_p):
    """Why `flash_attention` cannot serve, or None if it can."""
    if dropout_p > 0:
        return f"dropout_p is {dropout_p}"
    if value.shape[-1] != query.shape[-1]:
        return f"value has another width than query, {value.shape[-1]} and {query.shape[-1]}"
    if not 1 <= query.shape[-1] <= 256:
        return f"query is {query.shape[-1]} wide, not 1 to 256"
    if query.dtype not in FLOATS:
        return f"query is {query.dtype}"
    return None


def _broadcast(tensors, *shapes):
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: expected leading dimensions that broadcast, got "
            + ", ".join(str(list(x.shape)) for x in tensors.values())
        ) from None


def _heads(query, key, value, enable_gqa):
    """How many heads query, and key and value, have once they are broadcast."""
    q, k, v = query.shape[-3], key.shape[-3], value.shape[-3]
    if q == k == v and k:
        return q, q
    if enable_gqa:
        if k < 1 or v < 1 or q % k or q % v:
            raise ValueError(
                f"{_NAME}: enable_gqa: expected divisors of the {q} heads of query, got {k} and {v}"
            )
        return q, k if k == v else q
    n = max(q, k, v)
    if any(heads not in (1, n) for heads in (q, k, v)):
        raise ValueError(
            f"{_NAME}: expected as many heads of query, key and value, or 1; got {q}, {k} and {v}"
        )
    return n, max(k, v)


def _bias(mask, dtype, batch, count, keys):
    """`mask` as ``[B|1, H|1, L|1, S]`` to add to the logits."""
    if mask.dtype == torch.bool:
        mask = as_bias(mask, dtype)
    mask = mask[(None,) * max(0, 3 - mask.ndim)]
    leading = mask.shape[:-3]
    if all(size == 1 for size in leading):
        mask = mask.reshape(1, *mask.shape[-3:])
    else:
        mask = mask.expand(*batch, *mask.shape[-3:]).reshape(count, *mask.shape[-3:])
    if mask.shape[-1] != keys or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    return mask


class sdpa(TorchFunctionMode):
    """Within ``with pyllm.sdpa():`` this thread's `F.scaled_dot_product_attention` is pyllm's.

    Every call of PyTorch in the block passes through Python, which takes it a microsecond or two.

    Args:
        backend: which one serves; see `pyllm.ops.registry`.
    """

    def __init__(self, backend=None):
        super().__init__()
        self._attention = functools.partial(scaled_dot_product_attention, backend=backend)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = self._attention
        return function(*args, **(kwargs or {}))
