"""Prompt processing and text generation of a whole model, in the manner of llama-bench.

``pp512`` is a prompt of 512 tokens, ``tg128`` 128 tokens after a short prompt, ``tg128@512`` the
same after 512 tokens, ``8x tg64@512`` eight sequences at once. Engines take turns within each
round, so that the machine's drift meets all; figures are medians, ratios medians of the rounds'.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from pyllm.loading import open_checkpoint
from pyllm.models import describe
from pyllm.runtime.cache import cache_nbytes

from . import limits
from .engines import Remote, interpreters


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


# The engines that read the file as it is, and so the bytes that `cost` counts.
SAME_BYTES = ("pyllm", "llama.cpp")
SLOW = 6
# Decoding at several depths.
DEPTHS = [Test(f"tg32@{d}", "decode", 32, depth=d) for d in (16, 256, 512, 1024, 1900)]


def measure(
    model, *, threads, rounds=5, minutes=None, engines=None, other=None, tests=TESTS,
    progress=lambda text: None,
):  # fmt: skip
    """Runs the tests in rounds, after one to warm up.

    Args:
        rounds: at most; fewer, but one at least, when `minutes` are over. An engine that takes
            `SLOW` times as long as the quickest is timed in the first only, so that the others get
            more of them.
        engines, other: see `engines.interpreters`.

    Returns:
        Tokens per second ``{engine: {test: [one a round]}}``, the machine's limits (medians of
        the rounds, like the speeds), each engine's peak MB, and why an engine is absent
        ``{engine: reason}``.
    """
    found, missing = interpreters(engines, other)
    absent = dict.fromkeys(missing, "not installed")
    begin = time.monotonic()
    remotes = []
    for name, python in found.items():
        progress(f"loading {name}")
        try:
            remotes.append(Remote(name, model, threads, python))
        except RuntimeError as error:
            absent[name] = str(error)
    try:
        speeds = {r.name: {t.name: [] for t in tests} for r in remotes}
        taking_part, found_limits = remotes, []
        for i in range(-1, rounds):  # round -1 warms up
            progress("the machine's limits")
            found_limits.append(limits.measure(threads=threads))
            took = dict.fromkeys(taking_part, 0.0)
            for test in tests:
                # An eighth of the tokens warms up as well.
                n = test.n if i >= 0 or test.what == "prefill" else -(-test.n // 8)
                for remote in taking_part:
                    progress(f"round {i + 1} of {rounds}: {test.name}, {remote.name}")
                    seconds = remote.seconds(
                        what=test.what, n=n, depth=test.depth, batch=test.batch,
                        seed=1000 * i + 7,
                    )  # fmt: skip
                    if seconds is not None:
                        took[remote] += sum(seconds)
                        if i >= 0:
                            speed = test.batch * test.n / sum(seconds)
                            speeds[remote.name][test.name].append(speed)
            if i >= 0:
                taking_part = [r for r in taking_part if took[r] <= SLOW * min(took.values())]
            next_round = 1.2 * sum(took[r] for r in taking_part)  # there is more than what is timed
            if i >= 0 and minutes and time.monotonic() - begin + next_round > 60 * minutes:
                break
        limit = {k: statistics.median(f[k] for f in found_limits) for k in found_limits[0]}
        return speeds, limit, {r.name: r.peak_mb for r in remotes}, absent
    finally:
        for remote in remotes:
            remote.close()


def ratio(ours, theirs):
    """Median of the ratios of the rounds in which both took part, which are the first."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


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


def report(model, *, threads, tests=TESTS, progress=lambda text: None, **options) -> dict:
    """Measures all engines; returns what is written as JSON.

    Args:
        options: of `measure`.
    """
    speeds, limit, peak_mb, absent = measure(
        model, threads=threads, tests=tests, progress=progress, **options
    )
    rows = []
    for test in tests:
        middle = test.depth + test.n // 2
        once, cached, operations = cost(model, middle)
        for engine, by_test in speeds.items():
            runs = by_test[test.name]
            if not runs:
                continue
            median = statistics.median(runs)
            row = {
                "test": test.name, "depth": test.depth, "engine": engine,
                "tokens_per_second": runs, "median": median, "low": min(runs), "high": max(runs),
                "ratio": ratio(speeds["pyllm"][test.name], runs) if "pyllm" in speeds else None,
            }  # fmt: skip
            if test.what == "prefill":
                row["int8_gops"] = operations * median / 1e9
            elif engine in SAME_BYTES:
                row["gb_per_s"] = (once + cached * test.batch) * median / test.batch / 1e9
            rows.append(row)
    return {
        "model": Path(model).name, "threads": threads, "peak_mb": peak_mb, "absent": absent,
        "rounds": max((len(row["tokens_per_second"]) for row in rows), default=0),
        "limits": limit, "rows": rows,
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
        achieved, share = "", None
        if "int8_gops" in row:
            achieved, share = f"{row['int8_gops']:.0f} GOP/s", row["int8_gops"] / (int8 or math.nan)
        elif "gb_per_s" in row:
            achieved, share = f"{row['gb_per_s']:.1f} GB/s", row["gb_per_s"] / bandwidth
        t.add_row(
            row["test"], row["engine"], f"{row['median']:.1f}",
            f"{row['low']:.1f} - {row['high']:.1f}",
            f"{row['ratio']:.2f} x" if row["engine"] != "pyllm" and row["ratio"] else "",
            achieved, f"{share:.0%}" if share and math.isfinite(share) else "",
        )  # fmt: skip
    t.caption = (
        f"limits measured in this run: read {bandwidth:.1f} GB/s, int8 {int8:.0f} GOP/s; "
        + "peak memory: "
        + ", ".join(f"{name} {mb:.0f} MB" for name, mb in data["peak_mb"].items())
    )
    if data["absent"]:
        t.caption += "; absent: " + ", ".join(data["absent"])
    return t
