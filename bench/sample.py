"""`sample` over the vocabularies of models: greedy, and with top-k, top-p and a temperature."""

import torch

from pyllm import ops
from pyllm.testing import EPS

from .case import Case

TOP_K, TOP_P, TEMPERATURE = 40, 0.95, 0.8


def cases(model, shape, setting):
    """One row of logits, and a batch."""
    for rows in (1, 3) if setting.small else (1, 32):
        for greedy in (True, False):
            yield _case(model, rows, shape.vocab, greedy, setting)


def _case(model, rows, vocab, greedy, setting):
    def full(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype, device=setting.device)

    def make():
        logits = setting.rand(rows, vocab, dtype=torch.float32, scale=3.0)
        if greedy:
            return {"logits": logits}
        return {
            "logits": logits, "temperature": full(TEMPERATURE), "top_p": full(TOP_P),
            "top_k": full(TOP_K, torch.int32), "seed": full(1, torch.int64),
            "position": full(7, torch.int32),
        }  # fmt: skip

    def call(a, backend):
        return ops.sample(**a, backend=backend)

    how = "greedy" if greedy else f"top-k {TOP_K}, top-p {TOP_P}"
    return Case(
        "sample", f"{model}, {rows} x {vocab}, {how}", make, call, 4 * rows * vocab,
        22 * rows * vocab, size=rows,
        # A log-probability is a logit less the logarithm of the sum, each rounded.
        floor=lambda a: EPS[torch.float32] * a["logits"].abs().max().item(),
        options={"greedy": greedy, "top_k": TOP_K, "top_p": TOP_P, "temperature": TEMPERATURE},
    )  # fmt: skip
