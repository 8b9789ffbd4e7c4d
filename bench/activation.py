"""The gated activations at the intermediate sizes of models."""

from pyllm import ops

from .case import Case, nbytes


def cases(model, shape, setting):
    """SwiGLU and GEGLU of one token and of a prompt."""
    for rows in (1, 5) if setting.small else (1, 64, 2048):
        for kind in ("silu_mul", "gelu_mul"):
            yield _case(kind, model, rows, shape.intermediate, setting)


def _case(kind, model, rows, width, setting):
    def make():  # the halves of one fused projection
        gate, up = setting.rand(rows, 2 * width).chunk(2, -1)
        return {"gate": gate, "up": up}

    def call(a, backend):
        return getattr(ops, kind)(**a, backend=backend)

    return Case(
        "activation", f"{model}, {kind} {rows} x {width}", make, call,
        3 * nbytes(setting.rand(rows, width)), 20 * rows * width, size=rows,
        options={"kind": kind},
    )  # fmt: skip
