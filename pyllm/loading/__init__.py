"""Models from disk or the network: GGUF files, Hugging Face directories, tokenizers, downloads."""

from .checkpoint import Checkpoint, TensorInfo
from .errors import LoadError
from .open import open_checkpoint
from .pull import MODELS, pull
from .resolve import resolve

__all__ = ["MODELS", "Checkpoint", "LoadError", "TensorInfo", "open_checkpoint", "pull", "resolve"]
