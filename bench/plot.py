"""Draws the results of a device's folder as SVG: ``pyllm bench plot``."""

import json
import statistics
from pathlib import Path

# Okabe and Ito's colors, which the color-blind can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]


def draw(folder) -> list[Path]:
    """Plots of every JSON file in a folder that has one; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "pyllm", "figure.facecolor": "white", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
        "axes.axisbelow": True, "font.size": 10,
    }  # fmt: skip
    made = []
    for path in sorted(Path(folder).glob("*.json")):
        kind = path.name.split("-", 1)[0].removesuffix(".json")
        if kind in KINDS:
            target = path.with_suffix(".svg")
            _save(KINDS[kind](json.loads(path.read_text())), target)
            made.append(target)
    return made


def speeds(data):
    """Tokens per second by test and engine; bars from the 10th to the 90th percentile."""
    from matplotlib import pyplot

    tests = list(dict.fromkeys(row["test"] for row in data["rows"]))
    engines = list(dict.fromkeys(row["engine"] for row in data["rows"]))
    figure, axes = pyplot.subplots(1, len(tests), figsize=(3 * len(tests), 3.6), squeeze=False)
    for axis, test in zip(axes[0], tests, strict=True):
        rows = {row["engine"]: row for row in data["rows"] if row["test"] == test}
        for i, engine in enumerate(engines):
            if engine not in rows:
                continue
            row = rows[engine]
            axis.bar(
                i, row["median"], color=COLORS[i % len(COLORS)],
                yerr=_errors(row["tokens_per_second"]), capsize=3, label=engine,
            )  # fmt: skip
            axis.text(i, 0, f"{row['median']:.0f}", ha="center", va="bottom", fontsize=8)
        axis.set_title(test)
        axis.set_xticks([])
    axes[0][0].set_ylabel("tokens/s")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[i % 8]) for i in range(len(engines))]
    figure.legend(handles, engines, loc="lower center", ncol=3, frameon=False)
    figure.suptitle(f"{data['model']}, {data['threads']} threads")
    figure.tight_layout(rect=(0, 0.06 + 0.06 * (len(engines) > 3), 1, 1))
    return figure


def contexts(data):
    """Decoded tokens per second against the tokens before them."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.8))
    for i, engine in enumerate(dict.fromkeys(row["engine"] for row in data["rows"])):
        rows = [row for row in data["rows"] if row["engine"] == engine]
        errors = [_errors(row["tokens_per_second"]) for row in rows]
        axis.errorbar(
            [row["depth"] for row in rows], [row["median"] for row in rows],
            yerr=[[e[side][0] for e in errors] for side in (0, 1)],
            color=COLORS[i], marker="os^D"[i % 4], capsize=3, label=engine,
        )  # fmt: skip
    axis.set(
        xlabel="tokens in the context", ylabel="decoded tokens/s",
        title=f"{data['model']}, {data['threads']} threads",
    )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def profile(data):
    """One decoding step as a bar, by op."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.2))
    left = 0.0
    for i, op in enumerate(data["ops"]):
        us = op["microseconds"]
        share = us / data["microseconds"]
        axis.barh(
            0, us, left=left, color=COLORS[i % 8], edgecolor="white", hatch="" if i < 8 else "//",
            label=f"{op['op']} ({op['count']}): {us:.0f} µs, {share:.0%}",
        )  # fmt: skip
        left += us
    axis.set(
        yticks=[], xlabel="µs", xlim=(0, left),
        title=f"{data['model']}: a decoding step of {data['batch']} after {data['depth']} tokens",
    )  # fmt: skip
    axis.grid(False)
    figure.legend(loc="lower center", ncol=2, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06 * (len(data["ops"]) + 1) / 2 + 0.02, 1, 1))
    return figure


KINDS = {"end_to_end": speeds, "context": contexts, "profile": profile}


def _errors(runs):
    """Distances of the 10th and 90th percentile from the median, as matplotlib takes them."""
    median = statistics.median(runs)
    deciles = statistics.quantiles(runs, n=10, method="inclusive") if len(runs) > 1 else runs * 9
    return [[max(0.0, median - deciles[0])], [max(0.0, deciles[-1] - median)]]


def _save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
