"""The rows of the machine-code table that are ``kernels/*.py``: groups ``triton/OP/TARGET``.

Triton brings its compilers, so its version says what made a row.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[1]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
_locks = {target: Lock() for target in TARGETS}


def missing() -> str | None:
    """Why there can be no rows here, or None if there can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def compiler() -> str:
    """``triton 3.9.0``."""
    return f"triton {importlib.metadata.version('triton')}"


def groups() -> list[str]:
    """``triton/rms_norm/cuda:80`` and so on."""
    from .triton_code import CASES

    return [f"triton/{op}/{target}" for op in sorted(CASES) for target in TARGETS]


def files() -> list[Path]:
    """The kernels, and the calls that are compiled."""
    import pyllm.kernels

    folder = Path(*pyllm.kernels.__path__)
    return [*sorted(folder.glob("*.py")), Path(__file__).with_name("triton_code.py")]


def fingerprint() -> str:
    """Of the sources without comments, docstrings and layout."""
    text = "\n".join(file.read_text() for file in files())
    text = re.sub(r'"""[\s\S]*?"""|#.*', "", text)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def rows(group: str, folder: Path) -> dict[str, dict]:
    """The kernels of an op; Triton's own cache serves while nothing changes."""
    _, op, target = group.split("/")
    with _locks[target]:  # what comes first compiles all ops
        return _rows(target)[op]


@functools.cache
def _rows(target):
    """By op. In a process of its own: this one may have Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pyllm.bench.triton_code", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{done.stderr.strip()}\nfailed: {' '.join(command)}")
    return json.loads(done.stdout)
