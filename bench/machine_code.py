"""``python -m bench machine-code``: what the compilers made of each GPU kernel, with no GPU.

Compiles the kernels and reads registers, shared memory, spills and instructions from the machine
code. ``machine_code.json`` keeps the numbers, and ``tests/test_machine_code.py`` compares, so that
a spill, a lost 16-byte load, a lost tensor core instruction or registers that cost occupancy show
up as a change of that file.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cubin, nvcc, triton_rows

TABLE = Path(__file__).with_name("machine_code.json")
# Where rows come from: modules with missing(), compiler(), groups(), fingerprint() of the sources,
# and rows(group, folder), which is {kernel: row of numbers}. Groups are named SOURCE/OP/TARGET.
SOURCES = {"cuda": nvcc, "triton": triton_rows}
# Numbers that may not grow, and those that may not shrink.
COSTS, LIMITS = ("spilled", "stack", "local"), ("blocks",)
# Instructions that may not vanish.
WANTED = ("hmma", "imma", "gmma", "utcmma", "mfma", "ldg_128", "stg_128", "ldgsts", "bulk", "ldsm")


def missing(source: str) -> str | None:
    """Why the machine code of a source cannot be read here, or None if it can."""
    return SOURCES[source].missing() or cubin.missing()


def groups() -> list[str]:
    """All groups of the sources that there are here."""
    return [g for name, source in SOURCES.items() if not missing(name) for g in source.groups()]


def measure(folder, groups) -> dict:
    """``{"compilers": {source: version}, "sources": {source: fingerprint}, "kernels": {group:
    {kernel: row}}}``.

    Args:
        folder: where the compiled kernels go, and stay while their sources do not change.
        groups: which to compile.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def rows(group):
        found = SOURCES[group.split("/")[0]].rows(group, folder)
        return dict(sorted(found.items()))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kernels = dict(zip(groups, pool.map(rows, groups), strict=True))
    used = {group.split("/")[0] for group in groups}
    return {
        "compilers": {s: SOURCES[s].compiler() for s in used},
        "sources": {s: SOURCES[s].fingerprint() for s in used},
        "kernels": kernels,
    }


def write(data) -> Path:
    """Commits the numbers as what the test holds the kernels to: a line a kernel. What `data` has
    no sources of stays."""
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    old = {"compilers": {}, "sources": {}, "kernels": {}} | old
    kept = {g: k for g, k in old["kernels"].items() if g.split("/")[0] not in data["compilers"]}
    parts = []
    for group, kernels in sorted((kept | data["kernels"]).items()):
        lines = ",\n".join(f"   {json.dumps(n)}: {json.dumps(k)}" for n, k in kernels.items())
        parts.append(f"  {json.dumps(group)}: {{\n{lines}\n  }}")
    body = ",\n".join(parts)
    head = "".join(
        f' "{name}": {json.dumps(dict(sorted((old[name] | data[name]).items())))},\n'
        for name in ("compilers", "sources")
    )
    TABLE.write_text(f'{{\n{head} "kernels": {{\n{body}\n }}\n}}\n')
    return TABLE


def worse(before: dict, after: dict) -> list[str]:
    """What got worse from one group's kernels to another's, in words."""
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        grown = [key for key in COSTS if new.get(key, 0) > old.get(key, 0)]
        shrunk = [key for key in LIMITS if new[key] < old[key]]
        gone = [key for key in WANTED if old.get(key) and not new.get(key)]
        found += [f"{name}: {k} {old.get(k, 0)} -> {new.get(k, 0)}" for k in grown + shrunk + gone]
    return sorted(found)


def table(data):
    """A table a group, for the terminal."""
    from rich.table import Table

    for group, kernels in data["kernels"].items():
        keys = list(dict.fromkeys(key for row in kernels.values() for key in row))
        t = Table(title=group, title_justify="left")
        t.add_column("kernel")
        for key in keys:
            t.add_column(key, justify="right")
        for name, row in kernels.items():
            t.add_row(name, *(str(row.get(key, 0)) for key in keys))
        yield t
