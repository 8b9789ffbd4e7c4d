"""Normalization layers."""

from torch import nn

from pyllm.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """As ``torch.nn.RMSNorm``, on pyllm's kernel, with the residual add fused.

    With ``residual``, ``x + residual`` is normalized and ``(y, x + residual)`` returned; with
    ``quantize``, ``y`` is a `QuantActivation` of that group size.
    """

    def forward(self, x, residual=None, quantize=None):
        return rms_norm(x, self.weight, self.eps, residual=residual, quantize=quantize)
