"""The packed layout of quantized weights, in PyTorch; also the oracle of the C++ converter.

The layout is described in ``csrc/core/quant_matrix.h``; every CPU kernel reads it.
"""

import torch

PANEL_ROWS = 16


def group_bytes(bits: int, group_size: int, has_minimum: bool) -> int:
    """The bytes of one group of `group_size` k of 16 rows."""
    return (64 if has_minimum else 32) + PANEL_ROWS * group_size * bits // 8


def packed_bytes(n: int, k: int, bits: int, group_size: int, has_minimum: bool) -> int:
    """The bytes of a packed ``[n, k]`` weight."""
    panels = -(-n // PANEL_ROWS)
    return panels * (k // group_size) * group_bytes(bits, group_size, has_minimum)


def pack(q, scale, minimum, bits: int) -> torch.Tensor:
    """Packs quants ``uint8 [N, K]`` with float16 ``scale`` and ``minimum`` (or None) ``[N, G]``."""
    n, groups = scale.shape
    pad = (0, 0, 0, -n % PANEL_ROWS)
    panels = (n + pad[3]) // PANEL_ROWS
    quads = torch.nn.functional.pad(q, pad).view(panels, PANEL_ROWS, groups, -1, 4)
    quads = quads.permute(0, 2, 3, 1, 4)  # [panel, group, quad, row, 4]
    if bits == 4:
        low, high = quads.chunk(2, dim=2)
        quads = low | high << 4
    parts = [scale] if minimum is None else [scale, minimum]
    columns = []
    for part in parts:
        rows = torch.nn.functional.pad(part, pad).view(panels, PANEL_ROWS, groups)
        columns.append(rows.transpose(1, 2).contiguous().view(torch.uint8))
    columns.append(quads.reshape(panels, groups, -1))
    return torch.cat(columns, dim=2).flatten()


def unpack(packed, n: int, k: int, bits: int, group_size: int, has_minimum: bool):
    """The inverse of `pack`: ``(q, scale, minimum or None)``."""
    groups, panels = k // group_size, -(-n // PANEL_ROWS)
    blocks = packed.view(panels, groups, -1)
    parts = []
    for i in range(2 if has_minimum else 1):
        rows = blocks[:, :, 32 * i : 32 * i + 32].contiguous().view(torch.float16)
        parts.append(rows.transpose(1, 2).reshape(-1, groups)[:n])
    quads = blocks[:, :, 32 * len(parts) :].reshape(panels, groups, -1, PANEL_ROWS, 4)
    if bits == 4:
        quads = torch.cat([quads & 15, quads >> 4], dim=2)
    q = quads.permute(0, 3, 1, 2, 4).reshape(-1, k)[:n]
    return q, parts[0], parts[1] if has_minimum else None
