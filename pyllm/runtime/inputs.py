"""What a step reads and what it returns, in buffers that stay in place, so that it can be replayed.

Python fills a piece of host memory; a device gets it in one copy. While a step is under way the
next one is filled in, so there are as many pieces as there may be steps in flight.
"""

import math

import numpy as np
import torch

from pyllm.runtime.batch import Batch

_ALIGN = 64
_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}
_SAMPLER_FLOATS = (
    "temperature", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_SAMPLER = (*_SAMPLER_FLOATS, "top_k", "seed", "position", "prompt_lens", "history_lens")


class Packed:
    """Named arrays in one piece of memory, on the host and on the device.

    Args:
        device: a `pyllm.runtime.device.Processor` or one like it.
        fields: name -> (shape, dtype).

    Attributes:
        arrays: for each piece of host memory the arrays by name; they take turns.
        tensors: what kernels read and write, by name.
    """

    def __init__(self, device, fields):
        self._device = device
        self.begin, at = {}, 0
        for name, (shape, dtype) in fields.items():
            self.begin[name] = at
            at += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        self._host = [device.host(at) for _ in range(device.in_flight)]
        self._mirror = device.mirror(self._host[0])
        self.arrays = [
            {name: tensor.numpy() for name, tensor in self._views(host, fields).items()}
            for host in self._host
        ]
        self.tensors = self._views(self._mirror, fields)

    def upload(self, turn: int, nbytes: int) -> None:
        """Brings the first `nbytes` of a piece of host memory to the device."""
        self._device.upload(self._mirror[:nbytes], self._host[turn][:nbytes])

    def download(self, turn: int):
        """Brings all of it to the host; returns what to call before it is read there."""
        return self._device.download(self._host[turn], self._mirror)

    def _views(self, memory, fields):
        views = {}
        for name, (shape, dtype) in fields.items():
            begin = self.begin[name]
            nbytes = math.prod(shape) * dtype.itemsize
            views[name] = memory[begin : begin + nbytes].view(dtype).view(shape)
        return views


class Inputs:
    """The inputs of the model and of the sampler.

    Args:
        spare_page: a page of the cache that belongs to no sequence. The rows that pad a step write
            there and read from there; nobody looks at what comes of it.
    """

    def __init__(
        self, device, *, max_batch, max_tokens, max_rows, max_pages, max_context, spare_page
    ):  # fmt: skip
        self._device = device
        i32 = torch.int32
        fields = dict.fromkeys(_SAMPLER_FLOATS, ((max_rows,), torch.float32))
        integers = ("top_k", "position", "prompt_lens", "history_lens", "output_rows")
        fields |= dict.fromkeys(integers, ((max_rows,), i32))
        fields |= {
            "seed": ((max_rows,), torch.int64),
            "source": ((max_batch,), i32),
            "cu_seqlens": ((max_batch + 1,), i32),
            "cu_outputs": ((max_batch + 1,), i32),
            "context_lens": ((max_batch,), i32),
            "token_ids": ((max_tokens,), i32),
            "positions": ((max_tokens,), i32),
            "page_table": ((max_batch, max_pages), i32),  # last: only its first rows are copied
        }
        self._packed = Packed(device, fields)
        self._row_bytes = 4 * max_pages
        self.tensors = self._packed.tensors
        self._turn = 0
        self._spare_page = spare_page
        # Which pages each row of page_table holds. A sequence's list of pages only grows.
        self._held = [[([], 0)] * max_batch for _ in self._packed.arrays]
        self._sampled = [[] for _ in self._packed.arrays]  # the sequence of each of its rows
        # Only penalties read it: it is copied in pieces.
        shape = (max_rows, max_context)
        memory = device.host(4 * max_rows * max_context)
        self._history = memory.view(i32).view(shape)
        self._history_array = self._history.numpy()
        self.tensors["history"] = device.mirror(memory).view(i32).view(shape)
        self._known = [(None, 0)] * max_rows  # whose tokens a row of it has, and how many

    def fill(self, work, n_outputs, sampled, n_sequences, rows=None, samples=None):
        """Writes a step's inputs and begins to copy them.

        Args:
            work: (sequence, its new tokens) each.
            n_outputs: of how many of each sequence's last tokens the hidden states are wanted.
            sampled: (sequence, index of the token) for each row of logits that is sampled.
            n_sequences: how many to pad to, with one token each.
            rows, samples: where the tokens of `work` are not known yet: they are
                ``samples[rows]``, of what the step before samples, and never leave the device.
        """
        self._turn = (self._turn + 1) % len(self._packed.arrays)
        a, held = self._packed.arrays[self._turn], self._held[self._turn]
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
            pages, known = held[b]
            if pages is not sequence.pages or known != len(pages):
                a["page_table"][b, : len(sequence.pages)] = sequence.pages
                held[b] = sequence.pages, len(sequence.pages)
        self._fill_sampler(a, sampled)
        if n_sequences > len(work):
            self._pad(a, len(work), n_sequences, at)
        if rows is not None:
            a["source"][: len(rows)] = rows
        end = self._packed.begin["page_table"] + n_sequences * self._row_bytes
        self._packed.upload(self._turn, end)
        if rows is not None:
            source, out = (self.tensors[name][: len(rows)] for name in ("source", "token_ids"))
            self._device.run(lambda: torch.index_select(samples, 0, source, out=out))

    def _fill_sampler(self, a, sampled):
        sequences = [sequence for sequence, _ in sampled]
        same = self._sampled[self._turn] == sequences
        for row, (sequence, n) in enumerate(sampled):
            a["position"][row] = n
            if not same:
                params = sequence.params
                for name in (*_SAMPLER_FLOATS, "top_k"):
                    a[name][row] = getattr(params, name)
                a["seed"][row] = sequence.seed
                a["prompt_lens"][row] = sequence.n_prompt
                a["history_lens"][row] = 0
            if sequence.params.penalized:  # and so without guesses
                owner, known = self._known[row]
                known = known if owner is sequence else 0
                self._history_array[row, known:n] = sequence.token_ids[known:n]
                piece = (row, slice(known, n))
                self._device.upload(self.tensors["history"][piece], self._history[piece])
                self._known[row] = sequence, n
                a["history_lens"][row] = n
        self._sampled[self._turn] = sequences

    def _pad(self, a, n, n_padded, at):
        extra = n_padded - n
        a["token_ids"][at : at + extra] = 0
        a["positions"][at : at + extra] = 0
        a["cu_seqlens"][n + 1 : n_padded + 1] = range(at + 1, at + extra + 1)
        a["cu_outputs"][n + 1 : n_padded + 1] = range(at + 1, at + extra + 1)
        a["context_lens"][n:n_padded] = 1
        a["page_table"][n:n_padded, 0] = self._spare_page
        self._held[self._turn][n:n_padded] = [([], 0)] * extra
        a["temperature"][n:n_padded] = 0
        a["history_lens"][n:n_padded] = 0

    def batch(self, n_sequences, n_tokens, n_rows, layers) -> Batch:
        """The model's view of them."""
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

    def sampler_arguments(self, n) -> dict:
        """The sampler's parameters of `n` rows."""
        return {name: self.tensors[name][:n] for name in (*_SAMPLER, "history")}
