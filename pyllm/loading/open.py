"""Opens a model of either format."""

from pathlib import Path

from .errors import LoadError
from .gguf import GGUFCheckpoint
from .huggingface import HuggingFaceCheckpoint


def open_checkpoint(path):
    """Opens a .gguf file, or a directory with config.json and *.safetensors.

    Only headers are read; tensors are mapped, and the tokenizer is built when asked for.

    Raises:
        LoadError: not a model, corrupt, or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return HuggingFaceCheckpoint(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise LoadError(
                path,
                "expected a directory with config.json or one .gguf file, found "
                + (f"{len(files)} .gguf files: name one of them" if files else "neither"),
            )
        path = files[0]
    return GGUFCheckpoint(path)
