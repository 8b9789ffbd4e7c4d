"""Which tokens run in the next step."""

from collections import deque

from pyllm.runtime.cache import OutOfPages, PagedCache
from pyllm.runtime.sequence import Sequence


class Scheduler:
    """Continuous batching with chunked prefill.

    Sequences that are decoding come first, one token each; what is left of the step's token budget
    goes to prompts, in the order of arrival. When no page is left the youngest sequence gives up
    its pages and starts again later; the tokens that it has are kept, so its answer is the same.
    Guessed tokens take what then is left of the budget, the sampled rows and the free pages.

    Args:
        max_batch: sequences that run at once.
        max_tokens: tokens in one step.
        max_rows: tokens in one step whose logits are sampled; at least `max_batch`.
    """

    def __init__(self, cache: PagedCache, max_batch: int, max_tokens: int, max_rows: int):
        self.cache = cache
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a new request."""
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request, finished or not, and gives its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.pages)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[tuple[Sequence, list[int]]]:
        """The sequences of the next step, each with its new tokens; guessed ones come last."""
        chosen: list[tuple[Sequence, int]] = []
        budget = self.max_tokens
        for sequence in sorted(self.running, key=lambda s: len(s.token_ids) - s.n_computed > 1):
            if sequence not in self.running or not budget:
                continue  # gave its pages up a moment ago
            n = min(len(sequence.token_ids) - sequence.n_computed, budget)
            if self._make_room(sequence, n):
                chosen.append((sequence, n))
                budget -= n
        chosen = [(s, n) for s, n in chosen if s in self.running]
        while self.waiting and budget and len(self.running) < self.max_batch:
            n = self._admit(self.waiting[0], budget)
            if not n:
                break
            chosen.append((self.running[-1], n))
            budget -= n
        work = [(s, s.token_ids[s.n_computed : s.n_computed + n]) for s, n in chosen]
        self._draft(work, budget)
        return work

    def follow(self, work) -> list[tuple[Sequence, list[int]]] | None:
        """The step after the one of `work`, whose tokens are not known yet.

        Returns:
            As `schedule`, with 0 for each token; or None if the step hangs on tokens: where a
            sequence is not decoding, wants guesses or penalties, where another one may start, or
            all have come to their limits. A sequence that ends meanwhile is run once in vain.
        """
        alive = [sequence for sequence, _ in work if sequence.pages]
        may_start = self.waiting and len(self.running) < self.max_batch
        if may_start or len(alive) != len(self.running) or self.cache.n_free < len(alive):
            return None
        for s in alive:
            p = s.params
            if s.n_computed != len(s.token_ids) or s.lookup or p.penalized or p.logprobs:
                return None
        if all(len(s.token_ids) + 1 >= s.limit for s in alive):
            return None
        for s in alive:
            self.cache.extend(s.pages, s.n_computed + 1)
        return [(s, [0]) for s in alive]

    def _draft(self, work, budget):
        """Adds guessed tokens to the sequences that want them, sharing what room there is."""
        room = min(budget, self.max_rows - len(work))
        waiting = [w for w in work if w[0].lookup and w[0].n_computed + 1 == len(w[0].token_ids)]
        for i, (sequence, tokens) in enumerate(waiting):
            n = len(sequence.token_ids)
            # After k guesses there are up to k + 1 tokens more.
            share = min(room // (len(waiting) - i), sequence.limit - n - 1)
            draft = sequence.lookup.draft(sequence.token_ids, share) if share > 0 else []
            try:
                self.cache.extend(sequence.pages, n + len(draft))
            except OutOfPages:
                continue
            tokens += draft
            room -= len(draft)

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Starts the request at the head of the queue if there are pages; returns its tokens."""
        cache = self.cache
        sequence.pages = cache.take_prefix(sequence.token_ids)
        cached = len(sequence.pages) * cache.page_size
        n = min(len(sequence.token_ids) - cached, budget)
        try:
            cache.extend(sequence.pages, cached + n)
        except OutOfPages:
            cache.release(sequence.pages)
            if not self.running:
                raise
            return 0
        sequence.n_computed = cached
        sequence.usage.cached_tokens = min(cached, sequence.n_prompt)
        self.running.append(self.waiting.popleft())
        return n

    def _make_room(self, sequence: Sequence, n: int) -> bool:
        """Gets pages for `n` more tokens, taking them from younger sequences if it must."""
        while True:
            try:
                self.cache.extend(sequence.pages, sequence.n_computed + n)
                return True
            except OutOfPages:
                youngest = self.running[-1]
                if youngest is sequence and len(self.running) == 1:
                    raise
                self.running.remove(youngest)
                self.cache.release(youngest.pages)
                youngest.n_computed = 0
                self.waiting.appendleft(youngest)
                if youngest is sequence:
                    return False
