"""From what a person types to a path."""

import difflib
import os
import re
from pathlib import Path

from .errors import LoadError
from .pull import MODELS, cached, pull

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?")
# A model's files at the top of its repository; not the same weights in another layout.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]


def resolve(model, *, progress=True):
    """The path of a model: a file or directory, downloaded first if need be.

    Args:
        model: a path; or a key of `MODELS`; or a hub id, "org/name" for a repository with
            safetensors or "org/name/file.gguf" for one file. Hub ids go through huggingface_hub,
            with its cache and settings (HF_HOME, HF_HUB_OFFLINE, ...).
        progress: show a bar on stderr while downloading.

    Raises:
        LoadError: none of these, or it could not be downloaded.
    """
    name = str(model)
    if not name:
        raise LoadError("model", "expected a path or the name of a model, got nothing")
    path = Path(model).expanduser()
    if os.path.lexists(path):
        return path
    if name in MODELS:
        return cached(name) or pull(name, progress=progress)
    hub = HUB_ID.fullmatch(name)
    # A name that cannot be a hub id's because of where it points or how it ends is a path.
    if hub is None or name.startswith((".", "~")) or (name.endswith(".gguf") and not hub[2]):
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LoadError(
            name,
            f"no such file or directory, and no known model ({', '.join(MODELS)}){hint}; "
            "a hub id has the form org/name",
        )
    return _from_hub(name, hub[1], hub[2])


def _from_hub(name, repository, file):
    try:
        import huggingface_hub
    except ImportError:
        raise LoadError(
            name,
            "no such path; as a hub id it needs huggingface_hub: pip install 'pyllm[hub]'",
        ) from None
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED
            )
        )
    except Exception as error:  # many kinds: HTTP, offline, gated, no such repository
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise LoadError(
            name,
            f"no such path, and not fetched from the hub: {type(error).__name__}: {first}",
        ) from None
