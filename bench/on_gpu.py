"""What `bench/on_gpu.sh` does: everything that a GPU is needed for, in the order of importance.

Every step gets its share of the time that is left and is ended when that is over; what it wrote
stays. Each test file and each op's benchmark is a process of its own, since a kernel that reads
where it must not takes the device from its process. What has ended at the same commit on the same
device is not begun again: the results of the last run lie in the folder, or come with --previous.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LOG, STEPS_FILE = "log.txt", "steps.json"
TESTS, KERNELS, DECODE = "gpu_tests.json", "kernels-{dtype}.json", "gpu_decode.json"
LOG_BYTES = 8 << 20
GRACE = 5  # seconds from being asked to end until being killed
PYTEST_FOUND_NONE = 5
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".def")


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Attributes:
        name: what the summary says.
        share: of the time that is left, beside those of the steps that follow; None for all.
        commands: ``commands(run, seconds)``, one after the other.
        env: added to the environment.
        needs: a program without which the step is left out, unless it is a dry run.
        accepts: the exit statuses that are as good as 0.
    """

    name: str
    share: float | None
    commands: Callable[["Run", float], list[list]]
    env: dict[str, str]
    needs: str | None = None
    accepts: tuple[int, ...] = ()


class Run:
    """The options, the folder that is written to, and the clock."""

    def __init__(self, options):
        self.out, self.dry, self.scratch = options.out, options.dry_run, tempfile.mkdtemp()
        self.begin = time.monotonic()
        self.end = self.begin + 60 * options.minutes - GRACE
        self.out.mkdir(parents=True, exist_ok=True)
        if options.previous and options.previous.resolve() != self.out.resolve():
            for path in options.previous.glob("*.json"):
                if not (self.out / path.name).exists():
                    shutil.copy(path, self.out)
        paths = [str(ROOT), *unpack(options.wheels, Path(self.scratch))]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            self.env["TRITON_INTERPRET"] = "1"
        self.commit, self.steps = options.commit, {}

    def identify(self) -> None:
        """Notes the commit and the machine; needs what was built."""
        from pyllm.bench import record

        self.commit = self.commit or identity(record.commit())
        os.environ["PYLLM_COMMIT"] = self.env["PYLLM_COMMIT"] = self.commit
        self.where = record.environment(None)

    def run(self, step, seconds) -> dict:
        """Runs the commands of a step for so many seconds; returns its record."""
        begin = time.monotonic()
        record = {"outcome": "done", "commands": 0, "ended": 0}
        for command in step.commands(self, seconds):
            record["commands"] += 1
            left = begin + seconds - time.monotonic()
            status = self._execute(list(map(str, command)), step.env, left) if left > 0 else None
            if status is None:
                record["outcome"] = "out of time"
                continue
            record["ended"] += 1
            if status not in (0, *step.accepts) and record["outcome"] == "done":
                record["outcome"] = f"failed ({status})"
        return record | {"seconds": round(time.monotonic() - begin, 1)}

    def _execute(self, command, env, seconds):
        """The exit status, or None if it did not end in time."""
        log = self.out / LOG
        with open(log, "a") as file:
            print(f"\n$ {shlex.join(command)}", file=file, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.env | env, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                # As by Control-C first: pytest then still writes what has passed.
                for sign, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
                    os.killpg(process.pid, sign)
                    try:
                        process.wait(patience)
                        break
                    except subprocess.TimeoutExpired:
                        continue
                return None
            finally:
                trim(log, LOG_BYTES)


def unpack(folder, into) -> list[str]:
    """Pure wheels in a folder, unpacked: what goes onto the path."""
    wheels = sorted(Path(folder).glob("*-none-any.whl")) if folder else []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into / "wheels")
    return [str(into / "wheels")] if wheels else []


def trim(path, most) -> None:
    """Shortens a file to its last `most` bytes."""
    if path.stat().st_size > most:
        with open(path, "rb") as file:
            file.seek(-most, os.SEEK_END)
            rest = file.read()
        path.write_bytes(rest)


