"""Activations and weights with one scale a row, what int8 and fp8 matrix units multiply."""

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass
class QuantRows:
    """``[..., D]`` activations, or a weight ``[N, K]``, of about ``scale * q``.

    Attributes:
        q: int8 or float8_e4m3fn ``[..., D]``.
        scale: float32 ``[...]``: the largest absolute value of a row over that of q's dtype, 127 or
            448. Zero for rows with no value above 1e-30, NaN for rows with NaN or inf.
    """

    q: torch.Tensor
    scale: torch.Tensor

    LIMITS: ClassVar = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

    @staticmethod
    def from_float(x: torch.Tensor, dtype: torch.dtype) -> "QuantRows":
        """Rounds each row of `x` to the nearest, ties to even."""
        x = x.float()
        top = x.abs().amax(-1, keepdim=True)
        finite, limit = top.isfinite(), QuantRows.LIMITS[dtype]
        tiny = ~(top > 1e-30)
        # Not limit / top, for which torch multiplies by the rounded reciprocal of top.
        inverse = torch.full_like(top, limit).div(top)
        scaled = torch.where(tiny | ~finite, 0, x * inverse).clamp(-limit, limit)
        scale = torch.where(tiny, 0, top / limit).masked_fill(~finite, float("nan"))
        return QuantRows(
            (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale[..., 0]
        )

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def device(self) -> torch.device:
        return self.q.device

    def dequantize(self) -> torch.Tensor:
        """float32 ``[..., D]``."""
        return self.q.float() * self.scale[..., None]
