"""`paged_attention` with the heads of models: decoding at several depths and batch sizes."""

import torch

from pyllm import ops

from .case import Case

PAGE = 32


def cases(model, shape, setting):
    """One token for each sequence of a batch, and one prompt."""
    if setting.small:
        runs = [(2, 1, 40)]
    elif setting.device == "cpu":
        runs = [(1, 1, 512), (1, 1, 2048), (8, 1, 512), (1, 512, 512)]
    else:
        runs = [(1, 1, 2048), (1, 1, 8192), (1, 1, 32768), (16, 1, 8192), (64, 1, 2048)]
    for batch, new, keys in runs:
        yield _case(model, batch, new, keys, shape, setting)


def _case(model, batch, new, keys, shape, setting):
    pages = -(-keys // PAGE)
    cache_dtype = torch.float16 if setting.device == "cpu" else setting.dtype
    order = torch.randperm(batch * pages).int().view(batch, pages).to(setting.device)
    tables = {
        "cu_seqlens_q": setting.integers(range(0, batch * new + 1, new)),
        "page_table": order,
        "context_lens": setting.integers([keys] * batch),
    }
    size = (batch * pages, PAGE, shape.kv_heads, shape.head_dim)

    def make():
        return {
            "q": setting.rand(batch * new, shape.heads, shape.head_dim),
            "k_cache": setting.rand(*size, dtype=cache_dtype),
            "v_cache": setting.rand(*size, dtype=cache_dtype), **tables,
        }  # fmt: skip

    def call(a, backend):
        return ops.paged_attention(**a, backend=backend)

    seen = batch * sum(range(keys - new + 1, keys + 1))
    cache = 2 * batch * keys * shape.kv_heads * shape.head_dim * cache_dtype.itemsize
    queries = 2 * batch * new * shape.heads * shape.head_dim * setting.dtype.itemsize
    arithmetic = "float32_gflops" if setting.device == "cpu" else "bfloat16_gflops"
    what = f"{batch} x {new} after {keys - new}, d{shape.head_dim}"
    return Case(
        "paged_attention", f"{model}, {what}", make, call, cache + queries,
        4 * seen * shape.heads * shape.head_dim, arithmetic, size=keys,
        options={"batch": batch, "keys": keys},
    )  # fmt: skip
