"""Prompt processing and text generation of a whole model, in the manner of llama-bench.

``pp512`` is a prompt of 512 tokens, ``tg128`` 128 tokens after a short prompt, ``tg128@512`` the
same after 512 tokens, ``8x tg64@512`` eight sequences at once. Engines take turns within each
round, so that the machine's drift meets all; figures are medians, ratios medians of the rounds'.
"""

import importlib.util
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from bench import limits
from bench.engines import ENGINES, Remote
from pyllm.cli.report import machine
from pyllm.loading import open_checkpoint
from pyllm.models import describe
from pyllm.runtime.cache import cache_nbytes


@dataclass(frozen=True)
class Test:
    """What is measured: tokens per second of `batch` sequences of `n` tokens after `depth`."""

    name: str
    what: str
    n: int
    depth: int = 0
    batch: int = 1


TESTS = [
    Test("pp512", "prefill", 512),
    Test("tg128", "decode", 128, depth=16),
    Test("tg128@512", "decode", 128, depth=512),
    Test("8x tg64@512", "decode", 64, depth=512, batch=8),
]


def measure(model, *, threads, rounds=5, engines=None, tests=TESTS, progress=lambda text: None):
    """Tokens per second ``{engine: {test: [one a round]}}``, and each engine's peak MB."""
    names = engines or [n for n, e in ENGINES.items() if importlib.util.find_spec(e.package)]
    remotes = [Remote(name, model, threads) for name in names]
    try:
        speeds = {r.name: {t.name: [] for t in tests} for r in remotes}
        for i in range(-1, rounds):  # round -1 warms up
            for test in tests:
                for remote in remotes:
                    progress(f"round {i + 1} of {rounds}: {test.name}, {remote.name}")
                    seconds = remote.seconds(
                        what=test.what, n=test.n, depth=test.depth, batch=test.batch,
                        seed=1000 * i + 7,
                    )  # fmt: skip
                    if seconds is not None and i >= 0:
                        speeds[remote.name][test.name].append(test.batch * test.n / seconds)
        return speeds, {r.name: r.peak_mb for r in remotes}
    finally:
        for remote in remotes:
            remote.close()


def ratio(ours, theirs):
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def cost(model, depth):
    """What a token must cost: bytes read to decode one, and int8 operations to prefill one.

    Every weight is read once and so are the keys and values of `depth` tokens; an embedding that is
    not also the head is not, but for one row. A prompt needs the head once, which is left out.
    """
    checkpoint = open_checkpoint(model)
    config = describe(checkpoint)
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2]
    embedding = [t for t in matrices if t.shape[0] == config.vocab_size]
    once = sum(t.nbytes for t in checkpoint.tensors.values())
    if len(embedding) > 1:
        once -= next(t.nbytes for t in embedding if "embd" in t.name or "embed" in t.name)
    cached = cache_nbytes(
        n_layers=config.n_layers, n_tokens=depth, kv_heads=config.n_kv_heads,
        head_dim=config.head_dim, dtype=torch.float16, page_size=1,
    )  # fmt: skip
    inner = sum(math.prod(t.shape) for t in matrices if t not in embedding)
    return once, cached, 2 * inner


def report(model, *, threads, rounds, engines=None, progress=lambda text: None) -> dict:
    """Measures the machine's limits and all engines; returns what is written as JSON."""
    progress("the machine's limits")
    before = limits.measure(threads=threads)
    speeds, peak_mb = measure(
        model, threads=threads, rounds=rounds, engines=engines, progress=progress
    )
    progress("the machine's limits again")
    after = limits.measure(threads=threads)
    rows = []
    for test in TESTS:
        middle = test.depth + test.n // 2
        once, cached, operations = cost(model, middle)
        for engine, by_test in speeds.items():
            runs = by_test[test.name]
            if not runs:
                continue
            median = statistics.median(runs)
            row = {
                "test": test.name, "engine": engine, "tokens_per_second": runs,
                "median": median, "low": min(runs), "high": max(runs),
                "ratio": ratio(speeds["pyllm"][test.name], runs) if "pyllm" in speeds else None,
            }  # fmt: skip
            if test.what == "prefill":
                row["int8_gops"] = operations * median / 1e9
            else:
                row["gb_per_s"] = (once + cached * test.batch) * median / test.batch / 1e9
            rows.append(row)
    return {
        "model": Path(model).name, "threads": threads, "rounds": rounds, "peak_mb": peak_mb,
        "limits": {name: max(before[name], after[name]) for name in before}, "rows": rows,
        "machine": machine(),
    }  # fmt: skip


def table(data: dict):
    """The report as a rich table."""
    bandwidth = data["limits"]["read_gb_per_s"]
    int8 = data["limits"]["int8_gops"]
    t = Table(title=f"{data['model']}, {data['threads']} threads, {data['rounds']} rounds")
    t.add_column("test")
    t.add_column("engine")
    for name in ("tokens/s", "low - high", "pyllm is", "achieved", "of the limit"):
        t.add_column(name, justify="right")
    for row in data["rows"]:
        if "int8_gops" in row:
            achieved, share = f"{row['int8_gops']:.0f} GOP/s", row["int8_gops"] / int8
        else:
            achieved, share = f"{row['gb_per_s']:.1f} GB/s", row["gb_per_s"] / bandwidth
        t.add_row(
            row["test"], row["engine"], f"{row['median']:.1f}",
            f"{row['low']:.1f} - {row['high']:.1f}",
            f"{row['ratio']:.2f} x" if row["engine"] != "pyllm" and row["ratio"] else "",
            achieved, f"{share:.0%}",
        )  # fmt: skip
    t.caption = (
        f"limits measured in this run: read {bandwidth:.1f} GB/s, int8 {int8:.0f} GOP/s; "
        + "peak memory: "
        + ", ".join(f"{name} {mb:.0f} MB" for name, mb in data["peak_mb"].items())
    )
    return t
