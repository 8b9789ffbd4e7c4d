"""The rows of the machine-code table that are ``csrc/cuda/*.cu``: groups ``cuda/FILE/sm_ARCH``."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from . import cubin

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc/cuda"
ARCHS = ("80", "90a")
_SPILLS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.S
)


def missing() -> str | None:
    """Why there can be no rows here, or None if there can."""
    if not shutil.which("nvcc"):
        return "there is no nvcc"
    if not any(SOURCES.glob("*.cu")):
        return "an installed package has no kernel sources; use a checkout"
    return None


def compiler() -> str:
    """``nvcc 13.0.88``."""
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V(\d+\.\d+\.\d+)", out)[1]


def groups() -> list[str]:
    """``cuda/rms_norm/sm_80`` and so on."""
    sources = sorted(source.stem for source in SOURCES.glob("*.cu"))
    return [f"cuda/{source}/sm_{arch}" for source in sources for arch in ARCHS]


def files() -> list[Path]:
    """All sources that a kernel is made from: those of the folder, and what they include."""
    found = [f for f in SOURCES.iterdir() if f.suffix in (".cu", ".cuh", ".h")]
    for file in found:  # which grows
        for name in re.findall(r'^#include "(.+)"', file.read_text(), flags=re.M):
            included = ROOT / "csrc" / name
            # The emulator's are for other compilers.
            if included not in found and not name.startswith("emulator/"):
                found.append(included)
    return sorted(found)


def fingerprint() -> str:
    """Of the sources without comments and layout."""
    text = "\n".join(re.sub(r"//.*", "", file.read_text()) for file in files())
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def rows(group: str, folder: Path) -> dict[str, dict]:
    """The kernels of a file; the cubin stays in `folder` and serves until a source changes."""
    _, name, target = group.split("/")
    source, out = SOURCES / f"{name}.cu", folder / f"{name}.{target}.cubin"
    log, used = out.with_suffix(".log"), out.with_suffix(".d")
    if not log.exists() or log.stat().st_mtime < _newest(used):
        arch = target.removeprefix("sm_")
        command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(out)]
        command += ["-MD", "-MF", str(used)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{done.stderr.strip()}\nfailed: {' '.join(command)}")
        log.write_text(done.stdout + done.stderr)
    spilled = {name: int(a) + int(b) for name, a, b in _SPILLS.findall(log.read_text())}
    kernels = cubin.read(out)
    names = cubin.demangled(list(kernels))
    return {names[n]: k | {"spilled": spilled[n]} for n, k in kernels.items()}


def _newest(used: Path) -> float:
    """When a file that a cubin was made from last changed; infinity if one is gone."""
    if not used.exists():
        return float("inf")
    files = [Path(name) for name in used.read_text().split(":", 1)[1].replace("\\\n", "").split()]
    return max(f.stat().st_mtime if f.exists() else float("inf") for f in files)
