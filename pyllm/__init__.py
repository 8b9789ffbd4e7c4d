"""pyllm: hand-written kernels for language models, with a thin runtime that decodes with them.

``import pyllm`` is light: what costs time to import (models, tokenizers) loads on first use.
"""

import importlib

from pyllm.collector import paused_collector

__version__ = "0.1.0"

DEFAULT_MODEL = "smollm2-135m"

_LAZY = {
    "_C": "pyllm._C",
    "LLM": "pyllm.runtime.llm",
    "QuantTensor": "pyllm.quant",
    "nn": "pyllm.nn",
    "ops": "pyllm.ops",
    "sdpa": "pyllm.ops._sdpa",
    "patch": "pyllm.nn.patching",
    "unpatch": "pyllm.nn.patching",
}

__all__ = ["LLM", "QuantTensor", "__version__", "nn", "ops", "patch", "sdpa", "unpatch"]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'pyllm' has no attribute {name!r}")
    try:
        with paused_collector():
            module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name != "pyllm._C":
            raise
        raise ImportError(
            f"{__path__[0]} is source code without its compiled part: run `pip install -e .` "
            "there, or, if pyllm is installed elsewhere, leave the folder of the source"
        ) from None
    value = module if _LAZY[name] == f"pyllm.{name}" else getattr(module, name)
    globals()[name] = value
    return value
