"""How the next token is chosen: the parameters of a request, checked once."""

import math
from dataclasses import dataclass, fields

# Seeds of requests that name none come from here, so that two runs of a program differ.
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of `LLM.generate`, named as in Hugging Face's ``generate`` where it has them.

    Attributes:
        max_new_tokens: at most this many tokens; None: until the context is full.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this times as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are in
            the prompt or the answer (Keskar et al., 2019); 1 is none.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from the
            logits of tokens of the answer; 0 is none.
        seed: of the random generator; None draws one.
        stop_strings: the answer ends before the first of these.
        stop_token_ids: like the model's end-of-sequence tokens, in addition to them.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: None for none, else the number of most likely tokens to report beside the
            chosen one.
        prompt_lookup_num_tokens: guess at most this many tokens ahead from what the prompt and the
            answer have said before (Saxena, 2023), which is faster where the answer repeats them;
            None or 0: do not. The tokens are the same either way. Requests with penalties do not
            guess.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_lookup_num_tokens: int | None = None

    def __post_init__(self):
        strings = self.stop_strings
        object.__setattr__(
            self, "stop_strings", (strings,) if isinstance(strings, str) else tuple(strings or ())
        )
        ids = self.stop_token_ids
        object.__setattr__(
            self, "stop_token_ids", (ids,) if isinstance(ids, int) else tuple(ids or ())
        )
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
            ("presence_penalty", -math.inf, math.inf),
            ("frequency_penalty", -math.inf, math.inf),
        ):
            _number(name, getattr(self, name), low, high)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty: expected a number above 0, got 0")
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        for name, low, high in (
            ("max_new_tokens", 0, 2**31 - 1),
            ("seed", 0, _MAX_SEED),
            ("logprobs", 0, 1000),
            ("prompt_lookup_num_tokens", 0, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low, high)
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop_strings: expected non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @classmethod
    def from_arguments(cls, arguments: dict) -> "SamplingParams":
        """From keyword arguments; also takes Hugging Face's `do_sample` and `eos_token_id`."""
        arguments = dict(arguments)
        do_sample = arguments.pop("do_sample", None)
        if do_sample is False:
            arguments["temperature"] = 0.0
        elif do_sample is True:
            arguments.setdefault("temperature", 1.0)
        eos = arguments.pop("eos_token_id", None)
        if eos is not None:
            ids = arguments.get("stop_token_ids", ())
            arguments["stop_token_ids"] = (*_tuple(ids), *_tuple(eos))
        known = [f.name for f in fields(cls)]
        for name in arguments:
            if name not in known:
                expected = ", ".join([*known, "do_sample", "eos_token_id"])
                raise TypeError(f"unknown argument {name!r}; expected one of {expected}")
        return cls(**arguments)


def _tuple(ids):
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _number(name, value, low, high):
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        bounds = "a finite number" if math.isinf(low) else f"a finite number >= {low:g}"
        bounds += "" if math.isinf(high) else f" and <= {high:g}"
        raise ValueError(f"{name}: expected {bounds}, got {value!r}")


def _integer(name, value, low, high):
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {value!r}")
