"""Instruction counts of the hot CPU kernels, under callgrind: they repeat exactly.

An op of a benchmark's case is called once here, and what it asks of the compiled part is written
down; `replay` repeats that under valgrind on one thread, and what the kernels execute is counted,
with nothing around them. Valgrind has no AVX-512, so the kernels of AVX2 and of the baseline are.

The numbers belong to a compiler, so they are compared only where `_C` was built by the same one.
"""

import json
import marshal
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from pyllm import _C
from pyllm.ops import registry

from . import kernels, replay
from .case import Setting
from .shapes import SHAPES

TABLE = Path(__file__).with_name("instructions.json")
GROWTH = 0.03  # a count that grew by more is a regression
ISAS = ("avx2", "baseline")
MODEL = "smollm2-135m"
# Op, and the case of it as `pyllm bench kernels` calls it. 16 tokens are a tile of 12 and a rest.
CASES = [
    ("quant_matmul", "qkv Q4_0 1 x 576 x 960"),
    ("quant_matmul", "qkv Q4_0 16 x 576 x 960"),
    ("quant_matmul", "qkv Q8_0 1 x 576 x 960"),
    ("quant_matmul", "qkv Q8_0 16 x 576 x 960"),
    ("paged_attention", "1 x 1 after 511, d64"),
    ("flash_attention", "1 x 128, d64"),
    ("rms_norm", "64 x 576, residual"),
    ("activation", "silu_mul 64 x 1536"),
    ("rope_cache", "1 tokens"),
    ("sample", "1 x 49152, greedy"),
]
# The functions that are counted: all of csrc/cpu/kernels.def.
KERNELS = (
    "layer_norm", "rms_norm", "norm_backward", "norm_backward_sum", "activation", "attention",
    "attention_combine", "rope_cache", "quantize_activation", "quant_matmul", "sample", "matmul",
    "embedding", "read_memory", "peak_arithmetic",
)  # fmt: skip


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return None


def compiler() -> str:
    """What built the compiled part: the architecture and the compiler's name and version."""
    found = re.findall(
        rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(_C.__file__).read_bytes()
    )
    names = sorted({name.decode() for name in found}) or ["unknown compiler"]
    return ", ".join([platform.machine(), *names])


def isas() -> list[str]:
    """Those of this build that valgrind can run."""
    return [name for name in ISAS if name in _C.available_isas()]


def measure(cases=None, isas_=None, progress=lambda done, total: None) -> dict:
    """Counts ``{isa: {"op, case": instructions}}``.

    Args:
        cases: of `CASES`; None for all.
        isas_: of `isas`; None for all.

    Raises:
        RuntimeError: where valgrind fails or sees no kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, calls in record(cases or CASES).items():
            files[name] = write_calls(Path(folder, f"{len(files)}.calls"), calls)
        runs = [(isa, name) for isa in isas_ or isas() for name in files]
        counts = {isa: {} for isa, _ in runs}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            counted = pool.map(lambda run: count(run[0], files[run[1]]), runs)
            for done, ((isa, name), n) in enumerate(zip(runs, counted, strict=True), 1):
                counts[isa][name] = n
                progress(done, len(runs))
    return counts


def record(cases) -> dict[str, list]:
    """The calls of the compiled part that each of `cases` makes: names and arguments."""
    setting, calls = Setting("cpu", torch.float32), {}
    for op in dict.fromkeys(op for op, _ in cases):
        torch.manual_seed(0)  # what the kernels of the baseline do depends on the data
        for case in kernels.cases_of(op, MODEL, SHAPES[MODEL], setting):
            shape = case.shape.removeprefix(f"{MODEL}, ")
            if (op, shape) in cases:
                torch.manual_seed(0)
                arguments = case.make()
                with _recorded(calls.setdefault(f"{op}, {shape}", [])):
                    case.call(arguments, "cpu")
    return calls


def write_calls(path, calls) -> Path:
    """Writes what `replay` reads."""
    path.write_bytes(marshal.dumps(calls))
    return path


@contextmanager
def _recorded(calls):
    """Appends to `calls` those that have tensors."""

    def recorder(function):
        def run(*arguments):
            if any(isinstance(a, torch.Tensor) for a in arguments):
                calls.append((function.__name__, [_plain(a) for a in arguments]))
            return function(*arguments)

        return run

    compiled = {f for f in vars(_C).values() if isinstance(f, type(_C.isa))}
    tables = [vars(_C), *(op.backends for op in registry.OPS.values())]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table |= {
                name: recorder(f) for name, f in table.items()
                if isinstance(f, Callable) and f in compiled
            }  # fmt: skip
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table |= content


def _plain(value):
    """A tensor as the arguments of `replay.Tensor`; all else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    extent = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    data = torch.as_strided(value, (extent + 1,), (1,)).view(torch.uint8).numpy().tobytes()
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), value.stride(), data


