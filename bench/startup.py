"""From the start of a process to its first token, and the memory that a full context takes.

Every process is new; they take turns. The prompt is of 32 tokens in SmolLM2's vocabulary. Memory is
the peak of resident pages after a prompt and an answer have filled a context of 2048 tokens, less
the weights' file and less what importing the engine's library takes.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from .engines import CONTEXT, Remote, interpreters

PROMPT = (
    "The history of the lighthouse begins long before the first tower was built: people "
    "lit fires on the hills, so that ships could find the harbor at night"
)
LLAMA_CPP = """
import sys
from llama_cpp import Llama
model, threads, prompt = sys.argv[1:]
llm = Llama(model, n_ctx=2048, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
print(llm(prompt, max_tokens=1, temperature=0)["choices"][0]["text"], flush=True)
"""
MEASURED = ("pyllm", "llama.cpp")
IMPORT = {"pyllm": "torch", "llama.cpp": "llama_cpp"}


def first_byte(command, threads) -> float:
    """Seconds until a new process prints something."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYLLM_NUM_THREADS": str(threads)},
    ) as process:  # fmt: skip
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if not first:
        raise RuntimeError(f"{command[:4]} printed nothing: {errors.decode()[-500:]}")
    return seconds


def import_mb(package) -> float:
    """Peak resident MB of a process that only imports a package."""
    code = f"import {package}; from {__package__}.engines import peak_mb; print(peak_mb())"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True))


def measure(model, *, threads, rounds=5, fill=CONTEXT, progress=lambda text: None) -> dict:
    """Seconds to the first token of each engine, and its memory after `fill` tokens."""
    found, missing = interpreters(MEASURED)
    commands = {
        "pyllm": [
            sys.executable, "-m", "pyllm", "generate", PROMPT, "-n", "1", "--raw",
            "--model", str(model), "--max-context", str(CONTEXT),
        ],
        "llama.cpp": [sys.executable, "-c", LLAMA_CPP, str(model), str(threads), PROMPT],
    }  # fmt: skip
    commands = {"import torch": [sys.executable, "-c", "import torch; print(1, flush=True)"]} | {
        name: commands[name] for name in found
    }
    seconds = {name: [] for name in commands}
    for i in range(-1, rounds):  # round -1 brings the files into memory
        for name, command in commands.items():
            progress(f"round {i + 1} of {rounds}: {name}")
            took = first_byte(command, threads)
            if i >= 0:
                seconds[name].append(took)
    torch = seconds["import torch"]
    rows = [
        {
            "what": name, "seconds": runs, "median": statistics.median(runs),
            "over_import_torch": statistics.median(
                a - b for a, b in zip(runs, torch, strict=True)
            ),
        }
        for name, runs in seconds.items()
    ]  # fmt: skip
    progress("memory")
    memory = [_memory(name, model, threads, fill) for name in found]
    return {
        "model": Path(model).name, "threads": threads, "rounds": rounds, "rows": rows,
        "prompt": PROMPT, "memory": memory, "absent": dict.fromkeys(missing, "not installed"),
    }  # fmt: skip


def _memory(name, model, threads, fill):
    remote = Remote(name, model, threads)
    try:
        n = min(32, fill // 4)
        remote.seconds(what="decode", n=n, depth=fill - n - 1)
    finally:
        remote.close()
    file, imported = Path(model).stat().st_size / 1e6, import_mb(IMPORT[name]) * 1.048576
    peak = remote.peak_mb * 1.048576
    return {
        "engine": name, "peak_mb": peak, "file_mb": file, "imported": IMPORT[name],
        "import_mb": imported, "above_mb": peak - file - imported, "tokens": fill,
    }  # fmt: skip


def tables(data):
    """The measurement as two rich tables."""
    start = Table(title=f"{data['model']}, {data['threads']} threads: start to first token")
    start.add_column("")
    for name in ("seconds", "over import torch"):
        start.add_column(name, justify="right")
    for row in data["rows"]:
        start.add_row(row["what"], f"{row['median']:.2f}", f"{row['over_import_torch']:+.2f}")
    memory = Table(title="peak memory, MB")
    memory.add_column("engine")
    for name in ("peak", "weights' file", "imported library", "above both"):
        memory.add_column(name, justify="right")
    for row in data["memory"]:
        memory.add_row(
            row["engine"], f"{row['peak_mb']:.0f}", f"{row['file_mb']:.0f}",
            f"{row['import_mb']:.0f} ({row['imported']})", f"{row['above_mb']:.0f}",
        )  # fmt: skip
    return start, memory
