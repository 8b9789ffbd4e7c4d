"""Commands about whole models."""

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT,
    Engines,
    Minutes,
    Model,
    Other,
    Out,
    Rounds,
    Threads,
    app,
    make_console,
    measured,
    spinner,
    thread_count,
)


@app.command(name="end_to_end")
def end_to_end(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, minutes: Minutes = None,
    engine: Engines = None, peers_python: Other = None, out: Out = None,
):  # fmt: skip
    """pp512, tg128 and more, in the manner of llama-bench; peers that are installed take turns."""
    from .. import end_to_end as e2e

    measured(
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
    from .. import gpu_decode as g
    from .. import record

    where = record.environment(thread_count(None))
    with spinner() as status:
        data = g.measure(
            shape, device, backend, dtype, minutes, peers, scale, progress=status.update
        )
    make_console(200).print(g.table(data))
    if out:
        record.write(out, data, where)


@app.command()
def context(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, minutes: Minutes = None,
    out: Out = None,
):  # fmt: skip
    """Decoding after 16 to 1900 tokens."""
    from .. import end_to_end as e2e

    measured(
        e2e.report, e2e.table, out, model, threads, rounds=rounds, minutes=minutes,
        engines=list(e2e.SAME_BYTES), tests=e2e.DEPTHS,
    )  # fmt: skip


@app.command()
def interference(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, out: Out = None
):
    """Decoding while another process keeps a core busy."""
    from .. import interference as i

    measured(i.measure, i.table, out, model, threads, rounds=rounds)


@app.command()
def startup(model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5, out: Out = None):
    """From process start to first token, and peak memory."""
    from .. import startup as s

    measured(s.measure, s.tables, out, model, threads, rounds=rounds)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.")] = DEFAULT,
    depth: int = 512, batch: int = 1, threads: Threads = None, out: Out = None,
):  # fmt: skip
    """Where each microsecond of a decoding step goes, by op."""
    from .. import profile as p

    measured(p.measure, p.table, out, model, threads, depth=depth, batch=batch)


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.")] = DEFAULT,
    text: Annotated[Path | None, typer.Option(help="A text; default: Alice in Wonderland.")] = None,
    head_bits: Annotated[int, typer.Option(help="Of the head that is compared: 4 or 8.")] = 4,
    threads: Threads = None, rounds: Rounds = 5, out: Out = None,
):  # fmt: skip
    """What an output head of 4 bits costs in perplexity, and gains in speed."""
    from .. import perplexity as p

    measured(p.measure, p.table, out, model, threads, text=text, head_bits=head_bits, rounds=rounds)


@app.command(name="prompt_lookup")
def prompt_lookup(
    model: Model = DEFAULT, threads: Threads = None, rounds: Rounds = 5,
    k: Annotated[int, typer.Option(help="Guesses at most.")] = 15, temperature: float = 0.0,
    out: Out = None,
):  # fmt: skip
    """Decoding with guesses from the prompt, beside plain decoding."""
    from .. import prompt_lookup as p

    measured(p.measure, p.table, out, model, threads, rounds=rounds, k=k, temperature=temperature)


@app.command(name="drop_in")
def drop_in(
    case: Annotated[list[str] | None, typer.Option(help="Only this: minilm, smollm2.")] = None,
    threads: Threads = None, rounds: Rounds = 7, out: Out = None,
):  # fmt: skip
    """Models of Hugging Face transformers as they are and patched."""
    from .. import drop_in as d

    measured(d.measure, d.table, out, None, threads, cases=case, rounds=rounds)
