"""Whether a kernel has become slower than the committed results say.

Never by absolute times: by ratios to baselines that were measured in the same run. A ratio may fall
because a baseline became faster, so a case has regressed only if it fell beside every baseline that
can be compared, and by more than the spreads of both results and `LEAST`.
"""

from pathlib import Path

from . import baselines, compare, record

LEAST = 0.05  # what any two runs may differ by


def committed(new: compare.Result, folder=None) -> list[compare.Result]:
    """The results of kernels in `folder` that are of the same device kind."""
    found = []
    for path in sorted(Path(folder or record.RESULTS).glob("*/kernels*.json")):
        if path.resolve() != Path(new.name).resolve():
            old = compare.read(path)
            if (old.device, old.about) == (new.device, new.about):
                found.append(old)
    return found


def judge(new: compare.Result, old: compare.Result) -> list[dict]:
    """One row a case that both have: ``change`` and ``margin`` beside the baseline that fell least,
    and ``state``: "ok", "regressed", or why it was not judged."""
    by_case = {}
    for row in compare.changes(old, new):
        by_case.setdefault(row["case"], []).append(row)
    return [{"case": case, **_judge(rows, new, old)} for case, rows in by_case.items()]


def _judge(rows, new, old):
    why, judged = [], []
    for row in rows:
        if not (row["a"].meaningful and row["b"].meaningful):
            why.append(f"{row['baseline']} is noisy")
        elif package := _other_version(row["baseline"], new, old):
            why.append(f"another {package}")
        else:
            judged.append((row["change"], max(LEAST, compare.margin(row["a"], row["b"]))))
    if not judged:
        return {"change": None, "margin": None, "state": "not judged: " + ", ".join(why)}
    change, margin = max(judged, key=lambda pair: pair[0] + pair[1])
    return {
        "change": change,
        "margin": margin,
        "state": "ok" if change >= 1 - margin else "regressed",
    }


def _other_version(baseline, new, old):
    """The package that a baseline is of, if its version is not that of the committed result."""
    modules = {b.name: b.module for b in baselines.BASELINES}
    start = (modules.get(baseline) or "torch").replace("_", "-")
    package = next(p for p in record.PACKAGES if p.startswith(start))
    before, now = (result.environment["versions"].get(package) for result in (old, new))
    return package if before != now else None


def table(new, old, rows):
    """What `judge` found, as a rich table."""
    from rich.table import Table

    t = Table(title=f"{new.name}\nbeside {old.name} of {old.environment['commit']}")
    t.title_justify = "left"
    for name in ("case", "change", "margin", ""):
        t.add_column(name, justify="right" if name in ("change", "margin") else "left")
    for row in rows:
        style = "red" if row["state"] == "regressed" else None
        numbers = ["", ""]
        if row["change"]:
            numbers = [f"{row['change'] - 1:+.1%}", f"{row['margin']:.1%}"]
        t.add_row(row["case"], *numbers, row["state"], style=style)
    return t


def report(path, folder, console) -> bool:
    """Prints how a result of `kernels` compares with the committed ones; False if one regressed.

    Raises:
        ValueError: where the file is of something else.
    """
    new = compare.read(path)
    if new.about["kind"] != "kernels":
        raise ValueError(f"{path}: expected a result of `pyllm bench kernels`")
    if new.environment["contended"]:
        console.print(f"{new.name}: others were busy before; measure again on a quiet machine")
    compared = [(old, rows) for old in committed(new, folder) if (rows := judge(new, old))]
    if not compared:
        console.print(f"{new.name}: nothing to compare with: no committed result of {new.device}")
    regressed = 0
    for old, rows in compared:
        console.print(table(new, old, rows))
        judged = [row["state"] for row in rows if row["change"]]
        bad = judged.count("regressed")
        console.print(f"{len(judged)} of {len(rows)} cases judged, {bad} regressed")
        regressed += bad
    return not regressed
