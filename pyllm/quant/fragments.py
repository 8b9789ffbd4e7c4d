"""`QuantFragments`: a quantized weight in the order in which tensor cores take it."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from pyllm.quant.tensor import QuantTensor, describe_format

# A cell is 32 rows by 32 k. Of its quants, by the names of the layout, row = 4 g + 2 i + a and
# k = 16 j + 8 b + 2 t + p. As stored, the two nibbles of a byte last:
_STORED = {4: "gtijpba", 8: "igtjbap"}
_ROWS, _DEPTH = "gia", "jbtp"
_SIZES = {"g": 8, "i": 2, "a": 2, "j": 2, "b": 2, "t": 4, "p": 2}


@dataclass(frozen=True, repr=False)
class QuantFragments:
    """What the CUDA kernels read; `pyllm.ops.pack_fragments` makes it from a `QuantTensor`.

    Attributes:
        packed: uint8, one-dimensional; the layout is in ``csrc/core/quant_fragments.h``.
        shape: ``(N, K)``.
        bits, group_size, has_minimum: as of the `QuantTensor`.
    """

    packed: torch.Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    has_minimum: bool

    @staticmethod
    def empty_like(weight: QuantTensor) -> "QuantFragments":
        """Room for the fragments of `weight`."""
        (n, k), (_, cells, groups) = weight.shape, _span(weight.group_size)
        span = cells * 128 * weight.bits + groups * 64 * (1 + weight.has_minimum)
        size = -(-n // 32) * -(-k // (32 * cells)) * span
        packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        return QuantFragments(packed, (n, k), weight.bits, weight.group_size, weight.has_minimum)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def fragment_arguments(self):
        """What bindings take: ``(packed, N, K, bits, group_size, has_minimum)``."""
        return self.packed, *self.shape, self.bits, self.group_size, self.has_minimum

    @staticmethod
    def from_parts(q, scale, minimum=None, *, bits) -> "QuantFragments":
        """From quants ``uint8 [N, K]``, scale and minimum ``float16 [N, G]``; in PyTorch."""
        (n, k), group_size = q.shape, q.shape[1] // scale.shape[1]
        stored, cells, groups = _span(group_size)
        strips, spans = -(-n // 32), -(-k // (32 * cells))
        names = "x" + _ROWS + "y" + _DEPTH
        q = pad(q, (0, spans * cells * 32 - k, 0, strips * 32 - n))
        q = q.view(*_sizes(names, strips, spans * cells))
        q = q.permute([names.index(name) for name in "xy" + _STORED[bits]])
        if bits == 4:
            q = q[..., 0] | q[..., 1] << 4
        parts = torch.stack([scale] if minimum is None else [scale, minimum], dim=2)
        parts = parts[:, torch.arange(0, k, stored, device=q.device) // group_size]
        parts = pad(parts, (0, 0, 0, spans * groups - parts.shape[1], 0, strips * 32 - n))
        parts = parts.view(strips, 8, 4, spans, groups, -1).permute(0, 3, 1, 4, 5, 2)
        parts = parts.reshape(strips, spans, -1).contiguous().view(torch.uint8)
        packed = torch.cat([q.reshape(strips, spans, -1), parts], dim=2).flatten()
        return QuantFragments(packed, (n, k), bits, group_size, minimum is not None)

    def panels(self) -> QuantTensor:
        """The `QuantTensor` that this is made from; in PyTorch."""
        (n, k), (stored, cells, groups) = self.shape, _span(self.group_size)
        strips, spans = -(-n // 32), -(-k // (32 * cells))
        blocks = self.packed.view(strips, spans, -1)
        quants = cells * 128 * self.bits
        q, parts = blocks.split([quants, blocks.shape[2] - quants], dim=2)
        if self.bits == 4:
            q = torch.stack([q & 15, q >> 4], dim=-1)
        names = "xy" + _STORED[self.bits]
        q = q.reshape(_sizes(names, strips, spans * cells))
        q = q.permute([names.index(name) for name in "x" + _ROWS + "y" + _DEPTH])
        q = q.reshape(strips * 32, spans * cells * 32)[:n, :k].contiguous()
        parts = parts.contiguous().view(torch.float16).view(strips, spans, 8, groups, -1, 4)
        parts = parts.permute(4, 0, 2, 5, 1, 3).reshape(-1, strips * 32, spans * groups)
        parts = parts[:, :n, torch.arange(0, k, self.group_size, device=q.device) // stored]
        minimum = parts[1] if self.has_minimum else None
        return QuantTensor.from_parts(q, parts[0], minimum, bits=self.bits)

    def __repr__(self):
        return f"QuantFragments({describe_format(self)})"


def _span(group_size):
    """The group size as stored; the cells and groups of a span, which has the scales of all."""
    stored = 16 if group_size % 32 else 128 if group_size > 64 else group_size
    return stored, max(1, stored // 32), max(1, 32 // stored)


def _sizes(names, strips, cells):
    return [{"x": strips, "y": cells, **_SIZES}[name] for name in names]
