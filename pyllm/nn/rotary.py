"""The angles of rotary embeddings, with the published ways to stretch them to longer contexts."""

import math

import numpy as np
import torch


def rotary_table(dim, n_positions, theta, scaling=None, factors=None) -> torch.Tensor:
    """Cosines and sines for `rope_cache`.

    Args:
        dim: how many of a head's dimensions are rotated.
        n_positions: rows of the table.
        theta: the base of the frequencies.
        scaling: None or a dict with ``rope_type``: ``linear`` (positions divided by ``factor``),
            ``llama3`` (Llama 3.1: low frequencies divided by ``factor``) or ``yarn`` (Peng et al.,
            2023, arXiv:2309.00071); the other keys are named as in Hugging Face's configurations.
        factors: float ``[dim / 2]`` by which frequencies are divided (GGUF's
        ``rope_freqs.weight``).

    Returns:
        float32 ``[n_positions, dim]``: cosines in the first half, sines in the second.

    Raises:
        ValueError: for a way of scaling that is not one of these.
    """
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    magnitude = 1.0
    scaling = scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequencies = frequencies / _positive(scaling, "factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(frequencies, theta, dim, scaling)
    elif kind != "default":
        raise ValueError(f"rope_type: expected default, linear, llama3 or yarn, got {kind!r}")
    if factors is not None:
        if factors.numel() != dim // 2:
            raise ValueError(f"rope_freqs: expected {dim // 2} factors, got {factors.numel()}")
        frequencies = frequencies / factors.double().cpu().numpy()
    # In NumPy: PyTorch would start threads of its own for this, and lose more time than it takes.
    angles = np.outer(np.arange(n_positions, dtype=np.float64), frequencies)
    table = np.empty((n_positions, dim), dtype=np.float32)
    table[:, : dim // 2] = np.cos(angles) * magnitude
    table[:, dim // 2 :] = np.sin(angles) * magnitude
    return torch.from_numpy(table)


def _llama3(frequencies, scaling):
    factor, context = _positive(scaling, "factor"), _positive(scaling, _CONTEXT)
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    turns = context * frequencies / (2 * math.pi)  # turns within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn(frequencies, theta, dim, scaling):
    factor, context = _positive(scaling, "factor"), _positive(scaling, _CONTEXT)

    def dimension(turns):  # the dimension that makes so many turns within the original context
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    magnitude = scaling.get("attention_factor") or 0.1 * math.log(max(factor, 1.0)) + 1.0
    return frequencies / factor * ramp + frequencies * (1 - ramp), magnitude


_CONTEXT = "original_max_position_embeddings"


def _positive(scaling, name):
    value = scaling.get(name)
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"rope scaling {name}: expected a number above 0, got {value!r}")
    return value
