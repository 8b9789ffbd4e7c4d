"""Where each microsecond of a decoding step goes, by op.

The plan times every kernel with all threads, a barrier after each. The bytes of a matmul are its
weights'. Each kernel's figure is its fastest of several runs, since an interruption only ever adds;
that of the step is their sum.
"""

import random
from collections import defaultdict
from pathlib import Path

from rich.table import Table

from pyllm import _C, LLM
from pyllm.nn import FusedLinear


def measure(model, *, threads=None, depth=512, batch=1, repeats=10) -> dict:
    """Profiles the step that decodes one token of `batch` sequences after `depth` tokens."""
    _C.set_num_threads(threads or _C.num_threads())
    llm = LLM(model)
    rng = random.Random(0)
    ids = [rng.choices(range(100, llm.model.config.vocab_size), k=depth) for _ in range(batch)]
    llm.generate(ids, max_new_tokens=1)
    llm.generate(ids, max_new_tokens=4, ignore_eos=True)
    runs = [llm.engine.profile(batch) for _ in range(repeats)]
    names = [name for name, _ in runs[0]]
    best = [(names[i], min(run[i][1] for run in runs)) for i in range(len(names))]
    ops = defaultdict(lambda: {"count": 0, "microseconds": 0.0, "bytes": 0})
    weights = matmuls(llm.model)
    for name, seconds in best:
        weight = next(weights, None) if name.endswith("matmul") else None
        label = f"{name} {weight.shape[0]} x {weight.shape[1]}" if weight is not None else name
        op = ops[label]
        op["count"] += 1
        op["microseconds"] += seconds * 1e6
        op["bytes"] += weight.nbytes if weight is not None else 0
    return {
        "model": Path(model).name, "threads": _C.num_threads(), "depth": depth, "batch": batch,
        "microseconds": sum(seconds for _, seconds in best) * 1e6,
        "ops": [
            {"op": label, **op}
            for label, op in sorted(ops.items(), key=lambda i: -i[1]["microseconds"])
        ],
    }  # fmt: skip


def matmuls(model):
    """The weights of a model's matmuls in the order in which a step multiplies with them."""
    return (w for m in model.modules() if isinstance(m, FusedLinear) for w in m.weights)


def table(data):
    """The profile as a rich table."""
    t = Table(
        title=f"{data['model']}, {data['threads']} threads, depth {data['depth']}, "
        f"batch {data['batch']}: {data['microseconds']:.0f} µs a step"
    )
    for name in ("op", "count", "µs", "each", "share", "MB", "GB/s"):
        t.add_column(name, justify="left" if name == "op" else "right")
    for op in data["ops"]:
        us, mb = op["microseconds"], op["bytes"] / 1e6
        t.add_row(
            op["op"], str(op["count"]), f"{us:.1f}", f"{us / op['count']:.2f}",
            f"{us / data['microseconds']:.1%}", f"{mb:.2f}" if mb else "",
            f"{op['bytes'] / us / 1e3:.1f}" if mb else "",
        )  # fmt: skip
    return t
