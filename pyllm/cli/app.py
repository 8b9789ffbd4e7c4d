"""The commands. Each imports what it needs when it runs, so that ``--help`` is quick.

On argparse because nothing else starts as fast: with typer, the first token comes 0.1 s later.
"""

import argparse
import gc
import json
import sys
import time
from contextlib import contextmanager

from pyllm import DEFAULT_MODEL
from pyllm.collector import paused_collector


def run(arguments: list[str]) -> int:
    """Runs the command line; the exit code. SystemExit after ``--help`` and bad arguments."""
    if arguments[:1] == ["bench"]:
        from pyllm.bench.app import main

        return main([a for a in arguments[1:] if a != "--debug"])
    options = _parser().parse_args(arguments or ["--help"])
    options.command(options)
    return 0


def generate(options):
    """Answer one prompt."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt or not prompt.strip():
        raise ValueError("prompt: expected some text, got an empty string")
    params = _sampling(options)
    params |= {"stop_strings": tuple(options.stop), "ignore_eos": options.ignore_eos}
    llm = _load(options, params)
    if options.raw or not llm.tokenizer.chat_template:
        if options.system:
            raise ValueError("--system: expected a model with a chat template and no --raw")
        ids = llm.tokenizer.encode(prompt)
    else:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        ids = llm.chat_ids([*messages, {"role": "user", "content": prompt}])
    with llm.stream(ids, **params) as stream:
        try:
            for piece in stream:
                if not options.json:
                    print(piece, end="", flush=True)
        finally:
            if not options.json:
                print(flush=True)
                _print_usage(stream.completion.usage)
    if options.json:
        print(json.dumps(_as_dict(stream.completion), ensure_ascii=False))


def chat(options):
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    from pyllm.cli.chat import converse

    params = _sampling(options)
    converse(_load(options, params), options.system, params)


def emulate(options):
    """Run CUDA kernels on the CPU: find races and bad accesses, and count their traffic."""
    from pyllm import emulator

    flags = [f"-D{name}" for name in options.define]
    program = emulator.run(options.source, options.harness, seeds=options.seeds, flags=flags)
    for launch in program.launches:
        print(launch.table())
    print(f"no errors in {options.seeds} orders of the lanes", file=sys.stderr)


def info(options):
    """Show the machine and its backends, or what a model will take, before loading it."""
    from pyllm.cli import report

    if options.model is None:
        data = report.machine()
    else:
        data = report.model(options.model, options.context, options.batch)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        report.show(data)


def pull(options):
    """Fetch a model into the cache."""
    from pyllm.loading import pull as fetch

    path = fetch(options.model, force=options.force)
    print(json.dumps({"model": options.model, "path": str(path)}) if options.json else path)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        # An abbreviation that works today would be ambiguous after the next option.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message} ('{self.prog} --help' lists what there is)\n")


def _parser():
    parser = _Parser(
        prog="pyllm",
        description="Hand-written kernels for language models, and a runtime that uses them.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command):
        sub = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__
        )
        sub.set_defaults(command=command)
        sub.add_argument("--debug", action="store_true", help="Show tracebacks.")
        return sub.add_argument

    name = "A known name, a GGUF file, a directory or a hub id."
    as_json = {"action": "store_true", "help": "Print JSON for a program to read."}

    option = add(generate)
    option("prompt", help="The prompt; '-' reads it from stdin.")
    option("--raw", action="store_true", help="Continue the text; no chat template.")
    option("--stop", action="append", default=[], help="End before this text; may be repeated.")
    option("--ignore-eos", action="store_true", help="Go on after the end of the text.")
    option("--json", **as_json)
    _add_model_options(option, name, max_new_tokens=256)

    option = add(chat)
    _add_model_options(option, name, max_new_tokens=None)

    option = add(info)
    option("model", nargs="?", help=name)
    option("--context", type=int, help="Tokens to size the cache for.")
    option("--batch", type=int, default=1, help="Sequences to size it for; default: 1.")
    option("--json", **as_json)

    option = add(pull)
    option("model", nargs="?", default=DEFAULT_MODEL, help="A known name.")
    option("--force", action="store_true", help="Fetch it again.")
    option("--json", **as_json)

    option = add(emulate)
    option("source", help="A .cu file.")
    option("harness", nargs="?", help="A .py file with run(program); default: the one beside it.")
    option("--seeds", type=int, default=3, help="In how many orders lanes run. Default: 3.")
    option("-D", dest="define", action="append", default=[], help="NAME or NAME=VALUE.")
    commands.add_parser(  # for the help: `run` hands its arguments on
        "bench",
        help="Measure kernels and whole models, beside their peers; --profile [MODEL] profiles a "
        "step.",
    )
    return parser


def _add_model_options(option, name, max_new_tokens):
    option("--model", "-m", default=DEFAULT_MODEL, help=f"{name} Default: %(default)s.")
    option("--system", help="The system message of the conversation.")
    option("--device", help="cpu, cuda or cuda:1. Default: $PYLLM_DEVICE, or else cpu.")
    option("--max-context", type=int, help="Tokens of prompt and answer together.")
    option("--quantize", help="int8 or int4: round matrices that the file keeps unquantized.")
    option(
        "--head-bits", type=int,
        help="4: a faster output head; `pyllm bench perplexity`: its cost.",
    )  # fmt: skip
    option("--max-new-tokens", "-n", type=int, default=max_new_tokens, help="Default: %(default)s.")
    option("--temperature", type=float, default=0.0, help="0 takes the most likely token.")
    option("--top-k", type=int, default=0, help="Keep the k most likely tokens; 0 keeps all.")
    option("--top-p", type=float, default=1.0, help="Keep the likeliest that together reach this.")
    option(
        "--min-p", type=float, default=0.0, help="Keep those this times as likely as the likeliest."
    )
    option("--repetition-penalty", type=float, default=1.0, help="Over 1 discourages repetition.")
    option("--seed", type=int, help="Of the random generator.")
    option(
        "--prompt-lookup", type=int, dest="prompt_lookup_num_tokens",
        help="Guess this many tokens ahead from what was said; same text.",
    )  # fmt: skip


_SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "prompt_lookup_num_tokens",
)  # fmt: skip


def _sampling(options):
    return {name: getattr(options, name) for name in _SAMPLING}


def _load(options, params):
    from pyllm.loading import open_checkpoint, resolve
    from pyllm.memory import populated
    from pyllm.runtime.sampling import SamplingParams

    SamplingParams.from_arguments(params)  # a bad value is told before a model is fetched
    path = resolve(options.model)
    # Importing PyTorch takes one core a second; until then nothing here has done so.
    with paused_collector(), populated(open_checkpoint(path).packed_nbytes):
        from pyllm.runtime.llm import LLM

        with _progress_bar("loading") as progress:
            llm = LLM(
                path, progress=progress, device=options.device,
                max_context=options.max_context, quantize=options.quantize,
                head_bits=options.head_bits,
            )  # fmt: skip
        llm.checkpoint.tokenizer()
        gc.freeze()  # all of this stays as long as the process: nothing to look at again
    return llm


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
