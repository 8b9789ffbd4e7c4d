"""Kernels beside their baselines: verified first, then timed, then set against the roofline."""

import csv
import importlib
import os
from pathlib import Path

import torch

from pyllm import testing
from pyllm.ops import registry

from . import baselines, limits, record, timing
from .case import Setting, nbytes, tensors, wide
from .shapes import SHAPES

# What can be timed: each is a module here, with `cases(model, shape, setting)`.
OPS = (
    "flash_attention", "paged_attention", "layer_norm", "rms_norm", "quant_matmul", "matmul",
    "rope_cache", "activation", "sample",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Sets of arguments together are this many times the last cache, as far as so many sets do it.
CACHES, MOST_SETS = 4, 64
BUSY = 0.2  # cores, by others: the clock that counts them has ticks of 10 ms
# Backends on CPU tensors that execute GPU kernels: for seeing that all works, not for timing.
EMULATED = {"emulator"}


def measure(
    ops=None, shapes=None, dtype=None, backend=None, baseline=None, *, device="cpu", threads=None,
    rounds=15, match=None, before=None, save=lambda data: None,
    progress=lambda done, total, text: None,
):  # fmt: skip
    """Verifies and times every case. What is wrong is not timed, and the rest goes on.

    Args:
        ops: names out of `OPS`; None for all.
        shapes: `Shape` by name; None for SmolLM2-135M on a CPU and Llama-3-8B on a GPU.
        dtype: of `DTYPES`; None for float32 on a CPU, the runtime's there, and bfloat16 on a GPU.
        backend: of ours; None for the one that `registry` picks.
        baseline: names joined by commas, see `baselines.select`.
        rounds: 0 only verifies.
        match: only cases whose shape has this in it.
        before: what an earlier call returned: cases in it are not done again.
        save: called with what there is after every case.

    Returns:
        ``rows`` of what was timed, ``verified`` of what was right, ``failed`` with its error, and
        ``absent``: ops that the backend does not have, and baselines, with why.
    """
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    shapes = shapes or {n: SHAPES[n] for n in ["smollm2-135m" if device == "cpu" else "llama3-8b"]}
    if unknown := set(ops or ()) - set(OPS):
        raise ValueError(f"--op: expected {', '.join(OPS)}; got {', '.join(sorted(unknown))}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected {', '.join(DTYPES)}; got {dtype}")
    others, absent = baselines.select(baseline if rounds else "none", device)
    small = backend in EMULATED or (backend == "triton" and device == "cpu")
    setting = Setting(device, DTYPES[dtype], small or set(shapes) == {"tiny"})
    threads = _set_threads(threads)
    data = {"kind": "kernels", "device": device, "threads": threads, "dtype": dtype, "limits": {}}
    data |= {"rows": [], "verified": [], "failed": [], "absent": {}, "emulated": small}
    data |= before or {}
    data["absent"] |= absent
    found = []
    for op in ops or OPS:
        if why := _why_not(op, backend, device):
            data["absent"][f"{op} on {backend}"] = why
            continue
        found += [
            case
            for name, shape in shapes.items()
            for case in cases_of(op, name, shape, setting)
            if not match or match in case.shape
        ]
    parts = ("rows", "failed") if rounds else ("verified", "failed")
    done = {(r["op"], r["shape"], r["asked"]) for part in parts for r in data[part]}
    found = [case for case in found if (case.op, case.shape, backend) not in done]
    if found and rounds:
        data["limits"] = limits.measure(threads) if device == "cpu" else limits.measure_cuda()
    for i, case in enumerate(found):
        progress(i, len(found), f"{case.op} {case.shape}")
        about = {"op": case.op, "shape": case.shape, "asked": backend}
        try:
            arguments = case.make()
            about["backend"] = verify(case, arguments, backend)
            data["verified"].append(about)
            if rounds:
                row = _row(case, arguments, setting, about["backend"], others, data, rounds)
                data["rows"].append(about | row)
        except Exception as error:  # a wrong result, or anything that a kernel may do
            data["failed"].append(about | {"error": f"{type(error).__name__}: {error}"})
        save(data)
        if not _usable(device):
            break
    progress(len(found), len(found), "done")
    return data


def _why_not(op, backend, device):
    """Why `backend` has no case of `op`, or None."""
    try:
        registry.OPS[op].choose(device, backend)
    except registry.BackendError as error:
        return str(error).partition("was asked for, but ")[2] or str(error)
    return None


def _usable(device):
    """Whether the device still answers: after an illegal access no call of this process does."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def _set_threads(threads):
    from pyllm import _C

    threads = threads or _C.num_threads()
    _C.set_num_threads(threads)
    torch.set_num_threads(threads)
    return threads


def cases_of(op, name, shape, setting):
    """The benchmark cases of an op for a model's shape."""
    module = importlib.import_module(f".{op}", __package__)
    return list(module.cases(name, shape, setting))


def verify(case, arguments, backend) -> str:
    """Holds the kernel to the rule of the tests; returns the backend that served."""
    first = next(iter(arguments.values()))
    chosen = registry.OPS[case.op].choose(first.device.type, backend, first)
    if chosen != "reference":
        ours = [case.part_of_result(y) for y in tensors(case.call(arguments, chosen))]
        meant = case.part(case.meant(arguments, chosen))
        for y, exact, rounded in zip(
            ours,
            tensors(case.call(wide(meant), "reference")),
            tensors(baselines.TORCH[case.op](meant, case.options)()),
            strict=True,
        ):
            if y.dtype.is_floating_point:
                floor = case.floor(arguments)
                testing.assert_close(y, exact, rounded, floor=floor, what=case.shape)
            else:
                assert torch.equal(y.long(), exact.long()), f"{case.shape}: other tokens"
    return chosen


def _row(case, first, setting, served, others, data, rounds):
    sets = [first, *(case.make() for _ in range(_n_sets(first, setting) - 1))]
    contenders = {"pyllm": [_call(case, a, served) for a in sets]}
    with torch.inference_mode():
        for other in others:
            try:
                calls = _prepared(other, case, sets)
            except Exception as error:  # what others raise must not keep ours from being timed
                what = str(error).strip().partition("\n")[0]
                data["absent"][f"{other.name} of {case.op}"] = f"{type(error).__name__}: {what}"
                continue
            if calls:
                contenders[other.name] = calls
        load = record.OtherLoad()
        times = timing.measure(contenders, device=setting.device, rounds=rounds)
    busy = load.cores()
    floor = floor_seconds(case, data["limits"])
    ours = times["pyllm"].summary()
    return {
        "size": case.size, "nbytes": case.nbytes, "operations": case.operations,
        "arithmetic": case.arithmetic, "sets": len(sets),
        "cold": len(sets) * _set_bytes(first) >= last_cache(setting.device),
        "busy_cores": busy, **ours, "gb_per_s": case.nbytes / ours["seconds"] / 1e9,
        "gflops": case.operations / ours["seconds"] / 1e9,
        "share": floor / ours["seconds"] if floor else None,
        "baselines": {
            name: {**t.summary(), **timing.ratio(times["pyllm"], t)}
            for name, t in times.items()
            if name != "pyllm"
        },
    }  # fmt: skip


def _prepared(other, case, sets):
    """The calls of a baseline, each having been made once; None where it does not do this case."""
    prepare = other.ops.get(case.op)
    calls = [prepare(a, case.options) for a in sets] if prepare else [None]
    if not all(calls):
        return None
    calls[0]()
    return calls


def _call(case, arguments, backend):
    return lambda: case.call(arguments, backend)


def floor_seconds(case, roof) -> float | None:
    """The time below which this device cannot be: bytes over bandwidth, operations over peak."""
    peak = roof.get(case.arithmetic) or 0
    parts = [case.nbytes / roof["read_gb_per_s"] / 1e9]
    if peak:
        parts.append(case.operations / peak / 1e9)
    return max(parts)


def _set_bytes(arguments):
    return sum(nbytes(v) for v in arguments.values())


def _n_sets(arguments, setting):
    if setting.small:
        return 1
    return min(MOST_SETS, 1 + CACHES * last_cache(setting.device) // _set_bytes(arguments))


def last_cache(device) -> int:
    """The bytes of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes[1:] or sizes)


# What a row may have to be taken with: whether, and what it means.
NOTES = {
    "cached": (lambda r: not r["cold"], "the data of all calls together fit the last cache"),
    "drift": (
        lambda r: not 0.8 < r["drift"] < 1.25, "the machine's speed changed while measuring",
    ),
    "busy": (
        lambda r: r["busy_cores"] > BUSY, f"others kept more than {BUSY} cores busy meanwhile",
    ),
}  # fmt: skip
HEAD = ("op", "shape", "backend", "µs", "10 to 90 %", "GB/s", "GFLOP/s", "of roofline", "notes")


def cells(data) -> tuple[list[str], list[list[str]]]:
    """The table's head and rows, as text."""
    names = list(dict.fromkeys(n for row in data["rows"] for n in row["baselines"]))
    rows = []
    for row in data["rows"]:
        rows.append([
            row["op"], row["shape"], row["backend"], _us(row["seconds"]),
            f"{_us(row['low'])} to {_us(row['high'])}", f"{row['gb_per_s']:.1f}",
            f"{row['gflops']:.0f}" if row["operations"] else "",
            f"{row['share']:.0%}" if row["share"] else "", " ".join(notes_of(row)),
            *(_ratio(row["baselines"].get(name)) for name in names),
        ])  # fmt: skip
    return [*HEAD, *(f"x {name}" for name in names)], rows


def notes_of(row) -> list[str]:
    return [note for note, (holds, _) in NOTES.items() if holds(row)]


def _us(seconds):
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _ratio(found):
    if found is None:
        return ""
    return f"{found['ratio']:.2f}" if found["meaningful"] else "noisy"


def remarks(data) -> list[str]:
    """What a reader has to know beside the table."""
    lines = []
    if data["absent"]:
        lines.append("absent: " + "; ".join(f"{n}, {why}" for n, why in data["absent"].items()))
    lines += [
        f"FAILED: {f['op']} {f['shape']} on {f.get('backend') or f['asked']}: "
        f"{f['error'].strip().partition(chr(10))[0]}"
        for f in data.get("failed", ())
    ]
    if not data["rows"]:
        lines.append(f"verified: {len(data['verified'])} cases")
    if data["emulated"]:
        lines.append("An emulator or interpreter ran the kernels: the times mean nothing.")
    for note, (_, meaning) in NOTES.items():
        if n := sum(note in notes_of(row) for row in data["rows"]):
            lines.append(f"{note} ({n} of {len(data['rows'])}): {meaning}")
    if any(not b["meaningful"] for r in data["rows"] for b in r["baselines"].values()):
        lines.append(
            f"noisy: the rounds' ratios differ by more than {timing.MEANINGLESS:.0%}, so that"
            " their median says little"
        )
    return lines


def table(data):
    """As a rich table."""
    from rich.table import Table

    limit = ", ".join(f"{k} {v:.0f}" for k, v in data["limits"].items() if isinstance(v, float))
    t = Table(title=f"{data['device']}, {data['dtype']}; measured limits: {limit}")
    head, rows = cells(data)
    for name in head:
        left = name in ("op", "shape", "backend")
        t.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        t.add_row(*row)
    return t


def markdown(data) -> str:
    """The table for a paper or a pull request."""
    head, rows = cells(data)
    lines = [head, ["---" if i < 3 else "---:" for i in range(len(head))], *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*text, "", *remarks(data)]).strip() + "\n"


def write_csv(data, path) -> None:
    """One line a contender and case, in seconds and plain numbers."""
    fields = ["op", "shape", "contender", "backend", "seconds", "low", "high", "rounds"]
    fields += ["gb_per_s", "gflops", "share", "ratio", "meaningful"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator=os.linesep)
        writer.writeheader()
        for row in data["rows"]:
            writer.writerow(row | {"contender": "pyllm"})
            for name, other in row["baselines"].items():
                writer.writerow({**other, "op": row["op"], "shape": row["shape"],
                                 "contender": name})  # fmt: skip
