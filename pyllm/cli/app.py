"""The commands. Each imports what it needs when it runs, so that ``--help`` is quick."""

import json
import sys
import time
from contextlib import contextmanager
from typing import Annotated

import typer

from pyllm import DEFAULT_MODEL

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hand-written kernels for language models, and a runtime that decodes with them.",
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A known name, a GGUF file, a directory or a hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
MaxContext = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")]
System = Annotated[str | None, typer.Option(help="The system message of the conversation.")]
Quantize = Annotated[
    str | None, typer.Option(help="int8 or int4: round matrices that the file keeps unquantized.")
]
HeadBits = Annotated[
    int | None, typer.Option(help="4: a faster output head; `pyllm bench perplexity`: its cost.")
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", "-n")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest that together reach this.")]
MinP = Annotated[float, typer.Option(help="Keep those this times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Over 1 discourages repetition.")]
Seed = Annotated[int | None, typer.Option(help="Of the random generator.")]
PromptLookup = Annotated[
    int | None, typer.Option(help="Guess this many tokens ahead from what was said; same text.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    model: Model = DEFAULT_MODEL,
    raw: Annotated[bool, typer.Option(help="Continue the text; no chat template.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    prompt_lookup: PromptLookup = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end of the text.")] = False,
    max_context: MaxContext = None,
    quantize: Quantize = None,
    head_bits: HeadBits = None,
    as_json: Json = False,
    debug: Debug = False,
):
    """Answer one prompt."""
    params, load = _options(locals())
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt or not prompt.strip():
        raise ValueError("prompt: expected some text, got an empty string")
    params |= {"stop_strings": tuple(stop or ()), "ignore_eos": ignore_eos}
    llm = _load(model, params, load)
    if raw or not llm.tokenizer.chat_template:
        if system:
            raise ValueError("--system: expected a model with a chat template and no --raw")
        ids = llm.tokenizer.encode(prompt)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        ids = llm.chat_ids([*messages, {"role": "user", "content": prompt}])
    with llm.stream(ids, **params) as stream:
        try:
            for piece in stream:
                if not as_json:
                    print(piece, end="", flush=True)
        finally:
            if not as_json:
                print(flush=True)
                _print_usage(stream.completion.usage)
    if as_json:
        print(json.dumps(_as_dict(stream.completion), ensure_ascii=False))


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    prompt_lookup: PromptLookup = None,
    max_context: MaxContext = None,
    quantize: Quantize = None,
    head_bits: HeadBits = None,
    debug: Debug = False,
):
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    params, load = _options(locals())
    from pyllm.cli.chat import converse

    converse(_load(model, params, load), system, params)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="As --model elsewhere.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens to size the cache for.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences to size the cache for.")] = 1,
    as_json: Json = False,
    debug: Debug = False,
):
    """Show the machine and its backends, or what a model will take, before loading it."""
    from pyllm.cli import report

    data = report.machine() if model is None else report.model(model, context, batch)
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        report.show(data)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="A known name.")] = DEFAULT_MODEL,
    force: Annotated[bool, typer.Option(help="Fetch it again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
):
    """Fetch a model into the cache."""
    from pyllm.loading import pull as fetch

    path = fetch(model, force=force)
    print(json.dumps({"model": model, "path": str(path)}) if as_json else path)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context, debug: Debug = False):
    """Measure kernels and whole models, beside their peers; --profile [MODEL] profiles a step."""
    from pyllm.bench.app import main

    return main(context.args)


def _options(given):
    """Of a command's arguments: those of `SamplingParams`, and those of `LLM`."""
    sampling = (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    )  # fmt: skip
    params = {name: given[name] for name in sampling}
    params["prompt_lookup_num_tokens"] = given["prompt_lookup"]
    return params, {name: given[name] for name in ("max_context", "quantize", "head_bits")}


def _load(model, params, options):
    from pyllm.runtime.llm import LLM
    from pyllm.runtime.sampling import SamplingParams

    SamplingParams.from_arguments(params)  # a bad value is told before a model is fetched
    with _progress_bar("loading") as progress:
        return LLM(model, progress=progress, **options)


@contextmanager
def _progress_bar(what):
    """A bar on a terminal, for what takes longer than a moment; rich is imported only then."""
    begin, bar, task = time.monotonic(), None, None

    def update(done, total):
        nonlocal bar, task
        if bar is None and sys.stderr.isatty() and time.monotonic() - begin > 1:
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            task = bar.add_task(what, total=total)
            bar.start()
        if bar is not None:
            bar.update(task, completed=done)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _print_usage(usage):
    prefilled = usage.prompt_tokens - usage.cached_tokens
    speed = prefilled / usage.prefill_seconds if usage.prefill_seconds else 0.0
    print(
        f"[{usage.completion_tokens} tokens, {usage.decode_tokens_per_second:.0f} tokens/s; "
        f"prompt {usage.prompt_tokens} tokens, {speed:.0f} tokens/s]",
        file=sys.stderr,
    )


def _as_dict(completion):
    usage = completion.usage
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            **vars(usage),
            "decode_tokens_per_second": usage.decode_tokens_per_second,
        },
    }
