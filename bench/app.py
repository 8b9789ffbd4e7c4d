"""The commands of ``pyllm bench``. Each measures, prints, and writes JSON if asked to."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[
    str,
    typer.Option("--model", help="smollm2-135m, smollm2-135m-q4_0, random-1b-q4_0, "
    "random-1b-q8_0, another known name, a GGUF file or a directory."),
]  # fmt: skip
Threads = Annotated[int | None, typer.Option(help="Default: all that this process may use.")]
Rounds = Annotated[int, typer.Option(help="After one to warm up.", min=1)]
Minutes = Annotated[float | None, typer.Option(help="End after the round that passes them.")]
Out = Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")]
Engines = Annotated[list[str] | None, typer.Option("--engine", help="Only these; repeatable.")]
Other = Annotated[
    str | None, typer.Option(help="Python of another environment, for peers that live there.")
]
DEFAULT = "smollm2-135m"


def main(arguments):
    """Runs a command."""
    if arguments[:1] in (["--profile"], ["--emulate"]):
        arguments = [arguments[0].removeprefix("--"), *arguments[1:]]
    return app(args=arguments, prog_name="pyllm bench", standalone_mode=False)


@app.callback()
def about():
    """Measures kernels and whole models, beside their peers. --emulate and --profile may
    have their dashes."""


@app.command()
def emulate(
    op: Annotated[str, typer.Argument(help="Its CUDA kernels; all: those of every op.")] = "all",
    update: Annotated[bool, typer.Option(help="Make it what the tests compare with.")] = False,
):
    """The memory traffic of CUDA kernels, counted by the emulator: needs no GPU."""
    from . import emulate as e

    if op != "all" and op not in e.CASES:
        raise ValueError(f"expected all, {', '.join(e.CASES)}; got {op}")
    if update and op != "all":
        raise ValueError("--update: expected all ops")
    counted = {name: e.measure(name) for name in (e.CASES if op == "all" else [op])}
    console = _console()
    for name, cases in counted.items():
        console.print(e.table(name, cases))
    if update:
        print(e.write(counted))


@app.command(name="list")
def list_():
    """The kernels, shapes and baselines that there are, and which are absent and why."""
    import torch
    from rich.table import Table

    from . import baselines, kernels, shapes

    console = _console()
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

    from . import limits, record

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = _threads(threads)
    where = record.environment(threads)
    found = limits.measure(threads) if device == "cpu" else limits.measure_cuda()
    print(f"{device}, {threads} threads")
    for name, value in found.items():
        print(f"{name:>16} {value:10.1f}")
    if out:
        record.write(out, {"limits": found}, where)


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

    from . import kernels, record
    from . import shapes as s

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = _threads(threads)
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
        console = _console(160)
        if data["rows"]:
            console.print(kernels.table(data))
        for line in kernels.remarks(data):
            console.print(line)
        if where["contended"]:
            console.print(f"contended: others kept {where['busy_cores']:.1f} cores busy before")
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
    from . import machine_code as m

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
    console = _console(200)
    for t in m.table(data):
        console.print(t)
    if update:
        print(m.write(data))


@app.command(name="end_to_end")
def end_to_end(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, minutes: Minutes = None,
    engine: Engines = None, peers_python: Other = None, out: Out = None,
):  # fmt: skip
    """pp512, tg128 and more, in the manner of llama-bench; peers that are installed take turns."""
    from . import end_to_end as e2e

    _run(
        e2e.report, e2e.table, out, model, threads, rounds=rounds, minutes=minutes,
        engines=engine, other=peers_python,
    )  # fmt: skip


@app.command(name="gpu_decode")
def gpu_decode(
    shape: Annotated[str, typer.Option(help="llama3-8b or tiny.")] = "llama3-8b",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu for a dry run.")] = "cuda",
    backend: Annotated[str | None, typer.Option(help="Of all ops; several joined by commas.")] = (
        None
    ),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(help="What is not begun by then is left out.")] = 7,
    scale: Annotated[int, typer.Option(help="Divides contexts and batches: for dry runs.")] = 1,
    peers: Annotated[bool, typer.Option(help="Hugging Face's model too.")] = True,
    out: Out = None,
):  # fmt: skip
    """A large model with random weights on a GPU: decoding, a long prompt, jitter; predictions."""
    from . import gpu_decode as g
    from . import record

    where = record.environment(_threads(None))
    with _status() as status:
        data = g.measure(
            shape, device, backend, dtype, minutes, peers, scale, progress=status.update
        )
    _console(200).print(g.table(data))
    if out:
        record.write(out, data, where)


@app.command()
def context(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, minutes: Minutes = None,
    out: Out = None,
):  # fmt: skip
    """Decoding after 16 to 1900 tokens."""
    from . import end_to_end as e2e

    _run(
        e2e.report, e2e.table, out, model, threads, rounds=rounds, minutes=minutes,
        engines=list(e2e.SAME_BYTES), tests=e2e.DEPTHS,
    )  # fmt: skip


@app.command()
def interference(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, out: Out = None
):
    """Decoding while another process keeps a core busy."""
    from . import interference as i

    _run(i.measure, i.table, out, model, threads, rounds=rounds)


@app.command()
def startup(model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, out: Out = None):
    """From process start to first token, and peak memory."""
    from . import startup as s

    _run(s.measure, s.tables, out, model, threads, rounds=rounds)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.")] = DEFAULT,
    depth: int = 512, batch: int = 1, threads: Threads = None, out: Out = None,
):  # fmt: skip
    """Where each microsecond of a decoding step goes, by op."""
    from . import profile as p

    _run(p.measure, p.table, out, model, threads, depth=depth, batch=batch)


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.")] = DEFAULT,
    text: Annotated[Path | None, typer.Option(help="A text; default: Alice in Wonderland.")] = None,
    head_bits: Annotated[int, typer.Option(help="Of the head that is compared: 4 or 8.")] = 4,
    threads: Threads = None, rounds: Rounds = 5, out: Out = None,
):  # fmt: skip
    """What an output head of 4 bits costs in perplexity, and gains in speed."""
    from . import perplexity as p

    _run(p.measure, p.table, out, model, threads, text=text, head_bits=head_bits, rounds=rounds)


@app.command(name="prompt_lookup")
def prompt_lookup(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5,
    k: Annotated[int, typer.Option(help="Guesses at most.")] = 15, temperature: float = 0.0,
    out: Out = None,
):  # fmt: skip
    """Decoding with guesses from the prompt, beside plain decoding."""
    from . import prompt_lookup as p

    _run(p.measure, p.table, out, model, threads, rounds=rounds, k=k, temperature=temperature)


@app.command(name="drop_in")
def drop_in(
    case: Annotated[list[str] | None, typer.Option(help="Only this: minilm, smollm2.")] = None,
    threads: Threads = None, rounds: Rounds = 7, out: Out = None,
):  # fmt: skip
    """Models of Hugging Face transformers as they are and patched."""
    from . import drop_in as d

    _run(d.measure, d.table, out, None, threads, cases=case, rounds=rounds)


@app.command(name="all")
def everything(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder; default: bench/results/<device> in the repository, elsewhere "
            "bench-results/<device> in the current folder."
        ),
    ] = None,
    threads: Threads = None,
    rounds: Rounds = 7,
    minutes: Annotated[
        float, typer.Option(help="For what is timed in rounds; the rest takes ten.")
    ] = 25,
    model: Annotated[list[str] | None, typer.Option(help="Default: all four; repeatable.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this: profile, end_to_end, startup, ...; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Leave out what this commit has been timed for.")] = (
        False
    ),
    peers_python: Other = None,
):
    """Everything, on every model, into a folder of results; then its plots and its page."""
    from . import models, record
    from .suite import run

    threads = _threads(threads)
    folder = out or record.RESULTS / record.device(threads)
    with _status() as status:
        run(
            folder, model or models.NAMES, threads=threads, rounds=rounds, minutes=minutes,
            only=part, resume=resume, other=peers_python, progress=status.update,
        )  # fmt: skip
    plot(folder.parent)


@app.command()
def plot(
    results: Annotated[
        Path | None, typer.Argument(help="The folder with a folder a device; default: as of all.")
    ] = None,
):
    """Draw all results, and write their page."""
    from . import plot as p
    from . import record
    from . import results as r

    results = results or record.RESULTS
    for folder in sorted(f for f in results.iterdir() if f.is_dir()):
        for path in p.draw(folder):
            print(path)
    print(r.write(results))
    if record.CHECKOUT and results.resolve() == record.RESULTS.resolve():
        print(r.write_decode_step(results, record.CHECKOUT / "csrc/cpu/README.md"))
        print(r.write_headline(results, record.CHECKOUT / "README.md"))


@app.command(name="compare")
def compare_(
    a: Annotated[Path, typer.Argument(help="A result of `kernels` or `end_to_end`.")],
    b: Annotated[Path, typer.Argument(help="Another of the same.")],
    absolute: Annotated[bool, typer.Option(help="Compare times, of one device.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
):
    """Two results, case by case, by their ratios to baselines of the same run."""
    from . import compare as c

    one, other = c.read(a), c.read(b)
    rows = c.changes(one, other, absolute)
    if markdown:
        print(c.markdown(one, other, rows, absolute), end="")
        return
    console = _console(160)
    if rows:
        console.print(c.table(one, other, rows, absolute))
    for line in c.remarks(one, other, rows):
        console.print(line, highlight=False)


@app.command(name="regress")
def regress_(
    new: Annotated[list[Path] | None, typer.Argument(help="Results of `kernels`.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="The folder with the committed ones; default: as of all.")
    ] = None,
    instructions: Annotated[
        bool, typer.Option(help="Count those of the hot CPU kernels under valgrind.")
    ] = False,
    update: Annotated[bool, typer.Option(help="Make these counts the committed ones.")] = False,
):
    """Exit code 1 if kernels became slower than the committed results, or longer."""
    from . import regress as r

    if update and not instructions:
        raise ValueError("--update: expected --instructions with it")
    if not new and not instructions:
        raise ValueError("expected results of `pyllm bench kernels`, or --instructions")
    console = _console(160)
    fine = [r.report(path, results, console) for path in new or ()]
    if instructions:
        from . import instructions as i

        if update:
            i.update(console)
        else:
            fine.append(i.report(console))
    if not all(fine):
        raise typer.Exit(1)


def _run(measure, table, out, model, threads, **options):
    """Measures, prints, and writes JSON if asked to."""
    import inspect

    from . import models, record

    threads = _threads(threads)
    where = record.environment(threads, options.get("other"))
    with _status() as status:
        if "progress" in inspect.signature(measure).parameters:
            options["progress"] = status.update
        data = measure(*([models.path_of(model)] if model else []), threads=threads, **options)
    tables = table(data)
    console = _console()
    for t in tables if isinstance(tables, tuple) else [tables]:
        console.print(t)
    if where["contended"]:
        console.print(f"contended: others kept {where['busy_cores']:.1f} cores busy before")
    if out:
        record.write(out, data, where)


def _threads(threads):
    from pyllm import _C

    return threads or _C.num_threads()


def _console(width=120):
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def _status():
    from rich.console import Console

    return Console(stderr=True).status("")
