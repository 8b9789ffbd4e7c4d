"""Clocks and temperatures around a measurement: whether the machine was held back."""

import shutil
import statistics
import subprocess
from pathlib import Path

# A processor's clock that is lower than this share of that before is remarked upon.
SLOWED = 0.9
# The bits of NVML's nvmlClocksEventReasons that mean that the GPU was held back.
REASONS = {0x04: "power cap", 0x08: "slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}
_QUERY = "clocks.sm,clocks.max.sm,temperature.gpu,clocks_event_reasons.active"


def read(root=Path("/sys")) -> dict:
    """What there is now of ``cpu_mhz`` (of the median core), ``cpu_celsius`` (of the hottest
    sensor), ``gpu_mhz``, ``gpu_mhz_most``, ``gpu_celsius`` and ``gpu_held_back``, the reasons.
    Virtual machines have none of a processor."""
    found = {}
    cores = _numbers(root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if cores:
        found["cpu_mhz"] = statistics.median(cores) / 1e3
    hot = _numbers(root.glob("class/thermal/thermal_zone*/temp"))
    if hot:
        found["cpu_celsius"] = max(hot) / 1e3
    return found | _gpu()


def remarks(before: dict, after: dict) -> list[str]:
    """What two readings say against the figures between them."""
    lines = []
    mhz = [x.get("cpu_mhz") for x in (before, after)]
    if all(mhz) and mhz[1] < SLOWED * mhz[0]:
        lines.append(f"the processor's clock fell from {mhz[0]:.0f} to {mhz[1]:.0f} MHz")
    now, most = after.get("gpu_mhz"), after.get("gpu_mhz_most")
    if after.get("gpu_held_back"):
        reasons = ", ".join(after["gpu_held_back"])
        lines.append(f"the GPU ran at {now:.0f} of {most:.0f} MHz, held back by {reasons}")
    return lines


def _numbers(paths):
    numbers = []
    for path in paths:
        try:
            numbers.append(float(path.read_text()))
        except (OSError, ValueError):  # a sensor that is there and cannot be read
            continue
    return numbers


def _gpu():
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", "-i", "0"]
    run = subprocess.run(command, capture_output=True, text=True)
    try:
        mhz, most, celsius, reasons = run.stdout.split(",")
        held = {name for bit, name in REASONS.items() if int(reasons, 16) & bit}
        return {
            "gpu_mhz": float(mhz), "gpu_mhz_most": float(most), "gpu_celsius": float(celsius),
            "gpu_held_back": sorted(held),
        }  # fmt: skip
    except ValueError:  # no device, or a driver that does not know one of these
        return {}
