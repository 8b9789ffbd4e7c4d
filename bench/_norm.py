"""Cases of `rms_norm` and `layer_norm`: rows of hidden size, with and without residual."""

from pyllm import ops

from .case import Case, nbytes


def cases(op, model, shape, setting):
    """Rows of one token, of a batch, and of a prompt."""
    for rows in (1, 5) if setting.small else (1, 64, 2048):
        for residual in (False, True):
            yield _case(op, model, rows, shape.hidden, residual, setting)


def _case(op, model, rows, width, residual, setting):
    def make():
        arguments = {"x": setting.rand(rows, width), "weight": 1 + setting.rand(width, scale=0.1)}
        if op == "layer_norm":
            arguments["bias"] = setting.rand(width, scale=0.1)
        if residual:
            arguments["residual"] = setting.rand(rows, width)
        return arguments

    def call(a, backend):
        return getattr(ops, op)(**a, backend=backend)

    x = setting.rand(rows, width)
    return Case(
        op, f"{model}, {rows} x {width}{', residual' if residual else ''}", make, call,
        nbytes(x) * (4 if residual else 2), 6 * rows * width, size=rows,
    )  # fmt: skip
