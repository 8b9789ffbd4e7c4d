"""Two results of ``pyllm bench kernels`` or ``end_to_end``, case by case.

What is compared are ratios to a baseline that was measured in the same rounds: they mean the same
on a machine that is warmer, busier or another one. Times are compared only if one asks for it, and
only those of one device.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from . import timing

OURS = "pyllm"
# What the figures depend on, as people call it: what of a result's environment says it.
ENVIRONMENT = {
    "processor": lambda e: e["machine"]["processor"],
    "instruction set": lambda e: next(
        (n for n, use in e["machine"]["instruction sets"].items() if use == "in use"), None
    ),
    "GPU": lambda e: (e.get("gpu") or {}).get("name"),
    "CUDA": lambda e: (e.get("gpu") or {}).get("cuda"),
    "threads": lambda e: e["threads"],
    "python": lambda e: e["machine"]["python"],
    "commit": lambda e: e["commit"],
    "date": lambda e: e["date"],
}
# What makes two machines one device kind.
DEVICE = {"cpu": ("processor", "instruction set", "threads"), "cuda": ("GPU",)}


class Ratio(NamedTuple):
    """How many times as long a baseline takes: a median and the spread of its rounds."""

    median: float
    low: float
    high: float
    meaningful: bool = True

    @property
    def spread(self) -> float:
        """Half of what lies between the 10th and the 90th percentile, as part of the median."""
        return (self.high - self.low) / 2 / self.median


class Result(NamedTuple):
    """A file.

    Attributes:
        ratios: ``{case: {baseline: Ratio}}``.
        seconds: ``{case: (median, low, high)}`` of ours, per call or per token.
        about: what has to be equal for its cases to be the same: kind, device, dtype, model.
    """

    name: str
    ratios: dict
    seconds: dict
    about: dict
    environment: dict

    @property
    def device(self) -> str:
        """The device kind, in words."""
        names = DEVICE[self.about.get("device", "cpu")]
        return ", ".join(f"{name} {ENVIRONMENT[name](self.environment)}" for name in names)


def read(path) -> Result:
    """A result of `kernels` or of `end_to_end` as they write it.

    Raises:
        ValueError: where it is of something else.
    """
    path = Path(path)
    data = json.loads(path.read_text())
    if data.get("kind") == "kernels":
        ratios, seconds = _kernels(data["rows"])
        about = {name: data[name] for name in ("kind", "device", "dtype")}
    elif "tokens_per_second" in next(iter(data.get("rows", [])), {}):
        ratios, seconds = _end_to_end(data["rows"])
        about = {"kind": "end_to_end", "model": data["model"]}
    else:
        raise ValueError(f"{path}: expected a result of `pyllm bench kernels` or `end_to_end`")
    return Result(str(path), ratios, seconds, about, data["environment"])


def _kernels(rows):
    ratios, seconds = {}, {}
    for row in rows:
        case = f"{row['op']}, {row['shape']}"
        if row.get("asked"):  # a backend that is not the default one
            case += f", {row['backend']}"
        seconds[case] = row["seconds"], row["low"], row["high"]
        ratios[case] = {
            name: Ratio(b["ratio"], b["ratio_low"], b["ratio_high"], b["meaningful"])
            for name, b in row["baselines"].items()
        }
    return ratios, seconds


def _end_to_end(rows):
    ratios, seconds = {}, {}
    ours = {r["test"]: r["tokens_per_second"] for r in rows if r["engine"] == OURS}
    for test, speeds in ours.items():
        seconds[test] = tuple(1 / n for n in (statistics.median(speeds), max(speeds), min(speeds)))
        ratios[test] = {}
        for row in rows:
            if row["test"] == test and row["engine"] != OURS:
                # An engine that is slow takes part in the first rounds only.
                rounds = [a / b for a, b in zip(speeds, row["tokens_per_second"], strict=False)]
                median, (low, high) = statistics.median(rounds), timing.deciles(rounds)
                sure = len(rounds) > 1 and (high - low) / median <= timing.MEANINGLESS
                ratios[test][row["engine"]] = Ratio(median, low, high, sure)
    return ratios, seconds


def changes(a: Result, b: Result, absolute=False) -> list[dict]:
    """One row a case and baseline that both have: ``change`` is how many times as fast `b` is, and
    ``certain`` whether that is more than the spreads of both.

    Args:
        absolute: compare times instead, in rows whose baseline is None.

    Raises:
        ValueError: for results of different things, and for times on different devices.
    """
    if a.about != b.about:
        raise ValueError(f"expected two results of the same, got {_about(a)} and {_about(b)}")
    if absolute and a.device != b.device:
        raise ValueError(
            f"--absolute: expected results of one device, got {a.device} and {b.device}"
        )
    rows = []
    for case in [c for c in a.ratios if c in b.ratios]:
        if absolute:
            pairs = {None: (_reversed(a.seconds[case]), _reversed(b.seconds[case]))}
        else:
            both = [name for name in a.ratios[case] if name in b.ratios[case]]
            pairs = {name: (a.ratios[case][name], b.ratios[case][name]) for name in both}
        for name, (old, new) in pairs.items():
            change = new.median / old.median
            certain = old.meaningful and new.meaningful and abs(change - 1) > margin(old, new)
            rows.append({
                "case": case, "baseline": name, "a": old, "b": new, "change": change,
                "certain": certain,
            })  # fmt: skip
    return rows


def margin(old: Ratio, new: Ratio) -> float:
    """By how much two medians may differ without its meaning anything: both spreads together."""
    return old.spread + new.spread


def _reversed(seconds):
    """Calls per second, so that more is better as it is of ratios."""
    median, low, high = seconds
    return Ratio(1 / median, 1 / high, 1 / low)


def _about(result):
    return f"{result.name} ({', '.join(map(str, result.about.values()))})"


def only(a: Result, b: Result) -> list[str]:
    """What one has and the other has not: cases, and baselines of cases that both have."""
    lines = []
    for one, other in ((a, b), (b, a)):
        cases = [c for c in one.ratios if c not in other.ratios]
        lines += [f"only in {one.name}: {case}" for case in cases]
        by_name = {}
        for case in one.ratios:
            for name in one.ratios[case] if case in other.ratios else ():
                if name not in other.ratios[case]:
                    by_name.setdefault(name, []).append(case)
        for name, of in by_name.items():
            count = f"in {len(of)} cases" if len(of) > 1 else f"in {of[0]}"
            lines.append(f"only in {one.name}: baseline {name} {count}")
    return lines


def differences(a: Result, b: Result) -> list[str]:
    """What differs between the environments, and what spoils a comparison."""
    lines = []
    for name, of in ENVIRONMENT.items():
        pair = of(a.environment), of(b.environment)
        if pair[0] != pair[1]:
            lines.append(f"{name}: {pair[0]} and {pair[1]}")
    versions = [r.environment["versions"] for r in (a, b)]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        pair = [v.get(package, "absent") for v in versions]
        if pair[0] != pair[1]:
            lines.append(f"{package}: {pair[0]} and {pair[1]}")
    for result in (a, b):
        if result.environment["contended"]:
            busy = result.environment["busy_cores"]
            lines.append(f"contended: {result.name}: others kept {busy:.1f} cores busy before")
    return lines


HEAD = ("case", "beside", "A", "B", "B is", "")


def cells(rows) -> list[list[str]]:
    """The table's rows as text."""
    return [
        [
            row["case"], row["baseline"] or OURS, _number(row["a"]),
            _number(row["b"]), f"{row['change']:.2f} x", _verdict(row),
        ]
        for row in rows
    ]  # fmt: skip


