"""`rope_cache` with the heads of models: rotating, and writing into the paged cache."""

import torch

from pyllm import ops
from pyllm.nn import rotary_table

from .case import Case

PAGE = 32


def cases(model, shape, setting):
    """One token, and a prompt."""
    for tokens in (1, 5) if setting.small else (1, 512):
        yield _case(model, tokens, shape, setting)


def _case(model, tokens, shape, setting):
    pages, past = -(-tokens // PAGE) + 1, 7
    cache_dtype = torch.float16 if setting.device == "cpu" else setting.dtype
    size = (pages, PAGE, shape.kv_heads, shape.head_dim)
    positions = setting.integers(range(past, past + tokens))
    table = torch.randperm(pages).int()[None].to(setting.device)
    fixed = {
        "cos_sin": rotary_table(shape.head_dim, past + tokens, 10000.0).to(setting.device),
        "positions": positions, "cu_seqlens_q": setting.integers([0, tokens]), "page_table": table,
    }  # fmt: skip

    def make():
        heads = shape.heads + 2 * shape.kv_heads
        qkv = setting.rand(tokens, heads, shape.head_dim)  # one fused projection
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        caches = {n: torch.zeros(size, dtype=cache_dtype, device=q.device) for n in _CACHES}
        return {"q": q, "k": k, "v": v, **caches, **fixed}

    def call(a, backend):
        return ops.rope_cache(**a, backend=backend)

    moved = tokens * shape.head_dim * (
        (2 * shape.heads + 2 * shape.kv_heads) * setting.dtype.itemsize
        + 2 * shape.kv_heads * cache_dtype.itemsize
    )  # fmt: skip
    slots = table[0, positions.long() // PAGE].long() * PAGE + positions.long() % PAGE
    return Case(
        "rope_cache", f"{model}, {tokens} tokens", make, call, moved,
        6 * tokens * shape.head_dim * (shape.heads + shape.kv_heads), size=tokens,
        options={"slots": slots},
    )  # fmt: skip


_CACHES = ("k_cache", "v_cache")
