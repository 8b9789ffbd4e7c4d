"""Draws the results of a device's folder as SVG, light and dark: ``pyllm bench plot``."""

import json
import math
import statistics
from pathlib import Path

# Okabe and Ito's colors, which the color-blind can tell apart; each with a marker of its own.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
MARKERS = "os^Dv<>PX*"
STYLE = {
    "svg.hashsalt": "pyllm", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "font.size": 10,
}  # fmt: skip
# Theme: what its file's name ends with, the colors of paper, ink and grid.
THEMES = {
    "light": ("", "#ffffff", "#222222", "#dddddd"),
    "dark": ("-dark", "#0d1117", "#e6edf3", "#30363d"),
}


def draw(folder) -> list[Path]:
    """Plots of every JSON file in a folder that has some, in both themes; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for path in sorted(Path(folder).glob("*.json")):
        data = json.loads(path.read_text())
        for suffix, plot in KINDS.get(kind_of(path), {}).items():
            for ending, *colors in THEMES.values():
                with matplotlib.rc_context(STYLE | _theme(*colors)):
                    figure = plot(data)
                    target = path.with_name(f"{path.stem}{suffix}{ending}.svg")
                    _save(figure, target)
                made.append(target)
    return made


def kind_of(path) -> str:
    """Of a file of results: what is before the first dash of its name."""
    return path.stem.split("-", 1)[0]


def pictures(path) -> list[str]:
    """The names, without theme and ending, of the plots that were drawn of a file of results."""
    names = [f"{path.stem}{suffix}" for suffix in KINDS.get(kind_of(path), {})]
    return [name for name in names if path.with_name(f"{name}.svg").exists()]


def picture(link, text) -> str:
    """HTML of a plot whose link is without ending: in the reader's own theme."""
    ending = THEMES["dark"][0]
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{link}{ending}.svg">'
        f'<img alt="{text}" src="{link}.svg"></picture>'
    )


def _theme(paper, ink, grid):
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    papered = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return dict.fromkeys(inked, ink) | dict.fromkeys(papered, paper) | {"grid.color": grid}


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
            color=COLORS[i % 8], marker=MARKERS[i % 10], capsize=3, label=engine,
        )  # fmt: skip
    axis.set(
        xlabel="tokens in the context", ylabel="decoded tokens/s",
        title=f"{data['model']}, {data['threads']} threads",
    )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def waterfall(data):
    """One decoding step, op by op: each bar begins where the one above ends."""
    from matplotlib import pyplot

    ops, total = data["ops"], data["microseconds"]
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(ops)))
    left = 0.0
    for i, op in enumerate(ops):
        us = op["microseconds"]
        axis.barh(i, us, left=left, color=COLORS[0])
        inside = left + us > 0.75 * total  # the label is before the bar where none fits after it
        label = f" {us:.0f} µs, {us / total:.1%} "
        axis.text(
            left if inside else left + us, i, label, va="center", fontsize=8,
            ha="right" if inside else "left",
        )  # fmt: skip
        left += us
    axis.set(
        yticks=range(len(ops)), yticklabels=[f"{op['op']} ({op['count']})" for op in ops],
        xlabel="µs since the step began, were the launches of an op together", xlim=(0, left),
    )  # fmt: skip
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    what = f"a decoding step of {data['batch']} after {data['depth']} tokens"
    figure.suptitle(f"{data['model']}: {what}", fontsize=10)
    figure.tight_layout()
    return figure