def _number(ratio):
    text = f"{ratio.median:.2f}" if ratio.median < 1000 else f"{ratio.median:.0f}"
    return text if ratio.meaningful else f"{text} (noisy)"


def _verdict(row):
    if not row["certain"]:
        return "within the spread"
    return "faster" if row["change"] > 1 else "slower"


def meaning(absolute) -> str:
    """What the numbers of the table are."""
    if absolute:
        return "calls or tokens per second"
    return "how many times as fast as the baseline of the same run"


def table(a, b, rows, absolute=False):
    """As a rich table."""
    from rich.table import Table

    t = Table(title=f"A: {a.name}\nB: {b.name}", title_justify="left")
    t.caption = f"A and B: {meaning(absolute)}"
    for name in HEAD:
        t.add_column(name, justify="right" if name in ("A", "B", "B is") else "left")
    for line in cells(rows):
        style = {"faster": "green", "slower": "red"}.get(line[-1])
        t.add_row(*line, style=style)
    return t


def markdown(a, b, rows, absolute=False) -> str:
    """The table for a pull request, with remarks."""
    lines = [HEAD, ["---:" if n in ("A", "B", "B is") else "---" for n in HEAD], *cells(rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    about = f"A: {a.name}, B: {b.name}: {meaning(absolute)}."
    return "\n".join([about, "", *text, "", *(f"- {line}" for line in remarks(a, b, rows))]) + "\n"


def remarks(a, b, rows) -> list[str]:
    """What has to be known beside the table."""
    lines = [f"differs: {line}" for line in differences(a, b)]
    if not rows:
        lines.append("There is nothing that both have.")
    return [*lines, *only(a, b)]
