"""`flash_attention` with the heads of models, causal, over whole prompts."""

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
