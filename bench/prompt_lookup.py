"""Decoding with guesses from the prompt, beside plain decoding.

Answers end where the model ends them: what it would go on to say has little to do with the text it
was given. A rate is of the tokens after the first of all answers to a task. Both ways take turns on
one model, and must give the same tokens.
"""

import statistics
from pathlib import Path

from rich.table import Table

from .engines import Pyllm
from .perplexity import TEXT

# Answers of the first kind have much of the text in them, of the last ones nothing: {} is a text.
TASKS = {
    "repeat": "Repeat the following text exactly:\n\n{}",
    "edit": "Correct the mistakes in this text and write the whole text:\n\n{}",
    "summarize": "Summarize this text in a few sentences:\n\n{}",
    "story": "Write a story about a lighthouse keeper who finds a strange machine.",
    "poem": "Write a long poem about autumn, the sea and a lost letter.",
}
N_TEXTS = 4  # paragraphs


def questions() -> dict[str, list[str]]:
    """What is asked for each task: once, or about each of the paragraphs."""
    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
    paragraphs = [" ".join(p.split()) for p in paragraphs if len(p) > 150][:N_TEXTS]
    return {
        name: [task.format(p) for p in paragraphs] if "{}" in task else [task]
        for name, task in TASKS.items()
    }


def measure(
    model, *, threads, rounds=5, k=15, n=192, temperature=0.0, progress=lambda text: None
) -> dict:
    """Tokens per second of each task, plain and with at most `k` guesses.

    Args:
        n: tokens of an answer at most.
    """
    engine = Pyllm()
    engine.load(model, threads)
    llm, rows = engine.llm, []
    for name, asked in questions().items():
        prompts = [llm.chat_ids([{"role": "user", "content": q}]) for q in asked]
        speeds = {"plain": [], "lookup": []}
        for i in range(-1, rounds):  # round -1 warms up
            progress(f"round {i + 1} of {rounds}: {name}")
            answers = {}
            for way in sorted(speeds, reverse=i % 2):
                guesses = k if way == "lookup" else None
                answers[way] = [
                    llm.generate(
                        ids, max_new_tokens=n, temperature=temperature, seed=1,
                        prompt_lookup_num_tokens=guesses,
                    )
                    for ids in prompts
                ]  # fmt: skip
                usages = [answer.usage for answer in answers[way]]
                seconds = sum(u.decode_seconds for u in usages)
                if i >= 0:
                    speeds[way].append(sum(u.completion_tokens - 1 for u in usages) / seconds)
            same = zip(answers["plain"], answers["lookup"], strict=True)
            if any(a.token_ids != b.token_ids for a, b in same):
                raise AssertionError("guesses changed the tokens")
        usages = [answer.usage for answer in answers["lookup"]]
        rows.append(
            {
                "task": name, "answers": len(prompts),
                "tokens": sum(u.completion_tokens for u in usages),
                "drafted": sum(u.drafted_tokens for u in usages),
                "accepted": sum(u.accepted_tokens for u in usages),
                **speeds,
                "ratio": statistics.median(
                    b / a for a, b in zip(speeds["plain"], speeds["lookup"], strict=True)
                ),
            }
        )  # fmt: skip
    return {
        "model": Path(model).name, "threads": threads, "rounds": rounds, "guesses": k,
        "temperature": temperature, "rows": rows,
    }  # fmt: skip


HEAD = ("task", "answers", "tokens", "plain, tokens/s", "lookup", "ratio", "accepted of drafted")


def cells(data):
    """The rows of a table under `HEAD`."""
    return [
        (
            r["task"], str(r["answers"]), str(r["tokens"]), f"{statistics.median(r['plain']):.1f}",
            f"{statistics.median(r['lookup']):.1f}", f"{r['ratio']:.2f} x",
            f"{r['accepted']} of {r['drafted']}",
        )
        for r in data["rows"]
    ]  # fmt: skip


def table(data):
    """The measurement as a rich table."""
    t = Table(
        title=f"{data['model']}, {data['threads']} threads, {data['rounds']} rounds, "
        f"{data['guesses']} guesses at most, temperature {data['temperature']}"
    )
    for name in HEAD:
        t.add_column(name, justify="left" if name == "task" else "right")
    for row in cells(data):
        t.add_row(*row)
    return t
