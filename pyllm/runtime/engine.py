"""The decode loop: schedule, run the model, sample, and again."""

import itertools
import time
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


class Engine:
    """Runs a model over a paged cache.

    Every step is captured and replayed: between two kernels no thread goes to sleep, and a step in
    which every sequence decodes one token is captured only once for each number of sequences.

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
        self.scheduler = Scheduler(self.cache, max_batch, max(max_tokens, max_batch))
        self.inputs = _Inputs(max_batch, self.scheduler.max_tokens, pages)
        self.sampler = _SamplerInputs(max_batch, max_context, c.vocab_size)
        self.backend = backend or registry.default_backend()
        self.replay = replay and self.backend != "reference"
        self._arena = Arena()
        self._graphs = {}
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
            sampled = [s for s, n in work if s.n_computed + n == len(s.token_ids)]
            ends = itertools.accumulate(n for _, n in work)
            rows = [end - 1 for (s, _), end in zip(work, ends, strict=True) if s in sampled]
            self.inputs.fill(work, rows)
            self.sampler.fill(sampled)
            logits, tokens, logprobs = self._run(work, rows)
            for sequence, n in work:
                done, sequence.n_computed = sequence.n_computed, sequence.n_computed + n
                self.cache.remember(sequence.pages, sequence.token_ids, done, sequence.n_computed)
            if sampled:
                self._take(sampled, logits, tokens.tolist(), logprobs)

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
                    self.inputs.fill([(sequence, n)], [])
                    batch = self.inputs.batch(1, n, n, self.cache.layers)
                    with alloc.use(self._arena), registry.use(self.backend):
                        out[done : done + n] = self.model.logits(self.model(batch))
                    sequence.n_computed += n
            finally:
                self.cache.release(sequence.pages)
            return out

    def _run(self, work, rows):
        """Runs a step whose inputs are filled; logits, tokens and log-probabilities of `rows`."""
        n_tokens = sum(n for _, n in work)
        size = (len(work), n_tokens, len(rows))
        if not self.replay:
            with alloc.use(self._arena):
                return self._forward(*size)
        graph = self._graphs.get(size)
        if graph is None:
            # The code of all steps is one: the first capture checks it.
            graph = capture(lambda: self._forward(*size), self._arena, check=not self._checked)
            self._checked = True
            # Decoding steps come again, and so do full chunks of a long prompt; other sizes hardly.
            if n_tokens <= self.scheduler.max_batch or n_tokens == self.scheduler.max_tokens:
                self._graphs[size] = graph
        return graph.replay()

    def _forward(self, n_sequences, n_tokens, n_rows):
        batch = self.inputs.batch(n_sequences, n_tokens, n_rows, self.cache.layers)
        with registry.use(self.backend):
            hidden = self.model(batch)
            if n_rows == 0:
                return None, None, None
            logits = self.model.logits(hidden)
            return logits, *sample(logits, **self.sampler.arguments(n_rows))

    def _take(self, sampled, logits, tokens, logprobs):
        now = time.perf_counter()
        for row, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            n = sequence.params.logprobs
            if n is not None:
                top = []
                if n:
                    values, ids = torch.log_softmax(logits[row], -1).topk(min(n, logits.shape[1]))
                    top = list(zip(ids.tolist(), values.tolist(), strict=True))
                sequence.logprobs.append(TokenLogprob(token, float(logprobs[row]), top))
            sequence.append(token, now)
            if sequence.finished:
                self.scheduler.drop(sequence)


class _Inputs:
    """The buffers that a step reads. They stay in place, so that steps can be replayed."""

    def __init__(self, max_batch, max_tokens, max_pages):
        self.tensors = {
            "token_ids": torch.zeros(max_tokens, dtype=torch.int32),
            "positions": torch.zeros(max_tokens, dtype=torch.int32),
            "cu_seqlens": torch.zeros(max_batch + 1, dtype=torch.int32),
            "context_lens": torch.zeros(max_batch, dtype=torch.int32),
            "output_rows": torch.zeros(max_batch, dtype=torch.int32),
            "page_table": torch.zeros(max_batch, max_pages, dtype=torch.int32),
        }
        self._arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        # Which pages each row of page_table holds. A sequence's list of pages only grows.
        self._held = [([], 0)] * max_batch

    def fill(self, work, rows):
        a = self._arrays
        a["output_rows"][: len(rows)] = rows
        at = 0
        for b, (sequence, n) in enumerate(work):
            begin, end = sequence.n_computed, sequence.n_computed + n
            a["token_ids"][at : at + n] = sequence.token_ids[begin:end]
            a["positions"][at : at + n] = range(begin, end) if n > 1 else begin
            at += n
            a["cu_seqlens"][b + 1] = at
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
            output_rows=t["output_rows"][:n_rows] if n_rows < n_tokens else None,
        )


class _SamplerInputs:
    """The sampler's parameters, a row a sequence, in buffers that stay in place."""

    _FLOATS = (
        "temperature", "top_p", "min_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty",
    )  # fmt: skip

    def __init__(self, max_batch, max_context, vocab_size):
        self._tensors = {name: torch.zeros(max_batch) for name in self._FLOATS}
        for name in ("top_k", "position", "prompt_lens", "history_lens"):
            self._tensors[name] = torch.zeros(max_batch, dtype=torch.int32)
        self._tensors["seed"] = torch.zeros(max_batch, dtype=torch.int64)
        history = torch.from_numpy(np.zeros((max_batch, max_context), dtype=np.int32))
        self._tensors["history"] = history
        self._arrays = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._rows: list[Sequence] = []

    def fill(self, sequences):
        a = self._arrays
        same = self._rows == sequences
        for row, sequence in enumerate(sequences):
            a["position"][row] = n = len(sequence.token_ids)
            if not same:
                params = sequence.params
                for name in (*self._FLOATS, "top_k"):
                    a[name][row] = getattr(params, name)
                a["seed"][row] = sequence.seed
                a["prompt_lens"][row] = sequence.n_prompt
                a["history_lens"][row] = 0
            if sequence.params.penalized:
                known = a["history_lens"][row]
                a["history"][row, known:n] = sequence.token_ids[known:n]
                a["history_lens"][row] = n
        self._rows = sequences

    def arguments(self, n):
        return {name: tensor[:n] for name, tensor in self._tensors.items()}
