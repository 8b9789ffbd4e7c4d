"""Models from disk or the network: GGUF files, Hugging Face directories, tokenizers, downloads."""

from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .errors import LoadError
from .pull import MODELS, pull
from .resolve import resolve

__all__ = ["MODELS", "Checkpoint", "LoadError", "TensorInfo", "open_checkpoint", "pull", "resolve"]
