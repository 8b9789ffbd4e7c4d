"""Decoding while another process keeps a core busy, beside the same engine on a quiet machine."""

import contextlib
import statistics
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from .engines import Remote, interpreters

ENGINES = ("pyllm", "llama.cpp")


@contextlib.contextmanager
def busy_core():
    """Another process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(model, *, threads, rounds=5, n=128, depth=16, progress=lambda text: None) -> dict:
    """Seconds of every decoded token, quiet and busy in turns."""
    found, missing = interpreters(ENGINES)
    remotes = [Remote(name, model, threads, python) for name, python in found.items()]
    conditions = {"quiet": contextlib.nullcontext, "busy": busy_core}
    tokens = {(r.name, c): [] for r in remotes for c in conditions}
    try:
        for i in range(-1, rounds):  # round -1 warms up
            for remote in remotes:
                for condition, company in conditions.items():
                    progress(f"round {i + 1} of {rounds}: {remote.name}, {condition}")
                    with company():
                        seconds = remote.seconds(what="decode", n=n, depth=depth, seed=i + 1)
                    if i >= 0:
                        tokens[remote.name, condition].append(seconds)
    finally:
        for remote in remotes:
            remote.close()
    rows = []
    for (engine, condition), runs in tokens.items():
        every = sorted(s for run in runs for s in run)
        median = statistics.median(every)
        rates = [len(run) / sum(run) for run in runs]
        quiet = [len(run) / sum(run) for run in tokens[engine, "quiet"]]
        rows.append(
            {
                "engine": engine, "condition": condition, "tokens_per_second": rates,
                "median": statistics.median(rates),
                "of_quiet": statistics.median(a / b for a, b in zip(rates, quiet, strict=True)),
                "token_median_ms": median * 1e3,
                "token_p99_ms": every[min(len(every) - 1, int(0.99 * len(every)))] * 1e3,
                "token_max_ms": every[-1] * 1e3, "max_over_median": every[-1] / median,
            }
        )  # fmt: skip
    return {
        "model": Path(model).name, "threads": threads, "rounds": rounds, "rows": rows,
        "absent": dict.fromkeys(missing, "not installed"),
    }  # fmt: skip


def table(data):
    """The measurement as a rich table."""
    t = Table(title=f"{data['model']}, {data['threads']} threads, {data['rounds']} rounds")
    t.add_column("engine")
    t.add_column("machine")
    for name in ("tokens/s", "of quiet", "token: median ms", "p99", "max", "max / median"):
        t.add_column(name, justify="right")
    for row in data["rows"]:
        t.add_row(
            row["engine"], row["condition"], f"{row['median']:.1f}", f"{row['of_quiet']:.0%}",
            *(f"{row[f'token_{what}_ms']:.2f}" for what in ("median", "p99", "max")),
            f"{row['max_over_median']:.1f}",
        )  # fmt: skip
    return t
