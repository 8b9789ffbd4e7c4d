"""The decode loop: schedule, run the model, sample, and again."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from threading import RLock

import numpy as np
import torch

from pyllm.ops import registry, sample
from pyllm.runtime.cache import PagedCache
from pyllm.runtime.device import Processor
from pyllm.runtime.inputs import Inputs, Packed
from pyllm.runtime.scheduler import Scheduler
from pyllm.runtime.sequence import Sequence, TokenLogprob

PAGE_SIZE = 32
# Rows of logits up to which guessed tokens are added to a step. With more, arithmetic and not
# memory bounds it, so that another token costs as much in this step as in one of its own.
DRAFT_ROWS = 16
MAX_GRAPHS = 32  # kept, if no more were captured ahead; each keeps its logits


class Engine:
    """Runs a model over a paged cache.

    Every step is captured and replayed: between two kernels no thread goes to sleep, and a step in
    which every sequence decodes one token is captured only once for each number of sequences. On a
    GPU only such steps are captured, for some numbers of sequences that others are padded to.

    A step may have guessed tokens at the end of a sequence's new ones (see `PromptLookup`). All of
    them are sampled as if those before were right, and they count up to the first that was not. The
    bits of a token's logits and the generator's counter depend on the tokens before it alone, so
    the answer is that of a run without guesses. Keys and values of wrong ones are overwritten
    before anything can see them.

    Args:
        model: called with a `Batch`, returns hidden states; has ``logits``, ``prepare`` and
        ``config``.
        max_context: tokens that a sequence may reach.
        max_batch: sequences that may run at once.
        max_tokens: tokens in one step; longer prompts are prefilled in chunks.
        cache_tokens: tokens that the cache holds for all sequences together.
        cache_dtype: of keys and values.
        replay: False runs every step eagerly, for debugging.
        backend: of all ops, see `pyllm.ops.registry`. On the processor others than ``cpu`` run
            eagerly: what PyTorch computes cannot be captured there.
        device: a `Processor` or a `Gpu` of `pyllm.runtime.device`, where the model's weights are.
    """

    def __init__(
        self, model, *, max_context, max_batch=8, max_tokens=512, cache_tokens=None,
        cache_dtype=torch.float16, page_size=PAGE_SIZE, replay=True,
        backend=None, device=None,
    ):  # fmt: skip
        self.model = model
        self.device = device or Processor()
        self.max_context = max_context
        c = model.config
        attention = registry.OPS["paged_attention"]
        pages = -(-max_context // page_size)
        self.cache = PagedCache(
            n_layers=c.n_layers,
            n_pages=max(pages, -(-(cache_tokens or max_context) // page_size)),
            page_size=page_size, kv_heads=c.n_kv_heads, head_dim=c.head_dim, dtype=cache_dtype,
            spare_pages=1, allocate=self.device.allocate,
            side_by_side=attention.choose(self.device.torch_device.type, backend) == "cpu",
        )  # fmt: skip
        model.prepare(max_context)
        rows = max(max_batch, DRAFT_ROWS)
        self.scheduler = Scheduler(self.cache, max_batch, max(max_tokens, max_batch), rows)
        self.inputs = Inputs(
            self.device, max_batch=self.device.padded(max_batch),
            max_tokens=self.device.padded(self.scheduler.max_tokens),
            max_rows=self.device.padded(rows), max_pages=pages, max_context=max_context,
            spare_page=self.cache.n_pages,
        )  # fmt: skip
        n = self.device.padded(rows)
        fields = {"tokens": ((n,), torch.int32), "logprobs": ((n,), torch.float32)}
        self.results = Packed(self.device, fields)
        self.backend = backend or registry.default_backend()
        self.replay = replay and self.device.captures(self.backend)
        self._graphs = OrderedDict()  # the latest used last
        self._most_graphs = MAX_GRAPHS
        self._under_way: _Step | None = None
        self._turn = 0
        self._lock = RLock()
        self.device.synchronize()  # with what loaded the weights

    def add(self, sequence: Sequence) -> None:
        """Queues a request."""
        with self._lock:
            self.scheduler.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request; it may be unfinished."""
        with self._lock:
            self.scheduler.drop(sequence)

    @torch.inference_mode()
    def step(self) -> None:
        """Runs one step of all requests; those that are complete are finished and dropped.

        A GPU is given a step while it works on the one before, which is finished meanwhile: then an
        answer is seen to be complete one step late. Where a step hangs on the tokens of the one
        before, it waits for them.
        """
        with self._lock:
            before = self._under_way
            work = before and self.scheduler.follow(before.work)
            if work:
                self._begin(work, before)
                self._finish(before)
                return
            self._settle()
            work = self.scheduler.schedule()
            if work:
                self._begin(work)
                if self.device.in_flight == 1:
                    self._settle()

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Captures ahead what decoding on a GPU replays, and loads the kernels that prompts take:
        then no request waits for that. Steps with guessed tokens are still captured when one of
        their size first comes.

        Returns:
            How many graphs there are: on the processor none are needed.
        """
        with self._lock:
            self._settle()
            sizes = self.device.sizes(self.scheduler.max_batch)
            if not sizes:
                return 0
            longest = min(self.max_context, self.scheduler.max_tokens)
            for n in {longest, max(1, longest // 2 - 1)}:  # kernels for even and for odd numbers
                self.logits([0] * n)
            self._most_graphs = max(self._most_graphs, len(sizes) + DRAFT_ROWS)
            # The largest first: the others find their memory in its.
            for n in reversed(sizes) if self.replay else ():
                self.inputs.fill([], [], [], n)
                self._run(_Step([], [], [], {}), (n, n, n))
            self.device.synchronize()
            return len(self._graphs)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 ``[T, vocab]``: the logits after every token, computed afresh."""
        with self._lock:
            self._settle()
            sequence = Sequence(token_ids, None, None, (), len(token_ids), 0)
            out = torch.empty(len(token_ids), self.model.config.vocab_size)
            try:
                while sequence.n_computed < len(token_ids):
                    done = sequence.n_computed
                    n = min(len(token_ids) - done, self.scheduler.max_tokens)
                    self.cache.extend(sequence.pages, done + n)
                    self.inputs.fill([(sequence, token_ids[done : done + n])], [n], [], 1)
                    part = out[done : done + n]
                    self.device.run(lambda part=part, n=n: part.copy_(self._logits(1, n, n)))
                    self.device.synchronize()
                    sequence.n_computed += n
            finally:
                self.cache.release(sequence.pages)
            return out

    def profile(self, n_sequences=1, repeats=20) -> list[tuple[str, float]]:
        """The kernels of the last decoding step of `n_sequences`, run again: names and seconds."""
        with self._lock:
            plan = self._graphs[n_sequences, n_sequences, n_sequences].plan
            seconds = [ns / repeats / 1e9 for ns in plan.profile(repeats)]
            return list(zip(plan.names(), seconds, strict=True))

    def _begin(self, work, before=None):
        """Begins a step, of tokens that `before` samples if there is such a step."""
        now = time.perf_counter()
        sampled, n_outputs, n_tokens = [], [], 0  # sampled: (sequence, index of its token) by row
        for sequence, tokens in work:
            if sequence.started is None:
                sequence.started = now
            end = sequence.n_computed + len(tokens) + 1
            # After the last token that is certain and after every guess.
            after = range(max(len(sequence.token_ids), sequence.n_computed + 1), end)
            sampled += [(sequence, i) for i in after]
            n_outputs.append(len(after))
            n_tokens += len(tokens)
        n_sequences, n_rows = len(work), len(sampled)
        if n_sequences == n_tokens == n_rows:
            n_sequences = n_tokens = n_rows = self.device.padded(n_rows)
        rows = before and before.rows(sequence for sequence, _ in work)
        tokens = self.results.tensors["tokens"]
        self.inputs.fill(work, n_outputs, sampled, n_sequences, rows, tokens)
        self._turn = (self._turn + 1) % self.device.in_flight
        begins = [sequence.n_computed for sequence, _ in work]
        step = _Step(work, begins, n_outputs, self.results.arrays[self._turn])
        self._run(step, (n_sequences, n_tokens, n_rows))
        step.wait = self.results.download(self._turn)
        self._under_way = step
        for sequence, tokens in work:
            sequence.n_computed += len(tokens)

    def _run(self, step, size):
        """Begins to run a step whose inputs are filled."""

        def forward():
            return self._forward(*size)

        run, (_, n_tokens, n_rows) = forward, size
        if self.replay and (self.device.captures_all or n_tokens == n_rows):
            graph = self._graphs.get(size)
            if graph is None:
                graph = self.device.capture(forward)
                # Decoding steps come again, and so do full chunks of a long prompt; other sizes
                # hardly.
                if n_tokens <= self.scheduler.max_rows or n_tokens == self.scheduler.max_tokens:
                    self._graphs[size] = graph
                    if len(self._graphs) > self._most_graphs:
                        self._graphs.popitem(last=False)
            else:
                self._graphs.move_to_end(size)
            run = graph.replay

        def set_logits():
            step.logits = run()

        self.device.run(set_logits)

    def _forward(self, n_sequences, n_tokens, n_rows):
        logits = self._logits(n_sequences, n_tokens, n_rows)
        if n_rows:
            out = tuple(self.results.tensors[name][:n_rows] for name in ("tokens", "logprobs"))
            arguments = self.inputs.sampler_arguments(n_rows)
            sample(logits, **arguments, out=out, backend=self.backend)
        return logits

    def _logits(self, n_sequences, n_tokens, n_rows):
        """float32 ``[n_rows, vocab]``, or None of no rows."""
        batch = self.inputs.batch(n_sequences, n_tokens, n_rows, self.cache.layers)
        with registry.use(self.backend):
            hidden = self.model(batch)
            return self.model.logits(hidden) if n_rows else None

    def _settle(self):
        """Finishes the step that is under way, if there is one."""
        step, self._under_way = self._under_way, None
        if step:
            self._finish(step)

    def _finish(self, step):
        """Waits for a step and hands out what it sampled."""
        step.wait()
        now = time.perf_counter()
        sampled = step.results["tokens"][: sum(step.n_outputs)].tolist()
        row = 0
        parts = zip(step.work, step.begins, step.n_outputs, strict=True)
        for (sequence, tokens), begin, n in parts:
            if sequence.pages:  # else it is over: it was dropped, or had ended one step before
                known = begin + len(tokens)
                if n:
                    self._take(sequence, tokens[len(tokens) - n + 1 :], step, row, sampled, now)
                    known = min(known, len(sequence.token_ids) - 1)
                self.cache.remember(sequence.pages, sequence.token_ids, begin, known)
                if sequence.finished:
                    self.scheduler.drop(sequence)
            row += n

    def _take(self, sequence, draft, step, row, sampled, now):
        """Adds a sampled token, and those of a draft that were right."""
        n_accepted = 0
        for i, token in enumerate(sampled[row : row + len(draft) + 1]):
            self._append(sequence, token, step, row + i, now)
            right = i < len(draft) and draft[i] == token
            n_accepted += right
            if not right or sequence.finished:
                break
        if draft:
            sequence.n_computed = len(sequence.token_ids) - 1
            sequence.lookup.update(len(draft), n_accepted)
            sequence.usage.drafted_tokens += len(draft)
            sequence.usage.accepted_tokens += n_accepted

    def _append(self, sequence, token, step, row, now):
        n = sequence.params.logprobs
        if n is not None:
            top = []
            if n:
                logits = step.logits[row]
                values, ids = torch.log_softmax(logits, -1).topk(min(n, len(logits)))
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = float(step.results["logprobs"][row])
            sequence.logprobs.append(TokenLogprob(token, logprob, top))
        sequence.append(token, now)


@dataclass
class _Step:
    """A step that is under way.

    Attributes:
        work: (sequence, its new tokens) each.
        begins: the index of each sequence's first new token.
        n_outputs: of each sequence, how many rows of logits are sampled.
        results: what ``wait()`` fills: arrays ``tokens`` and ``logprobs``, by row.
        logits: float32 ``[rows, vocab]`` on the device, until the next step begins.
    """

    work: list
    begins: list[int]
    n_outputs: list[int]
    results: dict[str, np.ndarray]
    wait: Callable | None = None
    logits: torch.Tensor | None = None

    def rows(self, sequences) -> list[int]:
        """The row of each of `sequences`, which have one row each."""
        ends = accumulate(self.n_outputs)
        row = {sequence: end - 1 for (sequence, _), end in zip(self.work, ends, strict=True)}
        return [row[sequence] for sequence in sequences]
