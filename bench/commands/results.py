"""Commands about what was measured: all of it, plots, comparisons."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Other, Rounds, Threads, app, make_console, spinner, thread_count


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
    from .. import models, record
    from ..suite import run

    threads = thread_count(threads)
    folder = out or record.RESULTS / record.device(threads)
    with spinner() as status:
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
    from .. import plot as p
    from .. import record
    from .. import results as r

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
    from .. import compare as c

    one, other = c.read(a), c.read(b)
    rows = c.changes(one, other, absolute)
    if markdown:
        print(c.markdown(one, other, rows, absolute), end="")
        return
    console = make_console(160)
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
    from .. import regress as r

    if update and not instructions:
        raise ValueError("--update: expected --instructions with it")
    if not new and not instructions:
        raise ValueError("expected results of `pyllm bench kernels`, or --instructions")
    console = make_console(160)
    fine = [r.report(path, results, console) for path in new or ()]
    if instructions:
        from .. import instructions as i

        if update:
            i.update(console)
        else:
            fine.append(i.report(console))
    if not all(fine):
        raise typer.Exit(1)
