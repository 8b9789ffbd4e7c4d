"""What is written beside every figure: the machine, the versions, the commit, and who else ran."""

import datetime
import json
import os
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pyllm

from . import sensors

HERE = Path(__file__).parent
CHECKOUT = HERE.parent if (HERE.parent / "setup.py").exists() else None
# With a folder a device: in the repository if this is a checkout of it, else in the current folder.
RESULTS = HERE / "results" if CHECKOUT else Path("bench-results")

PACKAGES = [
    "torch", "numpy", "llama-cpp-python", "transformers", "openvino", "openvino-genai",
    "onnxruntime-genai", "triton", "liger-kernel", "gemlite", "flash-attn", "flashinfer-python",
]  # fmt: skip
# Of one core, by others, while we sleep: over this a run is marked as contended.
BUSY = 0.1
FLAGS = re.compile(r"avx|fma|f16c|amx|sve|asimd|bf16|i8mm")


def environment(threads, other=None) -> dict:
    """What the figures depend on besides the code that is measured.

    Args:
        other: the Python of another environment that peers run in.
    """
    from pyllm.cli.report import machine  # here: needs torch, which an environment of peers lacks

    load, busy = os.getloadavg(), busy_cores()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "threads": threads, "flags": flags(), "machine": machine(),
        "gpu": gpu(), "versions": versions(other), "load_average": load, "busy_cores": busy,
        "contended": busy > BUSY, "sensors": sensors.read(),
    }  # fmt: skip


def doubts(where, after=None) -> list[str]:
    """What speaks against figures that were measured in an environment.

    Args:
        after: a reading of the sensors; default: now.
    """
    lines = sensors.remarks(where.get("sensors", {}), sensors.read() if after is None else after)
    if where["contended"]:
        lines.append(f"contended: others kept {where['busy_cores']:.1f} cores busy before")
    return lines


def write(path, data, where) -> None:
    """Writes a benchmark's figures and their environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = where | {"sensors_after": sensors.read()}
    path.write_text(json.dumps(data | {"environment": where}, indent=1) + "\n")


def before(path, where) -> dict | None:
    """What was written there by this very commit on the same device, or None."""
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    then = data.pop("environment")
    same = all(then.get(name) == where[name] for name in ("commit", "gpu", "threads"))
    return data if same and not where["commit"].endswith(("-dirty", "unknown")) else None


def gpu() -> dict | None:
    """The CUDA device: name, compute capability, multiprocessors, bytes, and CUDA's version."""
    import torch  # here: an environment of peers may lack it

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count, "bytes": about.total_memory,
        "cuda": torch.version.cuda,
    }  # fmt: skip


def busy_cores(seconds=1.0) -> float:
    """How many cores others use while this process sleeps; time stolen by a hypervisor counts."""
    others = OtherLoad()
    time.sleep(seconds)
    return round(others.cores(), 3)


class OtherLoad:
    """How many cores others have used since this was made."""

    def __init__(self):
        self._begin = self._now()

    def cores(self) -> float:
        (wall, own, ticks), now = self._begin, self._now()
        used = (now[2] - ticks) / os.sysconf("SC_CLK_TCK") - (now[1] - own)
        return max(0.0, used / (now[0] - wall))

    @staticmethod
    def _now():
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft_irq, steal = map(int, fields)
        ticks = user + nice + system + irq + soft_irq + steal
        return time.perf_counter(), time.process_time(), ticks


def commit() -> str:
    """The commit that is measured, ``-dirty`` if files differ from it; installed, the version.
    ``PYLLM_COMMIT`` says it where the files have come without their repository."""
    if told := os.environ.get("PYLLM_COMMIT"):
        return told
    if CHECKOUT is None:
        return f"pyllm {pyllm.__version__}"
    run = _git("rev-parse", "--short=12", "HEAD")
    # What is written from figures changes none.
    differs = _git("diff", "--quiet", "HEAD", "--", ".", ":!bench/results", ":!*.md").returncode
    return run.stdout.strip() + "-dirty" * bool(differs) if run.returncode == 0 else "unknown"


def _git(*arguments):
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=CHECKOUT)


def flags() -> list[str]:
    """The processor's flags that matter to kernels."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return sorted(f for f in line.split(":", 1)[1].split() if FLAGS.search(f))
    return []


def versions(other=None) -> dict:
    """Of the packages that are measured; those of `other` where this Python has none."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if other:
        code = f"import json; from {__name__} import versions; print(json.dumps(versions()))"
        run = subprocess.run([other, "-c", code], stdout=subprocess.PIPE, text=True)
        if run.returncode == 0:
            found = json.loads(run.stdout) | found
    return found


def device(threads, kind="cpu") -> str:
    """A folder's name for this machine: processor, instruction set and threads; of its GPU for
    `kind` "cuda"."""
    from pyllm.cli.report import machine

    if kind == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", gpu()["name"].lower()).strip("-")
    about = machine()
    isa = next(n for n, use in about["instruction sets"].items() if use == "in use")
    name = f"{about['processor'].partition('@')[0]} {_family()} {isa} {threads} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|processor|cpu", "", name.lower())).strip(
        "-"
    )


def _family():
    """AMD's generation, which the names of virtual processors leave out."""
    info = dict(
        re.findall(r"^(cpu family|model|vendor_id)\s*: (.*)$", Path("/proc/cpuinfo").read_text(),
                   re.MULTILINE)
    )  # fmt: skip
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(info["cpu family"]), int(info["model"])
    zen4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF
    return {23: "zen", 25: "zen4" if zen4 else "zen3", 26: "zen5"}.get(family, "")