def roofline(data):
    """Every kernel as a dot under the limits that were measured in the same run."""
    from matplotlib import pyplot

    rows = [row for row in data["rows"] if row["operations"]]
    figure, axis = pyplot.subplots(figsize=(7.5, 5))
    bandwidth = data["limits"]["read_gb_per_s"]
    intensity = [row["operations"] / row["nbytes"] for row in rows]
    span = [min(intensity) / 2, max(intensity) * 2]
    for i, name in enumerate(dict.fromkeys(row["arithmetic"] for row in rows)):
        peak = data["limits"].get(name)
        if peak:
            x = sorted({*span, min(max(peak / bandwidth, span[0]), span[1])})
            label = f"{name.replace('_', ' ')} {peak:.0f}"
            axis.plot(x, [min(peak, bandwidth * v) for v in x], color="#999999",
                      linestyle=("-", "--", ":")[i % 3], label=label)  # fmt: skip
    for i, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        dots = [
            (x, row["gflops"]) for x, row in zip(intensity, rows, strict=True) if row["op"] == op
        ]
        axis.scatter(*zip(*dots, strict=True), color=COLORS[i % 8], marker=MARKERS[i], s=28,
                     label=op, zorder=3)  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="10⁹ operations a second",
        title=f"{data['device']}, {data['dtype']}, {data['threads']} threads;"
        f" memory {bandwidth:.0f} GB/s",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def scaling(data):
    """Time against rows, tokens or keys, for each op that has such a series, with all peers."""
    from matplotlib import pyplot

    series = {}
    for row in data["rows"]:
        of_family = series.setdefault((row["op"], _family(row["shape"])), {})
        of_family.setdefault(row["size"], row)  # the first of a size: alone rather than in a batch
    # Of each op the one that has the most points, and of those the one that takes longest.
    chosen = {}
    for (op, family), sizes in series.items():
        rows = [row for _, row in sorted(sizes.items())]
        weight = (len(rows), sum(row["seconds"] for row in rows))
        if weight[0] > 1 and weight > chosen.get(op, ((0, 0),))[0]:
            chosen[op] = (weight, family, rows)
    columns = min(3, len(chosen)) or 1
    figure, axes = pyplot.subplots(
        math.ceil(len(chosen) / columns) or 1, columns, squeeze=False,
        figsize=(4 * columns, 3.2 * (math.ceil(len(chosen) / columns) or 1)),
    )  # fmt: skip
    shown = [row for _, _, rows in chosen.values() for row in rows]
    peers = list(dict.fromkeys(name for row in shown for name in row["baselines"]))
    for axis in axes.flat[len(chosen) :]:
        axis.axis("off")
    for axis, (op, (_, family, rows)) in zip(axes.flat, chosen.items(), strict=False):
        _line(axis, 0, "pyllm", [(row["size"], row) for row in rows])
        for i, name in enumerate(peers, 1):
            found = [(r["size"], r["baselines"][name]) for r in rows if name in r["baselines"]]
            if found:
                _line(axis, i, name, found)
        axis.set(xscale="log", yscale="log", title=f"{op}\n{family}", ylabel="µs")
        sizes = [row["size"] for row in rows]
        axis.set_xticks(sizes, map(str, sizes))
        axis.set_xticks([], minor=True)
        axis.set_xlabel("keys" if "attention" in op else "rows")
        axis.title.set_fontsize(9)
    handles = [
        pyplot.Line2D([], [], color=COLORS[i % 8], marker=MARKERS[i % 10], label=name)
        for i, name in enumerate(["pyllm", *peers])
    ]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _line(axis, i, name, points):
    seconds = [times["seconds"] for _, times in points]
    below = [max(0, t["seconds"] - t["low"]) * 1e6 for _, t in points]
    above = [max(0, t["high"] - t["seconds"]) * 1e6 for _, t in points]
    axis.errorbar(
        [size for size, _ in points], [s * 1e6 for s in seconds], yerr=[below, above],
        color=COLORS[i % 8], marker=MARKERS[i % 10], markersize=4, capsize=2, label=name,
    )  # fmt: skip


def _family(shape):
    """What a shape's name says beside the number that varies: the model and the kind."""
    model, _, rest = shape.partition(", ")
    words = [w for w in rest.replace(",", "").split() if not w.isdigit() and w not in "x"]
    return f"{model} {' '.join(words)}".strip()


# Kind of results: what is added to the name of the file: what draws it.
KINDS = {
    "end_to_end": {"": speeds}, "context": {"": contexts}, "profile": {"": waterfall},
    "kernels": {"-roofline": roofline, "-times": scaling},
}  # fmt: skip


def _errors(runs):
    """Distances of the 10th and 90th percentile from the median, as matplotlib takes them."""
    median = statistics.median(runs)
    deciles = statistics.quantiles(runs, n=10, method="inclusive") if len(runs) > 1 else runs * 9
    return [[max(0.0, median - deciles[0])], [max(0.0, deciles[-1] - median)]]


def _save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
