"""Prompt processing and text generation of a whole model, in the manner of llama-bench.

``pp512`` is a prompt of 512 tokens, ``tg128`` 128 tokens after a short prompt, ``tg128@512`` the
same after 512 tokens, ``8x tg64@512`` eight sequences at once. Engines take turns within each round,
so that the machine's drift meets all of them; figures are medians, ratios medians of the rounds'.
"""

import importlib.util
import statistics
from dataclasses import dataclass

from bench.engines import ENGINES, Remote


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
    """Tokens per second ``{engine: {test: [one a round]}}``, and each engine's peak memory in MB."""
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
