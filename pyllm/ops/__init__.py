"""The functional API: one function an op. See `pyllm.ops.registry` for how a backend is chosen."""

from pyllm.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
