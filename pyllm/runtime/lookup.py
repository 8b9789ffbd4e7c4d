"""Guesses at the tokens that come next, read off the sequence itself."""

LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked for, the longest first
FIRST = 3  # tokens of the first guess
MAX_PAUSE = 31  # decoding steps


class PromptLookup:
    """Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding).

    If the last n tokens were seen before, the tokens that followed them then are likely to follow
    again: where a model repeats, edits, quotes or sums up what it was given, mostly so. The engine
    runs the guesses along with the last token, in one pass over the weights, and keeps those that
    it would have sampled anyway, so a wrong guess costs time and never changes a token.

    How many tokens are guessed follows from how it went: after a guess that was right in all its
    tokens the next one is twice as long and one more, after one that was wrong in most of them half
    as long: 3, 7, 15 and so on, so there are few sizes of steps. Misses, when the very first token
    was wrong, are followed by ever longer pauses while there is no hit.

    A length chosen each time from learned probabilities (of being right, by the length of the
    match) and the cost of a token more in a step was tried on the texts of ``pyllm bench
    prompt_lookup``: no better, nor were n-grams of one token. Knowing beforehand which guesses are
    right would gain a sixth more where text is edited, next to nothing where it is summed up.

    Args:
        max_tokens: of one guess.
    """

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens
        self._length = min(FIRST, max_tokens)
        self._wait = self._pause = 0  # steps without a guess: still to go, and after the next miss
        self._followed: dict[tuple, int] = {}  # n-gram -> where its latest continuation begins
        self._n_known = 0

    def draft(self, token_ids: list[int], room: int) -> list[int]:
        """At most `room` tokens that may follow `token_ids`; none if there is no telling.

        Every call must have the tokens of the one before, and maybe more.
        """
        if self._wait:
            self._wait -= 1
            return []
        for end in range(self._n_known, len(token_ids)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._followed[tuple(token_ids[end - n : end])] = end
        self._n_known = len(token_ids)
        for n in range(min(LONGEST, len(token_ids)), SHORTEST - 1, -1):
            begin = self._followed.get(tuple(token_ids[-n:]))
            if begin is not None:
                length = min(self._length, room)
                draft = token_ids[begin : begin + length]
                while len(draft) < length:  # what is repeated reaches into what it predicts
                    draft += draft[: length - len(draft)]
                return draft
        return []

    def update(self, n_drafted: int, n_accepted: int) -> None:
        """Says how many tokens of the last draft, which had some, were right."""
        if n_accepted == n_drafted:
            self._length = min(2 * n_drafted + 1, self._max_tokens)
        elif 2 * n_accepted < n_drafted:
            self._length = max(n_drafted // 2, 1)
        if n_accepted:
            self._pause = 0
        else:
            self._wait = self._pause
            self._pause = min(2 * self._pause + 1, MAX_PAUSE)
