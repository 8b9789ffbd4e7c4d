"""The decode loop: schedule, run the model, sample, and again."""

import time
from collections import OrderedDict
from threading import RLock

import numpy as np
import torch

from pyllm.ops import alloc, registry, sample
from pyllm.runtime.batch import Batch
from pyllm.runtime.cache import PagedCache
from pyllm.runtime.graph import Arena, capture
from pyllm.runtime.scheduler import Scheduler
from pyllm.runtime.sequence import Sequence, TokenLogprob

PAGE_SIZE = 32
# Rows of logits up to which guessed tokens are added to a step. With more, arithmetic and not
# memory bounds it, so that another token costs as much in this step as in one of its own.
DRAFT_ROWS = 16
MAX_GRAPHS = 32  # kept; each keeps its logits


class Engine:
    """Runs a model over a paged cache.

    Every step is captured and replayed: between two kernels no thread goes to sleep, and a step in
    which every sequence decodes one token is captured only once for each number of sequences.

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
        backend: of all ops, see `pyllm.ops.registry`. The reference runs eagerly: what PyTorch
            computes cannot be captured.
    """

    def __init__(
        self, model, *, max_context, max_batch=8, max_tokens=512, cache_tokens=None,
        cache_dtype=torch.float16, page_size=PAGE_SIZE, replay=True,
        backend=None,
    ):  # fmt: skip
        self.model = model
        self.max_context = max_context
        c = model.config
        pages = -(-max_context // page_size)
        self.cache = PagedCache(
            n_layers=c.n_layers,
            n_pages=max(pages, -(-(cache_tokens or max_context) // page_size)),
            page_size=page_size, kv_heads=c.n_kv_heads, head_dim=c.head_dim, dtype=cache_dtype,
        )  # fmt: skip
        model.prepare(max_context)
        rows = max(max_batch, DRAFT_ROWS)
        self.scheduler = Scheduler(self.cache, max_batch, max(max_tokens, max_batch), rows)
        self.inputs = _Inputs(max_batch, self.scheduler.max_tokens, rows, pages)
        self.sampler = _SamplerInputs(rows, max_context)
        self.backend = backend or registry.default_backend()
        self.replay = replay and self.backend != "reference"
        self._arena = Arena()
        self._graphs = OrderedDict()  # the latest used last
        self._checked = False
        self._lock = RLock()

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
        """Runs one step of all requests; those that are complete are finished and dropped."""
        with self._lock:
            work = self.scheduler.schedule()
            if not work:
                return
            now = time.perf_counter()
            for sequence, _ in work:
                if sequence.started is None:
                    sequence.started = now
            sampled, n_outputs = [], []  # sampled: (sequence, index of the token) of each row
            for sequence, tokens in work:
                # After the last token that is certain and after every guess.
                end = sequence.n_computed + len(tokens) + 1
                after = range(len(sequence.token_ids), end)
                sampled += [(sequence, i) for i in after]
                n_outputs.append(len(after))
            self.inputs.fill(work, n_outputs)
            self.sampler.fill(sampled)
            self._take(work, *self._run(work, len(sampled)))

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 ``[T, vocab]``: the logits after every token, computed afresh."""
        with self._lock:
            sequence = Sequence(token_ids, None, None, (), len(token_ids), 0)
            out = torch.empty(len(token_ids), self.model.config.vocab_size)
            try:
                while sequence.n_computed < len(token_ids):
                    done = sequence.n_computed
                    n = min(len(token_ids) - done, self.scheduler.max_tokens)
                    self.cache.extend(sequence.pages, done + n)
                    self.inputs.fill([(sequence, token_ids[done : done + n])], [n])
                    batch = self.inputs.batch(1, n, n, self.cache.layers)
                    with alloc.use(self._arena), registry.use(self.backend):
                        out[done : done + n] = self.model.logits(self.model(batch))
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

    def _run(self, work, n_rows):
        """Runs a step whose inputs are filled: logits, tokens and log-probabilities of the rows."""
        n_tokens = sum(len(tokens) for _, tokens in work)
        size = (len(work), n_tokens, n_rows)
        if not self.replay:
            with alloc.use(self._arena):
                return self._forward(*size)
        graph = self._graphs.get(size)
        if graph is None:
            # The code of all steps is one: the first capture checks it.
            graph = capture(lambda: self._forward(*size), self._arena, check=not self._checked)
            self._checked = True
            # Decoding steps come again, and so do full chunks of a long prompt; other sizes hardly.
            if n_tokens <= self.scheduler.max_rows or n_tokens == self.scheduler.max_tokens:
                self._graphs[size] = graph
                if len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(size)
        return graph.replay()

    def _forward(self, n_sequences, n_tokens, n_rows):
        batch = self.inputs.batch(n_sequences, n_tokens, n_rows, self.cache.layers)
        with registry.use(self.backend):
            hidden = self.model(batch)
            if n_rows == 0:
                return None, None, None
            logits = self.model.logits(hidden)
            return logits, *sample(logits, **self.sampler.arguments(n_rows))

    def _take(self, work, logits, sampled, logprobs):
        now = time.perf_counter()
        sampled = [] if sampled is None else sampled.tolist()
        row = 0
        for sequence, tokens in work:
            done = sequence.n_computed
            sequence.n_computed += len(tokens)
            n_drafted = sequence.n_computed - len(sequence.token_ids)
            if n_drafted >= 0:
                draft = tokens[len(tokens) - n_drafted :]
                n_accepted = 0
                for i, token in enumerate(sampled[row : row + n_drafted + 1]):
                    self._append(sequence, token, logits[row + i], logprobs[row + i], now)
                    right = i < n_drafted and draft[i] == token
                    n_accepted += right
                    if not right or sequence.finished:
                        break
                row += 1 + n_drafted
                sequence.n_computed = len(sequence.token_ids) - 1
                if n_drafted:
                    sequence.lookup.update(n_drafted, n_accepted)
                    sequence.usage.drafted_tokens += n_drafted
                    sequence.usage.accepted_tokens += n_accepted
            self.cache.remember(sequence.pages, sequence.token_ids, done, sequence.n_computed)
            if sequence.finished:
                self.scheduler.drop(sequence)

    def _append(self, sequence, token, logits, logprob, now):
        n = sequence.params.logprobs
        if n is not None:
            top = []
            if n:
                values, ids = torch.log_softmax(logits, -1).topk(min(n, len(logits)))
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
            sequence.logprobs.append(TokenLogprob(token, float(logprob), top))
        sequence.append(token, now)


class _Inputs:
    """The buffers that a step reads. They stay in place, so that steps can be replayed."""

    def __init__(self, max_batch, max_tokens, max_rows, max_pages):
        self.tensors = {
            "token_ids": torch.zeros(max_tokens, dtype=torch.int32),
            "positions": torch.zeros(max_tokens, dtype=torch.int32),
            "cu_seqlens": torch.zeros(max_batch + 1, dtype=torch.int32),
            "context_lens": torch.zeros(max_batch, dtype=torch.int32),
            "output_rows": torch.zeros(max_rows, dtype=torch.int32),
            "cu_outputs": torch.zeros(max_batch + 1, dtype=torch.int32),
            "page_table": torch.zeros(max_batch, max_pages, dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        # Which pages each row of page_table holds. A sequence's list of pages only grows.
        self._held = [([], 0)] * max_batch

    def fill(self, work, n_outputs):
        """`n_outputs`: of how many of each sequence's last tokens the hidden states are wanted."""
        a = self._arrays
        some = sum(n_outputs) < sum(len(tokens) for _, tokens in work)  # else output_rows is unread
        at = row = 0
        for b, ((sequence, tokens), outputs) in enumerate(zip(work, n_outputs, strict=True)):
            n = len(tokens)
            begin, end = sequence.n_computed, sequence.n_computed + n
            a["token_ids"][at : at + n] = tokens
            a["positions"][at : at + n] = range(begin, end) if n > 1 else begin
            at += n
            a["cu_seqlens"][b + 1] = at
            if some:
                a["output_rows"][row : row + outputs] = range(at - outputs, at)
            row += outputs
            a["cu_outputs"][b + 1] = row
            a["context_lens"][b] = end
            pages, known = self._held[b]
            if pages is not sequence.pages or known != len(pages):
                a["page_table"][b, : len(sequence.pages)] = sequence.pages
                self._held[b] = sequence.pages, len(sequence.pages)

    def batch(self, n_sequences, n_tokens, n_rows, layers):
        t = self.tensors
        return Batch(
            token_ids=t["token_ids"][:n_tokens],
            positions=t["positions"][:n_tokens],
            cu_seqlens=t["cu_seqlens"][: n_sequences + 1],
            context_lens=t["context_lens"][:n_sequences],
            page_table=t["page_table"][:n_sequences],
            layers=layers,
            cu_outputs=t["cu_outputs"][: n_sequences + 1],
            output_rows=t["output_rows"][:n_rows] if n_rows < n_tokens else None,
        )


class _SamplerInputs:
    """The sampler's parameters, a row a token, in buffers that stay in place."""

    _FLOATS = (
        "temperature", "top_p", "min_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty",
    )  # fmt: skip

    def __init__(self, max_rows, max_context):
        self._tensors = {name: torch.zeros(max_rows) for name in self._FLOATS}
        for name in ("top_k", "position", "prompt_lens", "history_lens"):
            self._tensors[name] = torch.zeros(max_rows, dtype=torch.int32)
        self._tensors["seed"] = torch.zeros(max_rows, dtype=torch.int64)
        history = torch.from_numpy(np.zeros((max_rows, max_context), dtype=np.int32))
        self._tensors["history"] = history
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._rows: list[Sequence] = []

    def fill(self, sampled):
        a = self._arrays
        sequences = [sequence for sequence, _ in sampled]
        same = self._rows == sequences
        for row, (sequence, n) in enumerate(sampled):
            a["position"][row] = n
            if not same:
                params = sequence.params
                for name in (*self._FLOATS, "top_k"):
                    a[name][row] = getattr(params, name)
                a["seed"][row] = sequence.seed
                a["prompt_lens"][row] = sequence.n_prompt
                a["history_lens"][row] = 0
            if sequence.params.penalized:  # and so without guesses
                known = a["history_lens"][row]
                a["history"][row, known:n] = sequence.token_ids[known:n]
                a["history_lens"][row] = n
        self._rows = sequences

    def arguments(self, n):
        return {name: tensor[:n] for name, tensor in self._tensors.items()}
