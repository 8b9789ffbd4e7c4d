"""``python -m bench``: measures kernels and whole models, beside their peers."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Threads = Annotated[int | None, typer.Option(help="Default: all that this process may use.")]
Out = Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")]


@app.callback()
def main():
    """Measures kernels and whole models, beside their peers."""


@app.command(name="end_to_end")
def end_to_end(
    model: Annotated[str, typer.Argument(help="A known name, a GGUF file or a directory.")] = (
        "smollm2-135m"
    ),
    threads: Threads = None,
    rounds: int = 5,
    engine: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    out: Out = None,
):
    """pp512, tg128 and more, in the manner of llama-bench; peers that are installed take turns."""
    from rich.console import Console

    from bench import end_to_end as e2e
    from pyllm import _C
    from pyllm.loading import resolve

    console = Console(stderr=True)
    with console.status("") as status:
        data = e2e.report(
            resolve(model), threads=threads or _C.num_threads(), rounds=rounds, engines=engine,
            progress=status.update,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(e2e.table(data))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    app()
