"""`layer_norm` at the hidden sizes of models."""

from functools import partial

from . import _norm

cases = partial(_norm.cases, "layer_norm")
