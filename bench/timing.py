"""Timing of calls that take turns.

Every round times each contender once, in another order each time, so that the machine's drift meets
all; what is reported is the median with the 10th and 90th percentile, and ratios are medians of the
rounds' ratios. On a CUDA device a contender's calls are captured into a CUDA graph, so that the
kernels are timed and not Python; what Python and the launch add is timed apart.
"""

import gc
import random
import statistics
import time
from dataclasses import dataclass, field

import torch

SHORTEST = 2e-3  # seconds of one measurement: shorter ones are repeated
# A ratio whose rounds differ by more than this (10th to 90th percentile, over the median) is noise.
MEANINGLESS = 0.3


@dataclass
class Times:
    """Seconds per call, a round each.

    Attributes:
        eager: on CUDA, seconds of one call with Python and the launch; else None.
    """

    rounds: list[float] = field(default_factory=list)
    eager: float | None = None

    def summary(self) -> dict:
        low, high = deciles(self.rounds)
        return {
            "seconds": statistics.median(self.rounds), "low": low, "high": high,
            "rounds": len(self.rounds), "drift": _drift(self.rounds), "eager_seconds": self.eager,
        }  # fmt: skip


def measure(contenders: dict[str, list], *, device, rounds, progress=lambda: None):
    """Times each contender: a list of calls that do the same on different data.

    Returns:
        `Times` by contender.
    """
    timers = {name: _TIMERS[device](calls) for name, calls in contenders.items()}
    times = {name: Times() for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    collects = gc.isenabled()
    gc.disable()
    try:
        for timer in timers.values():
            timer()
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                times[name].rounds.append(timers[name]())
            progress()
    finally:
        if collects:
            gc.enable()
    for name, timer in timers.items():
        times[name].eager = timer.eager()
    return times


def ratio(ours: Times, other: Times) -> dict:
    """How many times as long the other takes: median of the rounds, percentiles, and whether they
    agree well enough to say it."""
    rounds = [b / a for a, b in zip(ours.rounds, other.rounds, strict=True)]
    median, (low, high) = statistics.median(rounds), deciles(rounds)
    means = len(rounds) > 1 and (high - low) / median <= MEANINGLESS
    return {"ratio": median, "ratio_low": low, "ratio_high": high, "meaningful": means}


def deciles(values) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    parts = statistics.quantiles(values, n=10, method="inclusive")
    return parts[0], parts[-1]


def _drift(values) -> float:
    """The later half's median over the earlier half's: a machine that grows hot or busy."""
    half = len(values) // 2
    return statistics.median(values[half:]) / statistics.median(values[:half]) if half else 1.0


class _CpuTimer:
    def __init__(self, calls):
        self.calls = calls
        self._once()
        self.repeats = max(1, round(SHORTEST / max(self._once(), 1e-9)))

    def _once(self):
        begin = time.perf_counter()
        for call in self.calls:
            call()
        return time.perf_counter() - begin

    def __call__(self):
        self._once()  # the threads of the contender before may still be spinning
        begin = time.perf_counter()
        for _ in range(self.repeats):
            for call in self.calls:
                call()
        return (time.perf_counter() - begin) / (self.repeats * len(self.calls))

    def eager(self):
        return None


class _CudaTimer:
    """Calls in a CUDA graph; a contender that cannot be captured is timed as it is called."""

    def __init__(self, calls):
        self.calls = calls
        for _ in range(3):
            self._all()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._all()
            self.run = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
            self.run = self._all
        self.repeats = 1
        self.repeats = max(1, round(SHORTEST / (self() * len(calls))))

    def _all(self):
        for call in self.calls:
            call()

    def __call__(self):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.repeats):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (self.repeats * len(self.calls))

    def eager(self):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._all()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / len(self.calls)


_TIMERS = {"cpu": _CpuTimer, "cuda": _CudaTimer}
