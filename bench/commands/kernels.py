"""Commands about single kernels, and what a machine can do."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Out, Rounds, Threads, app, as_table, make_console, spinner, thread_count


@app.command()
def emulate(
    op: Annotated[str, typer.Argument(help="Its CUDA kernels; all: those of every op.")] = "all",
    update: Annotated[bool, typer.Option(help="Make it what the tests compare with.")] = False,
):
    """The memory traffic of CUDA kernels, counted by the emulator: needs no GPU."""
    from .. import emulate as e

    if op != "all" and op not in e.CASES:
        raise ValueError(f"expected all, {', '.join(e.CASES)}; got {op}")
    if update and op != "all":
        raise ValueError("--update: expected all ops")
    counted = {name: e.measure(name) for name in (e.CASES if op == "all" else [op])}
    console = make_console()
    for name, cases in counted.items():
        console.print(e.table(name, cases))
    if update:
        print(e.write(counted))


@app.command(name="list")
def list_():
    """The kernels, shapes and baselines that there are, and which are absent and why."""
    import torch
    from rich.table import Table

    from .. import baselines, kernels, shapes

    console = make_console()
    console.print("[bold]ops[/bold]", ", ".join(kernels.OPS))
    t = Table(title="shapes", title_justify="left", box=None)
    for name in ("name", "hidden", "intermediate", "heads", "KV heads", "head dim", "vocabulary"):
        t.add_column(name, justify="left" if name == "name" else "right")
    for name, shape in shapes.SHAPES.items():
        t.add_row(name, *map(str, vars(shape).values()))
    console.print(t)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t = Table(title=f"baselines on {device}", title_justify="left", box=None)
    for name in ("name", "ops", ""):
        t.add_column(name)
    for b in baselines.BASELINES:
        why = b.missing(device)
        state = f"absent: {why}" if why else "if asked for" if b.optional else ""
        t.add_row(b.name, ", ".join(b.ops), state)
    console.print(t)


@app.command(name="limits")
def limits_(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any.")] = None,
    threads: Threads = None, out: Out = None,
):  # fmt: skip
    """What this machine can do at most: bandwidth of reading, and arithmetic by type."""
    import torch

    from .. import limits, record

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = thread_count(threads)
    where = record.environment(threads)
    found = limits.measure(threads) if device == "cpu" else limits.measure_cuda()
    print(f"{device}, {threads} threads")
    for name, value in found.items():
        print(f"{name:>16} {value:10.1f}")
    if out:
        record.write(out, {"limits": found}, where)


@app.command(name="overhead")
def overhead_(threads: Threads = None, rounds: Rounds = 15, out: Out = None):
    """What a call of each op costs beside its kernel, on one row."""
    from .. import overhead, record

    threads = thread_count(threads)
    where = record.environment(threads)
    with spinner() as status:
        data = overhead.measure(threads, rounds, status.update)
    title = f"calls on one row; beside the kernel at most {data['limit_us']:.0f} µs"
    make_console().print(as_table(title, overhead.HEAD, overhead.cells(data)))
    if out:
        record.write(out, data, where)


@app.command(name="modules")
def modules_(threads: Threads = None, rounds: Rounds = 15, out: Out = None):
    """Norms as modules, beside those of torch, from one row to a prompt."""
    from .. import modules, record

    threads = thread_count(threads)
    where = record.environment(threads)
    with spinner() as status:
        data = modules.measure(threads, rounds, status.update)
    make_console().print(
        as_table(
            f"modules, {threads} threads, {rounds} rounds", modules.HEAD, modules.cells(data), 3
        )
    )
    if out:
        record.write(out, data, where)


@app.command(name="kernels")
def kernels_(
    op: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Models, joined by commas, or sizes; see `list`.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of ours; default: the one in use.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Joined by commas, or none; default: the quick ones.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any.")] = None,
    match: Annotated[str | None, typer.Option(help="Only cases that have this in them.")] = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="0: only verify.", min=0)] = 15,
    resume: Annotated[bool, typer.Option(help="Add what the JSON does not have yet, if it is of "
                                         "this commit and device.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON there, and CSV beside it; default: bench-results/.")
    ] = None,
):  # fmt: skip
    """Kernels beside their baselines, verified first. JSON and CSV are always written."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from .. import kernels, record
    from .. import shapes as s

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = thread_count(threads)
    where = record.environment(threads)
    name = "-".join(["kernels", *sorted(op or [])]) + ".json"
    out = out or Path("bench-results") / record.device(threads, device) / name
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("limits", total=None)
        data = kernels.measure(
            op, s.parse(shapes) if shapes else None, dtype, backend, baseline, device=device,
            threads=threads, rounds=rounds, match=match,
            before=record.before(out, where) if resume else None,
            save=lambda data: record.write(out, data, where),
            progress=lambda done, total, text: bar.update(
                task, completed=done, total=total, description=text
            ),
        )  # fmt: skip
    if markdown:
        print(kernels.markdown(data), end="")
    else:
        console = make_console(160)
        if data["rows"]:
            console.print(kernels.table(data))
        for line in kernels.remarks(data):
            console.print(line)
        for line in record.doubts(where):
            console.print(line)
    record.write(out, data, where)
    kernels.write_csv(data, out.with_suffix(".csv"))
    print(out, file=sys.stderr)
    if data["failed"]:
        raise typer.Exit(1)


@app.command()
def machine_code(
    group: Annotated[
        list[str] | None, typer.Argument(help="Such as cuda/rms_norm/sm_80; all by default.")
    ] = None,
    update: Annotated[bool, typer.Option(help="Make it what the tests compare with.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the compiled kernels stay.")] = Path(
        "build/machine_code"
    ),
):
    """Registers, spills and instructions of the GPU kernels: needs their compilers, and no GPU."""
    from .. import machine_code as m

    reasons = [f"{source}: {why}" for source in m.SOURCES if (why := m.missing(source))]
    known = m.groups()
    if not known:
        raise ValueError(f"machine-code: {'; '.join(reasons)}")
    for name in group or ():
        if name not in known:
            raise ValueError(f"machine-code: expected one of {', '.join(known)}; got {name}")
    if update and group:
        raise ValueError("--update: expected all groups")
    data = m.measure(folder, group or known)
    console = make_console(200)
    for t in m.table(data):
        console.print(t)
    if update:
        print(m.write(data))


@app.command()
def tune(
    op: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    shape: Annotated[list[str], typer.Option(help="Of a model; repeatable.")] = ("llama3-8b",),
    dtype: Annotated[list[str], typer.Option(help="Repeatable.")] = ("bfloat16",),
    match: Annotated[str | None, typer.Option(help="Only shapes with this in them.")] = None,
    rounds: Rounds = 7,
    out: Annotated[Path | None, typer.Option(help="Default: the user's cache.")] = None,
):
    """Configurations of the Triton kernels, measured on this GPU and kept for it as JSON."""
    import torch

    from pyllm.kernels import configurations

    from .. import kernels, shapes
    from ..tune import tune as measured

    for option, names, known in (
        ("--op", op or (), kernels.OPS), ("--shape", shape, shapes.SHAPES),
        ("--dtype", dtype, kernels.DTYPES),
    ):  # fmt: skip
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: expected one of {', '.join(known)}; got {name}")
    if not torch.cuda.is_available():
        raise ValueError("tune: expected a CUDA device; there is none")
    found = measured(op, shape, dtype, match=match, rounds=rounds, say=make_console().print)
    name = torch.cuda.get_device_name()
    out = out or configurations.files(name)[1]
    configurations.write(out, name, found)
    print(out)
