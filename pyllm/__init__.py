"""pyllm: hand-written kernels for language models, with a thin runtime that decodes with them.

``import pyllm`` is light: what costs time to import (models, tokenizers) loads on first use.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "LLM": "pyllm.runtime.llm",
    "QuantTensor": "pyllm.quant",
    "ops": "pyllm.ops",
}

__all__ = ["LLM", "QuantTensor", "__version__", "ops"]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'pyllm' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"pyllm.{name}" else getattr(module, name)
    globals()[name] = value
    return value
