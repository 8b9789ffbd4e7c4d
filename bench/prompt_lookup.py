"""Decoding with guesses from the prompt, beside plain decoding: ``python -m bench.prompt_lookup``.

Both take turns on one model; figures are medians of tokens per second after the first token, ratios
medians of the rounds'. The tokens are compared: they must be the same.
"""

import statistics
from typing import Annotated

import typer

from .perplexity import TEXT


def prompts() -> dict[str, str]:
    """What is asked: some answers repeat much of the question, others nothing."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    paragraph = text[text.index("Alice was beginning") :][:900].rsplit(".", 1)[0] + "."
    return {
        "repeat": f"Repeat the following text exactly:\n\n{paragraph}",
        "edit": f"Correct the mistakes in this text and write the whole text:\n\n{paragraph}",
        "summarize": f"Summarize this text in a few sentences:\n\n{paragraph}",
        "story": "Write a story about a lighthouse keeper who finds a strange machine.",
        "poem": "Write a long poem about autumn, the sea and a lost letter.",
    }


def measure(llm, question, *, k, n, temperature, rounds):
    """Tokens per second ``(plain, lookup)``, one each a round, and the last usage."""
    ids = llm.chat_ids([{"role": "user", "content": question}])
    speeds, usage = ([], []), None
    for i in range(-1, rounds):  # round -1 warms up
        tokens = []
        for side in (0, 1) if i % 2 else (1, 0):
            answer = llm.generate(
                ids, max_new_tokens=n, ignore_eos=True, temperature=temperature, seed=1,
                prompt_lookup_num_tokens=side * k,
            )  # fmt: skip
            tokens.append(answer.token_ids)
            if side:
                usage = answer.usage
            if i >= 0:
                speeds[side].append(answer.usage.decode_tokens_per_second)
        if tokens[0] != tokens[1]:
            raise AssertionError("guesses changed the tokens")
    return *speeds, usage


def main(
    model: Annotated[str, typer.Argument(help="A known name, a GGUF file or a directory.")] = (
        "smollm2-135m"
    ),
    k: Annotated[int, typer.Option(help="prompt_lookup_num_tokens.")] = 10,
    n: Annotated[int, typer.Option(help="Tokens of each answer.")] = 192,
    temperature: float = 0.0,
    rounds: int = 5,
    only: str | None = None,
):
    """Decoding with guesses from the prompt, beside plain decoding."""
    from pyllm import LLM

    llm = LLM(model, max_context=1024)
    print(f"{'':>10} {'plain t/s':>10} {'lookup t/s':>10} {'ratio':>6}  accepted of drafted")
    for name, question in prompts().items():
        if only in (None, name):
            plain, lookup, usage = measure(
                llm, question, k=k, n=n, temperature=temperature, rounds=rounds
            )
            ratio = statistics.median(b / a for a, b in zip(plain, lookup, strict=True))
            print(
                f"{name:>10} {statistics.median(plain):10.1f} {statistics.median(lookup):10.1f} "
                f"{ratio:6.2f}  {usage.accepted_tokens} of {usage.drafted_tokens}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
