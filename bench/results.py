"""Writes ``README.md`` of a folder of results from the JSON files in it."""

import json
import os
from pathlib import Path

from . import (
    drop_in,
    gpu_decode,
    models,
    modules,
    overhead,
    plot,
    prompt_lookup,
    sensors,
    status,
    suite,
)
from .status import table

OURS = "pyllm"


def write(root) -> Path:
    """Rewrites the page of `root`, which has a folder a device."""
    root = Path(root)
    lines = [
        "# Results", "",
        "Written by `pyllm bench plot` from the JSON files beside it; do not edit.", "",
        "Engines take turns in every round, each in a process of its own; figures are medians,"
        " ratios the medians of the rounds' ratios.", "",
    ]  # fmt: skip
    folders = sorted(p for p in root.iterdir() if p.is_dir() and any(p.glob("*.json")))
    devices = {
        folder: {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        for folder in folders
    }
    for folder, files in devices.items():
        lines += _device(folder, files)
    lines += status.matrix({folder.name: files for folder, files in devices.items()})
    page = root / "README.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def _device(folder, files):
    where = next(iter(files.values()))["environment"]
    gpu = next((g for data in files.values() if (g := data["environment"].get("gpu"))), None)
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    device = f"{where['machine']['processor']}, {where['threads']} threads"
    if gpu:
        device = f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, CUDA {gpu['cuda']}"
    lines = [
        f"## {folder.name}", "",
        f"{device}, {where['date'][:10]}, commit {where['commit']}; {versions}.", "",
    ]  # fmt: skip
    contended = [name for name, data in files.items() if data["environment"]["contended"]]
    if contended:
        lines += [f"**Other processes were busy before: {', '.join(contended)}.**", ""]
    for name, data in files.items():
        about = data["environment"]
        if slowed := sensors.remarks(about.get("sensors", {}), about.get("sensors_after", {})):
            lines += [f"**{name}: {'; '.join(slowed)}.**", ""]
    whole = (f.removesuffix(".json") for f, *_ in suite.files(models.NAMES))
    missing = [name for name in whole if name not in files and not gpu]
    if missing:
        names = ", ".join(missing)
        lines += [f"Not measured on this machine yet: {names}.", ""]
    for name, data in files.items():
        kind = name.split("-", 1)[0]
        if kind in PARTS:
            lines += PARTS[kind](data)
        for drawn in plot.pictures(folder / f"{name}.json"):
            lines += [plot.picture(f"{folder.name}/{drawn}", drawn), ""]
    command = "bench/on_gpu.sh" if gpu else "pyllm bench all"
    return [*lines, "Reproduce:", "", "```sh", f"{command} --out {folder.name}", "```", ""]


def _limits(data):
    values = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in data["limits"].items())
    return [f"Measured limits: {values}.", ""]


def _overhead(data):
    title = f"### Calls on one row, at most {data['limit_us']:.0f} µs beside the kernel meant"
    return [title, "", *table("|".join(overhead.HEAD), overhead.cells(data))]


def _modules(data):
    title = f"### Norms as modules, beside those of torch, {data['rounds']} rounds"
    return [title, "", *table("|".join(modules.HEAD), modules.cells(data))]


def _end_to_end(data):
    rows = []
    for row in data["rows"]:
        ratio = f"{row['ratio']:.2f} x" if row["engine"] != OURS and row["ratio"] else ""
        share = ""
        if "gb_per_s" in row:
            share = f"{row['gb_per_s'] / data['limits']['read_gb_per_s']:.0%} of bandwidth"
        elif "int8_gops" in row and data["limits"]["int8_gops"]:
            share = f"{row['int8_gops'] / data['limits']['int8_gops']:.0%} of int8 peak"
        spread = f"{row['low']:.1f} to {row['high']:.1f}"
        rows.append((row["test"], row["engine"], f"{row['median']:.1f}", spread, ratio, share))
    absent = "".join(f"\nNot measured: {n} ({why})." for n, why in data["absent"].items())
    return [
        f"### {data['model']}, {data['rounds']} rounds", "",
        *table("test|engine|tokens/s|range|pyllm is|of the measured limit", rows),
        *([absent.strip(), ""] if absent else []),
    ]  # fmt: skip


def _interference(data):
    rows = [
        (
            r["engine"], r["condition"], f"{r['median']:.1f}", f"{r['of_quiet']:.0%}",
            f"{r['token_median_ms']:.2f}", f"{r['token_p99_ms']:.2f}", f"{r['token_max_ms']:.2f}",
            f"{r['max_over_median']:.1f}",
        )
        for r in data["rows"]
    ]  # fmt: skip
    head = "engine|machine|tokens/s|of quiet|token: median ms|p99|max|max / median"
    title = f"### {data['model']}, decoding while another process keeps a core busy"
    return [title, "", *table(head, rows)]


