"""What an output head of fewer bits costs in perplexity, and what it gains in speed.

Perplexity is of a text cut into pieces that begin anew. Both heads see the same hidden states, so
their difference is far less uncertain than either: the standard error is of the difference, over
tokens. Decoding with each head takes turns.
"""

import random
import statistics
from pathlib import Path

import torch
from rich.table import Table

from .engines import Pyllm

# The opening of Alice's Adventures in Wonderland (Lewis Carroll, 1865).
TEXT = Path(__file__).parent / "alice.txt"
PIECE = 1024  # tokens


def losses(llm, ids, piece=PIECE) -> torch.Tensor:
    """float64: minus the log-probability of each token but the first of every piece."""
    found = []
    for begin in range(0, len(ids), piece):
        part = ids[begin : begin + piece]
        if len(part) > 1:
            logits, targets = llm.logits(part)[:-1], torch.tensor(part[1:])
            loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
            found.append(loss)
    if not found:
        raise ValueError(f"text: expected at least two tokens, got {len(ids)}")
    return torch.cat(found)


def measure(
    model, *, threads, text=None, head_bits=4, rounds=5, n=64, depth=16, progress=lambda text: None
) -> dict:
    """Perplexity and decoding speed with the file's own head, and with one of `head_bits`.

    Args:
        text: a file; by default the one that is shipped.
        n, depth: tokens decoded, and before them, to time a head.
    """
    path = Path(text or TEXT)
    heads = {"own": Pyllm(), "rounded": Pyllm(head_bits=head_bits)}
    found = {}
    for name, engine in heads.items():
        progress(f"perplexity, {name} head")
        engine.load(model, threads)
        ids = engine.llm.tokenizer.encode(path.read_text(encoding="utf-8"))
        found[name] = losses(engine.llm, ids)
    speeds = {name: [] for name in heads}
    for i in range(-1, rounds):  # round -1 warms up
        progress(f"round {i + 1} of {rounds}: decoding")
        prompt = random.Random(i).choices(range(100, engine.vocab), k=depth)
        for name, engine in heads.items():
            seconds = engine.decode([prompt], n)
            if i >= 0:
                speeds[name].append(n / sum(seconds))
    difference = found["rounded"] - found["own"]
    cost = difference.mean().exp().item()
    weights = {name: engine.llm.model.head.weights[0] for name, engine in heads.items()}
    return {
        "model": Path(model).name, "threads": threads, "rounds": rounds, "text": path.name,
        "tokens": len(difference), "test": f"tg{n}@{depth}",
        "cost": cost - 1,
        "cost_error": cost * difference.std().item() / len(difference) ** 0.5,
        "gain": statistics.median(
            b / a for a, b in zip(speeds["own"], speeds["rounded"], strict=True)
        ) - 1,
        "rows": [
            {
                "head": _describe(weights[name]), "bytes": weights[name].nbytes,
                "perplexity": found[name].mean().exp().item(),
                "tokens_per_second": speeds[name], "median": statistics.median(speeds[name]),
            }
            for name in heads
        ],
    }  # fmt: skip


def _describe(weight):
    bits = getattr(weight, "bits", None)
    return f"{bits} bits" if bits else str(weight.dtype).removeprefix("torch.")


def table(data):
    """The measurement as a rich table."""
    t = Table(title=f"{data['model']}, {data['threads']} threads, {data['tokens']} tokens of text")
    for name in ("head", "MB", "perplexity", f"{data['test']}, tokens/s"):
        t.add_column(name, justify="left" if name == "head" else "right")
    for row in data["rows"]:
        t.add_row(
            row["head"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.3f}",
            f"{row['median']:.1f}",
        )  # fmt: skip
    t.caption = (
        f"perplexity {data['cost']:+.2%} (standard error {data['cost_error']:.2%}), "
        f"decoding {data['gain']:+.1%}"
    )
    return t