def identity(commit) -> str:
    """Where files differ from the commit, or there is none, what they have in them says which."""
    if not commit.endswith(("-dirty", "unknown")):
        return commit
    digest = hashlib.sha256()
    for folder in ("bench", "csrc", "kernels", "pyllm", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES or path.suffix == ".py":
                digest.update(path.read_bytes())
    return f"{commit}-{digest.hexdigest()[:8]}"


def _bench(*arguments):
    return [sys.executable, "-m", "bench", *arguments]


def build(run, seconds):
    """Nothing where the libraries are newer than their sources."""
    kernels = "libpyllm_cuda_emulated.so" if run.dry else "libpyllm_cuda.so"
    built = [*ROOT.glob("pyllm/_C.*.so"), ROOT / "pyllm" / kernels]
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCES]
    newest = max(p.stat().st_mtime for p in sources)
    if len(built) > 1 and all(p.exists() and p.stat().st_mtime >= newest for p in built):
        return []
    return [[sys.executable, "setup.py", "build_ext", "--inplace"]]


def test_files(run, seconds):
    """The tests of the ops, those of the benchmarks' kernels first."""
    from pyllm.bench import kernels, record

    if run.dry:
        return [[sys.executable, "-m", "pytest", "-q", "tests/test_rms_norm.py", "-k", "emulator"]]
    stems = [p.stem.strip("_") for p in sorted((ROOT / "pyllm/ops").glob("*.py"))]
    stems = ("norm", *kernels.OPS, *stems, "device_kernels")  # the last: whole models
    names = dict.fromkeys(f"tests/test_{stem}.py" for stem in stems)
    before = record.before(run.out / TESTS, run.where) or {"files": {}}
    return [
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", name, "--record-gpu", run.out / TESTS]
        for name in names
        if (ROOT / name).exists() and not before["files"].get(name, {}).get("complete")
    ]


def sanitizer(tool, seed):
    """Our CUDA kernels on small shapes; the emulator, in its place, finds the same by itself."""

    def commands(run, seconds):
        verify = ("kernels", "--rounds", 0, "--shapes", "tiny", "--dtype", "float16")
        verify += ("--out", Path(run.scratch) / f"{tool}.json")
        if run.dry:
            return [
                ["env", f"PYLLM_EMULATOR_SEED={seed}", *_bench(*verify, "--backend", "emulator")]
            ]
        prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9]
        prefix += ["--kernel-name", "kns=pyllm"]
        return [[*prefix, *_bench(*verify, "--backend", "cuda", "--device", "cuda")]]

    # Without PyTorch's cache, which hides that memory is not the kernel's.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, 0.5, commands, env, needs="compute-sanitizer")


def benchmarks(backend, share, baseline):
    def commands(run, seconds):
        from pyllm.bench.kernels import OPS

        from pyllm.ops import registry

        if run.dry:
            instead = {"cuda": "emulator"}.get(backend, backend)
            about = ["--shapes", "tiny", "--rounds", 1, "--dtype", "float16", "--backend", instead]
            groups, dtype = [OPS], "float16"
        else:
            about = ["--device", "cuda", "--dtype", "bfloat16", "--backend", backend]
            groups = [[op] for op in OPS if backend in registry.OPS[op].backends]
            dtype = "bfloat16"
        about += ["--resume", "--out", run.out / KERNELS.format(dtype=dtype), *baseline]
        return [_bench("kernels", *about, *(f"--op={op}" for op in ops)) for ops in groups]

    return Step(f"kernels, {backend}", share, commands, {})


def decode(run, seconds):
    about = ["gpu_decode", "--minutes", f"{0.7 * seconds / 60:.2f}", "--out", run.out / DECODE]
    if run.dry:
        about += ["--shape", "tiny", "--device", "cpu", "--backend", "emulator,reference"]
        about += ["--dtype", "float16", "--scale", 64, "--no-peers"]
    return [_bench(*about)]


