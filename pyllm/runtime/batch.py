"""What a model is given: the new tokens of all sequences, end to end."""

from dataclasses import dataclass

import torch

from pyllm.ops import embedding


@dataclass
class Batch:
    """A ragged batch of T new tokens of B sequences.

    Attributes:
        token_ids: int32 ``[T]``.
        positions: int32 ``[T]``, the index of each token in its sequence.
        cu_seqlens: int32 ``[B + 1]``, where each sequence's new tokens begin.
        context_lens: int32 ``[B]``, tokens of each sequence including the new ones.
        page_table: int32 ``[B, max_pages]``.
        layers: for each layer ``(k_cache, v_cache)``.
        output_rows: int32 ``[R]``, the tokens whose hidden states are wanted, the last ones of each
            sequence; None for all.
        cu_outputs: int32 ``[B + 1]``, where each sequence's begin in output_rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    context_lens: torch.Tensor
    page_table: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    cu_outputs: torch.Tensor
    output_rows: torch.Tensor | None = None

    def outputs(self, x):
        """The rows of ``x [T, D]`` whose hidden states are wanted: ``[R, D]``."""
        return x if self.output_rows is None else embedding(self.output_rows, x)
