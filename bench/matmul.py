"""`matmul` at the matrices of a model's layer."""

from pyllm import ops

from .case import Case, nbytes


def cases(model, shape, setting):
    """Every matrix of a layer, for one token, a small batch and a prompt."""
    for tokens in (1, 5) if setting.small else (1, 8, 512):
        for name, (n, k) in shape.matrices().items():
            if name == "head" and tokens > 8:
                continue  # only rows that are sampled have logits
            yield _case(model, name, tokens, n, k, setting)


def _case(model, name, tokens, n, k, setting):
    def make():
        return {"x": setting.rand(tokens, k), "weight": setting.rand(n, k, scale=k**-0.5)}

    def call(a, backend):
        return ops.matmul(**a, backend=backend)

    x, y = setting.rand(tokens, k), setting.rand(tokens, n)
    return Case(
        "matmul", f"{model}, {name} {tokens} x {k} x {n}", make, call,
        nbytes(x, y) + n * k * setting.dtype.itemsize, 2 * tokens * n * k, size=tokens,
    )  # fmt: skip