# For the card that is there, without what only tests on a CPU need.
_BUILD = {"PYLLM_CUDA": "ON", "PYLLM_EMULATOR": "OFF"}
STEPS = [
    Step("build", None, build, _BUILD),
    Step("tests", 1.5, test_files, {}, accepts=(PYTEST_FOUND_NONE,)),
    sanitizer("memcheck", seed=1),
    benchmarks("cuda", 2, []),
    Step("decode", 2, decode, {}),
    sanitizer("racecheck", seed=2),
    benchmarks("triton", 1, ["--baseline", "torch"]),
]


def main(arguments=None) -> int:
    """Returns the exit status: 1 if a step failed."""
    parser = argparse.ArgumentParser("bench/on_gpu.sh", description=__doc__.partition("\n")[0])
    out = Path(os.environ.get("OUT", "bench-results/on-gpu"))
    parser.add_argument("--out", type=Path, default=out, help="folder of the results; also $OUT")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (8)")
    parser.add_argument("--previous", type=Path, help="folder of an earlier run, to go on from")
    parser.add_argument("--wheels", type=Path, help="folder of pure wheels to measure beside")
    parser.add_argument("--commit", help="what to write as the commit where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, small")
    parser.add_argument(
        "--only", choices=[step.name for step in STEPS], action="append", help="repeatable"
    )
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run does without")
    run = Run(options)
    steps = [s for s in STEPS if s.name == "build" or not options.only or s.name in options.only]
    perform(run, steps)
    print(summary(run))
    return int(any(s["outcome"].startswith("failed") for s in run.steps.values()))


def perform(run, steps) -> None:
    """Runs the steps, the build first; after each, writes what has become of them all."""
    before = None
    for i, step in enumerate(steps):
        left = run.end - time.monotonic()
        shares = sum(s.share for s in steps[i:] if s.share)
        seconds = left * step.share / shares if step.share else left
        print(f"{time.monotonic() - run.begin:5.0f} s  {step.name}: {seconds:.0f} s", flush=True)
        if before is not None and (old := before["steps"].get(step.name)) and _ended(old):
            run.steps[step.name] = old | {"before": True}
        elif step.needs and not run.dry and not shutil.which(step.needs):
            run.steps[step.name] = {"outcome": f"absent: there is no {step.needs}", "seconds": 0}
        else:
            run.steps[step.name] = run.run(step, max(seconds, 0.0))
        if step.share is None:  # built: from here on pyllm can be imported
            if run.steps[step.name]["outcome"] != "done":
                return
            from pyllm.bench import record

            run.identify()
            before = record.before(run.out / STEPS_FILE, run.where) or {"steps": {}}
        record.write(run.out / STEPS_FILE, {"steps": run.steps}, run.where)


def _ended(step):
    """Whether it ended by itself: that it failed stays so at the same commit."""
    return step["outcome"] == "done" or step["outcome"].startswith("failed")


def summary(run) -> str:
    """The last lines of the log of what failed, the figures, and what became of each step."""
    lines = []
    if any(s["outcome"].startswith("failed") for s in run.steps.values()):
        tail = (run.out / LOG).read_text(errors="replace").splitlines()[-40:]
        lines += [f"the end of {run.out / LOG}:", *tail, ""]
    lines.append(f"{'step':16} {'seconds':>8}  outcome")
    for name, step in run.steps.items():
        what = step["outcome"] + (", before" if step.get("before") else "")
        if step.get("ended", 0) < step.get("commands", 0):
            what += f": {step['ended']} of {step['commands']} ended"
        lines.append(f"{name:16} {step['seconds']:8.1f}  {what}")
    files = ", ".join(f"{p.name} {p.stat().st_size >> 10} KiB" for p in sorted(run.out.iterdir()))
    return "\n".join([*lines, f"{run.out}: {files}"])


if __name__ == "__main__":
    sys.exit(main())