def _startup(data):
    rows = [
        (r["what"], f"{r['median']:.2f}", f"{r['over_import_torch']:+.2f}") for r in data["rows"]
    ]
    memory = [
        (
            m["engine"], f"{m['peak_mb']:.0f}", f"{m['file_mb']:.0f}",
            f"{m['import_mb']:.0f} ({m['imported']})", f"{m['above_mb']:.0f}",
        )
        for m in data["memory"]
    ]  # fmt: skip
    return [
        f"### {data['model']}, start and memory", "",
        *table("from process start to first token|seconds|over import torch", rows),
        *table("peak memory, MB, context filled|peak|file|imported library|above both", memory),
    ]  # fmt: skip


def _profile(data):
    rows = []
    for op in data["ops"]:
        us, n_bytes = op["microseconds"], op["bytes"]
        rate = f"{n_bytes / us / 1e3:.1f}" if n_bytes else ""
        share = f"{us / data['microseconds']:.1%}"
        rows.append((op["op"], op["count"], f"{us:.1f}", share, rate))
    title = (
        f"### {data['model']}, one decoding step of {data['batch']} after {data['depth']} tokens: "
        f"{data['microseconds']:.0f} µs"
    )
    return [title, "", *table("op|launches|µs|share|GB/s of weights", rows)]


def _gpu_decode(data):
    title = f"### {data['shape']} with random weights"
    return [title, "", *table("|".join(gpu_decode.HEAD), gpu_decode.cells(data))]


def _perplexity(data):
    rows = [
        (r["head"], f"{r['bytes'] / 1e6:.1f}", f"{r['perplexity']:.3f}", f"{r['median']:.1f}")
        for r in data["rows"]
    ]
    return [
        f"### {data['model']}, an output head of fewer bits", "",
        *table(f"head|MB|perplexity|{data['test']}, tokens/s", rows),
        f"Perplexity {data['cost']:+.2%} (standard error {data['cost_error']:.2%}, {data['tokens']}"
        f" tokens of {data['text']}), decoding {data['gain']:+.1%}.", "",
    ]  # fmt: skip


def _prompt_lookup(data):
    title = f"### {data['model']}, guesses from the prompt (at most {data['guesses']})"
    return [title, "", *table("|".join(prompt_lookup.HEAD), prompt_lookup.cells(data))]


def _drop_in(data):
    title = f"### Models of transformers, patched, {data['rounds']} rounds"
    return [title, "", *table("|".join(drop_in.HEAD), drop_in.cells(data))]


PARTS = {
    "limits": _limits, "overhead": _overhead, "modules": _modules, "perplexity": _perplexity,
    "prompt_lookup": _prompt_lookup,
    "context": _end_to_end, "end_to_end": _end_to_end, "interference": _interference,
    "startup": _startup, "profile": _profile, "kernels": status.headline,
    "gpu_decode": _gpu_decode, "drop_in": _drop_in,
}  # fmt: skip


BEGIN, END = "<!-- from results: begin -->\n", "<!-- from results: end -->\n"


def write_decode_step(root, page, model="smollm2-135m") -> Path:
    """Rewrites the tables of `page`: the profile of a model's decoding step on each device."""
    lines = []
    for path in sorted(Path(root).glob(f"*/profile-{model}-depth*.json")):
        data = json.loads(path.read_text())
        where = data["environment"]
        title = f"**{path.parent.name}**, commit {where['commit']}, {where['date'][:10]}"
        noisy = "; other processes were busy before" if where["contended"] else ""
        lines += [f"{title}{noisy}", "", *_profile(data)]
    return _rewrite(page, lines)


def write_headline(root, page, model="smollm2-135m") -> Path:
    """Rewrites the table of `page`: a whole model beside all engines, from the newest results."""
    found = [
        (json.loads(path.read_text()), path)
        for path in Path(root).glob(f"*/end_to_end-{model}.json")
    ]
    lines = []
    if found:
        data, path = max(found, key=lambda item: item[0]["environment"]["date"])
        where = data["environment"]
        engines = list(dict.fromkeys(row["engine"] for row in data["rows"]))
        cells = {(row["test"], row["engine"]): row for row in data["rows"]}
        rows = []
        for test in dict.fromkeys(row["test"] for row in data["rows"]):
            of_test = [cells.get((test, engine)) for engine in engines]
            rows.append((test, *(f"{row['median']:.0f}" if row else "" for row in of_test)))
        lines = [
            f"{data['model']} on {where['machine']['processor']}, {data['threads']} threads, tokens"
            f" per second: medians of up to {data['rounds']} interleaved rounds,"
            f" {where['date'][:10]}, commit {where['commit']}.", "",
            *table("|".join(["test", *engines]), rows),
        ]  # fmt: skip
        for drawn in plot.pictures(path):
            link = os.path.relpath(path.with_name(drawn), page.parent)
            lines += [plot.picture(link, "tokens per second beside other engines"), ""]
    return _rewrite(page, lines)


def _rewrite(page, lines):
    """Puts lines between the marks in a page."""
    before, rest = page.read_text().split(BEGIN)
    text = "\n".join(lines).strip() or "None has been recorded yet."
    page.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.split(END)[1]}")
    return page
