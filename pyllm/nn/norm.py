"""Normalization layers."""

import torch
from torch import nn

from pyllm.ops import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """As ``torch.nn.RMSNorm``, on pyllm's kernel, with the residual add fused.

    With ``residual``, ``x + residual`` is normalized and ``(y, x + residual)`` returned; with
    ``quantize``, ``y`` is a `QuantActivation` of that group size.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.
    """

    backend = None

    def forward(self, x, residual=None, quantize=None):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if len(self.normalized_shape) > 1:
            _only_last(self, residual, quantize)
            y = rms_norm(*_as_one(self, x, _ones(self, x)), eps, backend=self.backend)
            return y.view(x.shape)
        weight = parameter(self, "weight")
        if weight is None:
            weight = _ones(self, x)
        return rms_norm(
            _with_rows(x), weight, eps, residual=_with_rows(residual), quantize=quantize,
            backend=self.backend,
        )  # fmt: skip


class LayerNorm(nn.LayerNorm):
    """As ``torch.nn.LayerNorm``, on pyllm's kernel, with the residual add fused.

    With ``residual``, ``x + residual`` is normalized and ``(y, x + residual)`` returned.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.
    """

    backend = None

    def forward(self, x, residual=None):
        if len(self.normalized_shape) > 1:
            _only_last(self, residual, None)
            x_, weight, bias = _as_one(self, x, self.weight, self.bias)
            return layer_norm(x_, weight, bias, self.eps, backend=self.backend).view(x.shape)
        return layer_norm(
            _with_rows(x), parameter(self, "weight"), parameter(self, "bias"), self.eps,
            residual=_with_rows(residual), backend=self.backend,
        )  # fmt: skip


def parameter(module, name):
    """``module.name`` in a fifth of the time: norms of few rows take less than two of those."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _with_rows(x):
    """`x` with its last dimension contiguous, which torch's norms do not ask for."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _ones(norm, x):
    if norm.weight is not None:
        return norm.weight
    return torch.ones(norm.normalized_shape, dtype=x.dtype, device=x.device)


def _only_last(norm, residual, quantize):
    if residual is not None or quantize is not None:
        raise ValueError(
            f"{type(norm).__name__}: residual and quantize: expected a norm over the last "
            f"dimension, got one over {len(norm.normalized_shape)}"
        )


def _as_one(norm, x, *parameters):
    """`x` and the parameters with the normalized dimensions as one."""
    flat = (None if p is None else p.flatten() for p in parameters)
    return x.flatten(-len(norm.normalized_shape)), *flat
