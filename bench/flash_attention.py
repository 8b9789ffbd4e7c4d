"""`flash_attention` with the heads of models, causal, over whole prompts, and ragged batches."""

import torch

from pyllm import ops

from .case import Case, nbytes


def cases(model, shape, setting):
    """Prompts of several lengths, and a batch of short ones."""
    if setting.small:
        lengths = [(1, 33)]
    elif setting.device == "cpu":
        lengths = [(1, 128), (1, 512), (1, 1024), (8, 128)]
    else:
        lengths = [(16, 512), (8, 1024), (4, 2048), (2, 4096), (1, 8192), (1, 16384)]
    for batch, tokens in lengths:
        yield _case(model, batch, tokens, shape, setting)
    # Lengths of sentences for encoders of two sizes, and of prompts.
    for count, low, high, heads, dim, causal in (
        (64, 5, 128, (12, 12), 32, False),
        (64, 5, 128, (12, 12), 64, False),
        (8, 50, 1000, (shape.heads, shape.kv_heads), shape.head_dim, True),
    ):
        if setting.small:
            count, low, high = 3, 1, 40
        step = (high - low) / (count - 1)
        lengths = [low + round(step * (5 * i % count)) for i in range(count)]  # in no order
        yield _ragged(lengths, heads, dim, causal, setting)


def _ragged(lengths, heads, dim, causal, setting):
    def make():
        q, k, v = (setting.rand(sum(lengths), n, dim) for n in (heads[0], heads[1], heads[1]))
        cu_seqlens = setting.integers([0, *torch.tensor(lengths).cumsum(0).tolist()])
        return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}

    def call(a, backend):
        cu = a["cu_seqlens"]
        return ops.flash_attention(
            a["q"], a["k"], a["v"], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal, backend=backend
        )

    first = make()
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    half = "float32_gflops" if setting.device == "cpu" else "bfloat16_gflops"
    kind = "causal" if causal else "not causal"
    return Case(
        "flash_attention",
        f"{len(lengths)} x {min(lengths)} to {max(lengths)}, {heads[0]} heads of {dim}, {kind}",
        make, call, nbytes(*first.values(), first["q"]), 4 * pairs * heads[0] * dim, half,
        options={"causal": causal, "lengths": lengths},
    )  # fmt: skip


def _case(model, batch, tokens, shape, setting):
    def make():
        q = setting.rand(batch, tokens, shape.heads, shape.head_dim)
        k, v = (setting.rand(batch, tokens, shape.kv_heads, shape.head_dim) for _ in range(2))
        return {"q": q, "k": k, "v": v}

    def call(a, backend):
        return ops.flash_attention(**a, causal=True, backend=backend)

    # The reference makes a matrix of all pairs: of long prompts only that of the last head.
    long = shape.heads * tokens**2 > 1 << 26

    def part_of_result(x):
        return x[-1:, :, -1:] if long else x

    def part(a):
        return {name: part_of_result(x) for name, x in a.items()}

    first = make()
    pairs = batch * tokens * (tokens + 1) // 2
    half = "float32_gflops" if setting.device == "cpu" else "bfloat16_gflops"
    return Case(
        "flash_attention", f"{model}, {batch} x {tokens}, d{shape.head_dim}", make, call,
        nbytes(*first.values(), first["q"]), 4 * pairs * shape.heads * shape.head_dim, half,
        size=tokens, part=part, part_of_result=part_of_result, options={"causal": True},
    )  # fmt: skip
