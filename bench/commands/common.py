"""What the commands share: the app, their options, and how one measures, prints and writes."""

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


@app.callback()
def about():
    """Measures kernels and whole models, beside their peers. --emulate and --profile may
    have their dashes."""


def measured(measure, table, out, model, threads, **options):
    """Measures, prints, and writes JSON if asked to."""
    import inspect

    from .. import models, record

    threads = thread_count(threads)
    where = record.environment(threads, options.get("other"))
    with spinner() as status:
        if "progress" in inspect.signature(measure).parameters:
            options["progress"] = status.update
        data = measure(*([models.path_of(model)] if model else []), threads=threads, **options)
    tables = table(data)
    console = make_console()
    for t in tables if isinstance(tables, tuple) else [tables]:
        console.print(t)
    for line in record.doubts(where):
        console.print(line)
    if out:
        record.write(out, data, where)


def thread_count(threads):
    from pyllm import _C

    return threads or _C.num_threads()


def make_console(width=120):
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def spinner():
    from rich.console import Console

    return Console(stderr=True).status("")


def as_table(title, head, rows, left=1):
    """Texts as a rich table, the first `left` columns to the left."""
    from rich.table import Table

    t = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        t.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        t.add_row(*row)
    return t
