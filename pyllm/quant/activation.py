"""`QuantActivation`: int8 activations with a scale per row and group."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantActivation:
    """``[T, K]`` activations of about ``d * q``, one block of bytes a row.

    A row is ``int8 q[K]``, ``float32 d[G]``, ``float32 s[G] = d * sum(q)``, ``int32 c[G] = -8 *
    sum(q)``, padded to a multiple of 64 bytes; see ``csrc/cpu/quantize_activation.h``.

    Attributes:
        data: uint8 ``[T, row_bytes]``.
        k: K.
        group_size: 16 or 32.
    """

    data: torch.Tensor
    k: int
    group_size: int

    @staticmethod
    def row_bytes(k: int, group_size: int) -> int:
        return -(-(k + 12 * (k // group_size)) // 64) * 64

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.k

    @property
    def device(self) -> torch.device:
        return self.data.device

    def parts(self):
        """``(q int8 [T, K], d float32 [T, G], s float32 [T, G], c int32 [T, G])``."""
        g = self.k // self.group_size
        q = self.data[:, : self.k].contiguous().view(torch.int8)
        words = self.data[:, self.k : self.k + 12 * g].contiguous()
        d, s = words[:, : 8 * g].contiguous().view(torch.float32).chunk(2, dim=1)
        return q, d, s, words[:, 8 * g :].contiguous().view(torch.int32)

    def dequantize(self) -> torch.Tensor:
        """float32 ``[T, K]``."""
        q, d, _, _ = self.parts()
        return (q.unflatten(1, (-1, self.group_size)).float() * d.unsqueeze(2)).flatten(1)