def count(isa: str, calls: Path) -> int:
    """The instructions that the kernels execute for recorded calls."""
    command = [
        "valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}",
        *(f"--toggle-collect=pyllm::{isa}::{name}(*" for name in KERNELS),
        sys.executable, "-I", "-S", replay.__file__, _C.__file__, str(calls),
    ]  # fmt: skip
    env = os.environ | {"PYLLM_CPU_ISA": isa, "PYLLM_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode or not found:
        raise RuntimeError(f"valgrind failed ({run.returncode}):\n{run.stderr}")
    if found[1] == "0":
        raise RuntimeError(f"valgrind saw no kernel of {isa}: was {_C.__file__} stripped?")
    return int(found[1])


def write(counts) -> Path:
    """Makes the counts what later ones are compared with."""
    TABLE.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=1) + "\n")
    return TABLE


def skipped(committed: dict) -> str | None:
    """Why there is nothing to compare with here, or None."""
    if why := missing():
        return why
    if committed["compiler"] != compiler():
        return f"committed for {committed['compiler']}, this is {compiler()}"
    return None


def changes(before: dict, counts: dict) -> list[tuple]:
    """``(isa, case, before, now, state)`` of all counts, both given as `measure` returns them:
    "grew"; "new", where there is none before; "fell", which is worth an update; or "".
    """
    rows = []
    for isa, cases in counts.items():
        for case, now in cases.items():
            old = before.get(isa, {}).get(case)
            if old is None:
                state = "new"
            else:
                state = "grew" if now > old * (1 + GROWTH) else "fell" * (now < old * (1 - GROWTH))
            rows.append((isa, case, old, now, state))
    return rows


def table(rows):
    """What `changes` found, as a rich table."""
    from rich.table import Table

    t = Table(title=f"instructions under callgrind, built by {compiler()}", title_justify="left")
    for name in ("instruction set", "case", "committed", "now", "change", ""):
        t.add_column(name, justify="right" if name in ("committed", "now", "change") else "left")
    for isa, case, old, now, state in rows:
        change = f"{now / old - 1:+.2%}" if old else ""
        t.add_row(isa, case, f"{old:,}" if old else "", f"{now:,}", change, state)
    return t


def report(console) -> bool:
    """Counts and prints beside the committed counts; False where one grew or there is none."""
    committed = json.loads(TABLE.read_text())
    if why := skipped(committed):
        console.print(f"SKIPPED: instruction counts: {why}", highlight=False)
        return True
    rows = changes(committed["counts"], measure())
    console.print(table(rows))
    wrong = [row for row in rows if row[-1] in ("grew", "new")]
    if wrong:
        console.print(
            f"{len(wrong)} of {len(rows)} counts grew by over {GROWTH:.0%} or are new; if that is "
            "meant: python -m bench regress --instructions --update"
        )
    return not wrong


def update(console) -> None:
    """Counts, prints beside the committed counts, and commits the new ones.

    Raises:
        ValueError: where nothing can be counted.
    """
    if why := missing():
        raise ValueError(f"--update: {why}")
    counts = measure()
    console.print(table(changes(json.loads(TABLE.read_text())["counts"], counts)))
    console.print(str(write(counts)))
