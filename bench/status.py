"""The parts of the page of results that are about kernels: a headline beside the peers from each
``kernels*.json``, and what of each kernel has been verified and timed where."""

import statistics
from collections import defaultdict

from . import kernels

# What the tests execute a kernel on where there is no GPU.
INSTEAD = {"cuda": "emulator", "triton": "interpreter"}
# Launches in a profile that have another name than their op.
OP_OF_LAUNCH = {
    "silu": "activation", "gelu": "activation", "gelu_tanh": "activation", "relu": "activation",
    "attention_combine": "paged_attention",
}  # fmt: skip


def headline(data) -> list[str]:
    """A line an op and backend: medians over its cases; then every case, folded away. Nothing of
    what an emulator ran."""
    if data["emulated"]:
        return []
    groups = defaultdict(list)
    for row in data["rows"]:
        groups[row["op"], row["backend"]].append(row)
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["baselines"]))
    rows = []
    for (op, backend), cases in groups.items():
        shares = [row["share"] for row in cases if row["share"]]
        found = [[row["baselines"].get(name) for row in cases] for name in names]
        share = f"{statistics.median(shares):.0%}" if shares else ""
        rows.append((op, backend, len(cases), share, *map(_ratios, found)))
    limits = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in data["limits"].items())
    head = "|".join(["op", "backend", "cases", "of roofline", *(f"x {name}" for name in names)])
    return [
        f"### Kernels, {data['dtype']}", "",
        "Medians over the cases of an op; x: how many times as long the other takes, with the least"
        f" and the most where cases differ. Measured limits: {limits}.", "",
        *table(head, rows),
        f"<details><summary>All {len(data['rows'])} cases</summary>", "",
        *kernels.markdown(data).splitlines(), "", "</details>", "",
    ]  # fmt: skip


def _ratios(found):
    """``1.20 (0.90 to 2.00)`` of the ratios that mean something."""
    ratios = [f["ratio"] for f in found if f and f["meaningful"]]
    if not ratios:
        return "noisy" if any(found) else ""
    middle, low, high = (f(ratios) for f in (statistics.median, min, max))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{middle:.2f}"


class Evidence:
    """What the files of a device say about its kernels, by op and backend."""

    def __init__(self, files):
        self.is_gpu = any(data["environment"].get("gpu") for data in files.values())
        # (op, backend) -> commits, and by commit how many passed and failed.
        self.timed, self.verified = defaultdict(list), defaultdict(lambda: defaultdict(_none))
        for name, data in files.items():
            kind, commit = name.split("-", 1)[0], data["environment"]["commit"]
            {"gpu_tests": self._tests, "kernels": self._kernels, "profile": self._profile}.get(
                kind, lambda data, commit: None
            )(data, commit)

    def _tests(self, data, commit):
        for file in data["files"].values():
            for name, counts in file["ops"].items():
                backend, _, op = name.rpartition(" ")
                self._count(op, backend or "cuda", commit, *counts)

    def _kernels(self, data, commit):
        if data["emulated"]:
            return
        for part, counts in (("verified", (1, 0)), ("failed", (0, 1))):
            for case in data.get(part, ()):
                self._count(case["op"], case.get("backend") or case["asked"], commit, *counts)
        for row in data["rows"]:
            self._time(row["op"], row["backend"], commit)

    def _profile(self, data, commit):
        for launch in data["ops"]:
            name = launch["op"].split(" ")[0]
            self._time(OP_OF_LAUNCH.get(name, name), "cpu", commit)

    def _count(self, op, backend, commit, passed, failed):
        counts = self.verified[op, backend][commit]
        counts[0] += passed
        counts[1] += failed

    def _time(self, op, backend, commit):
        if commit not in self.timed[op, backend]:
            self.timed[op, backend].append(commit)

    def of(self, op, backend) -> str:
        """``verified (48) at abc; timed at abc``, or nothing."""
        found = []
        for commit, (passed, failed) in self.verified.get((op, backend), {}).items():
            what = f"**{failed} of {passed + failed} failed**" if failed else f"verified ({passed})"
            found.append(f"{what} at {commit}")
        if commits := self.timed.get((op, backend)):
            found.append(f"timed at {', '.join(commits)}")
        return "; ".join(found)


def _none():
    return [0, 0]


def matrix(devices) -> list[str]:
    """Every kernel and device.

    Args:
        devices: the JSON files of each device: ``{device: {name: data}}``.
    """
    import pyllm.ops  # noqa: F401  fills OPS
    from pyllm.ops.registry import OPS

    evidence = {device: Evidence(files) for device, files in devices.items()}
    cpus = [device for device, e in evidence.items() if not e.is_gpu]
    gpus = [device for device, e in evidence.items() if e.is_gpu]
    columns = [("cpu", [device]) for device in cpus]
    columns += [(backend, gpus) for backend in INSTEAD]
    names = [f"{b} on {d[0] if b == 'cpu' else 'a GPU'}" for b, d in columns]
    rows = [
        (name, *(_cell(op, backend, where, evidence) for backend, where in columns))
        for name, op in OPS.items()
        if {"cpu", *INSTEAD} & op.backends.keys()
    ]
    return [
        "## Kernels and devices", "",
        "*Verified*: held to the reference by so many tests, or cases of the benchmark before it"
        " timed them; *timed*: in a table or a profile above; with the commit. Every CPU kernel is"
        " verified by the tests on each instruction set of the machine that runs them. *Never run*:"
        " the tests execute the kernel on the emulator or in Triton's interpreter, and no GPU has"
        " run it yet.", "",
        *table("|".join(["op", *names]), rows),
    ]  # fmt: skip


def _cell(op, backend, devices, evidence):
    if backend not in op.backends:
        return "no kernel"
    found = {device: evidence[device].of(op.name, backend) for device in devices}
    if backend == "cpu":
        return found[devices[0]] or "not timed"
    told = [f"{device}: {what}" for device, what in found.items() if what]
    if told:
        return "<br>".join(told)
    executed = backend == "triton" or "emulator" in op.backends
    return f"never run, {INSTEAD[backend]} only" if executed else "never run"


def table(head, rows) -> list[str]:
    """A table in Markdown.

    Args:
        head: names of the columns, joined by ``|``.
    """
    names = head.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return [*("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]
