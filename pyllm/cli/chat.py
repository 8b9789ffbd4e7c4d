"""An interactive conversation in a terminal."""

import sys

HELP = "/reset begins anew, /system TEXT sets the system message, /exit or Ctrl-D ends the chat."


def converse(llm, system, params):
    """Reads messages and writes answers until the input ends.

    The cache finds the conversation so far by its tokens, so a turn computes only what is new.
    """
    if not llm.tokenizer.chat_template:
        raise ValueError("chat: expected a model with a chat template; this one has none")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input)

        print(HELP, file=sys.stderr)
    messages = _start(system)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages = _start(system)
        elif text.startswith("/system"):
            system = text.removeprefix("/system").strip() or None
            messages = _start(system)
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            answer = _answer(llm, turn, params)
            if answer is not None:
                messages = [*turn, {"role": "assistant", "content": answer}]


def _start(system):
    return [{"role": "system", "content": system}] if system else []


def _answer(llm, messages, params) -> str | None:
    try:
        stream = llm.chat(messages, stream=True, **params)
    except ValueError as error:  # too long for the context, say: the conversation can go on
        print(f"error: {error}; /reset begins anew", file=sys.stderr)
        return None
    with stream:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        print(flush=True)
        usage = stream.completion.usage
        if sys.stdin.isatty():
            print(
                f"[{usage.completion_tokens} tokens, "
                f"{usage.decode_tokens_per_second:.0f} tokens/s; "
                f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached]",
                file=sys.stderr,
            )
        return stream.completion.text
