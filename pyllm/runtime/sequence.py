"""One request while it is being answered, and its finished answer."""

from dataclasses import dataclass, field


@dataclass
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens, completion_tokens: how many.
        cached_tokens: prompt tokens whose keys and values were found in the cache.
        drafted_tokens, accepted_tokens: guessed by prompt lookup, and those that were right.
        prefill_seconds: from the first step on the request to its first token.
        decode_seconds: from the first token to the last.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, per second."""
        n = self.completion_tokens - 1
        return n / self.decode_seconds if n > 0 and self.decode_seconds > 0 else 0.0


@dataclass
class TokenLogprob:
    """The chosen token's log-probability, and the most likely tokens at that place.

    Attributes:
        top: ``(token_id, logprob)``, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Completion:
    """An answer.

    Attributes:
        finish_reason: ``"stop"`` (an end-of-sequence or stop token, or a stop string) or
        ``"length"``.
        logprobs: one entry a token if they were asked for, else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    usage: Usage


class Sequence:
    """A request: its tokens so far, its pages, and how far keys and values are computed."""

    def __init__(self, prompt_ids, params, text_stream, stop_ids, limit, seed, lookup=None):
        self.token_ids = list(prompt_ids)
        self.n_prompt = len(prompt_ids)
        self.params = params
        self.seed = seed
        self.text_stream = text_stream
        self.stop_ids = stop_ids
        self.limit = limit  # tokens, the prompt's included
        self.lookup = lookup
        self.pages: list[int] = []
        self.n_computed = 0
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.usage = Usage(prompt_tokens=self.n_prompt)
        self.started: float | None = None
        self.first_token: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int, now: float) -> None:
        """Adds a sampled token, and decides whether the answer is complete."""
        if self.first_token is None:
            self.first_token = now
            self.usage.prefill_seconds = now - self.started
        self.usage.decode_seconds = now - self.first_token
        self.usage.completion_tokens += 1
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
        else:
            self.text_stream.push(token_id)
            if self.text_stream.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) >= self.limit:
                self.finish_reason = "length"
        if self.finished:
            self.text_stream.finish()

    def completion(self) -> Completion:
        """The answer so far."""
        return Completion(
            text=self.text_stream.text,
            token_ids=self.token_ids[self.n_prompt :],
            finish_reason=self.finish_reason,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            usage=self.usage,
        )
