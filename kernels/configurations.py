"""Which configuration every kernel is launched with: tile sizes, warps, stages of copies.

In this order: what was measured on the device and is kept as JSON in the user's cache, or shipped
in ``tuned/`` beside this file; else the first line of `TABLE` that fits. Nothing is measured while
a model is served: ``python -m bench tune`` does it, and writes the file (format: `validate`).

A configuration decides the order of sums, so it hangs on the target, the dtype, the size of a row
and the options of a call, never on the number of rows. Where the number of rows has a line of its
own (`quant_matmul`, `paged_attention`), lines differ only in what leaves the order as it is.
"""

import functools
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from pyllm.kernels import launch


class Line(NamedTuple):
    """A line of `TABLE`. All of it is predicted; what was measured lies in the device's file.

    Attributes:
        targets: ``"cuda"``, ``"hip"``, ``"cuda:90-119"`` (compute capabilities) or ``"*"``.
        configuration: keywords of the launch; warps are of 32 lanes on CUDA, of 64 on gfx942.
        dtype: ``"halves"``, ``"float32"`` or ``"*"``.
        size: the largest that it is for: head dim, width of a row, rows of a tile.
        mode: a word of the call's mode that it is for; ``""`` for any.
    """

    targets: str
    configuration: dict
    dtype: str = "*"
    size: int = 1 << 30
    mode: str = ""

    def fits(self, target, dtype, size, mode):
        kind, _, archs = self.targets.partition(":")
        if archs:
            low, high = map(int, archs.split("-"))
            if target.backend != kind or not low <= target.arch <= high:
                return False
        elif kind not in ("*", target.backend):
            return False
        floats = "float32" if dtype == torch.float32 else "halves"
        return (
            self.dtype in ("*", floats)
            and size <= self.size
            and (not self.mode or self.mode in mode.split(", "))
        )


def _attention(rows, keys, warps, stages):
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def _pointwise(**sizes):
    """16 bytes a thread and access; 128 threads a program."""
    return (Line("cuda", {**sizes, "num_warps": 4}), Line("hip", {**sizes, "num_warps": 2}))


# By kernel; the first line that fits counts.
TABLE = {
    "activation": _pointwise(BLOCK=1024),
    "activation_backward": _pointwise(BLOCK=1024),
    "embedding": _pointwise(BLOCK=1024),
    "rope_cache": _pointwise(HEADS=8),
    # TILE: elements that a program takes at least, of several rows if these are short. More than 32
    # elements a thread spill (64 of them in float32, and with what goes beside in backward).
    "norm_forward": (
        Line("cuda", {"TILE": 1024, "num_warps": 4}, size=4096),
        Line("cuda", {"TILE": 1024, "num_warps": 8}, size=8192),
        Line("cuda", {"TILE": 1024, "num_warps": 16}),
        Line("hip", {"TILE": 1024, "num_warps": 2}, size=4096),
        Line("hip", {"TILE": 1024, "num_warps": 4}, size=8192),
        Line("hip", {"TILE": 1024, "num_warps": 8}),
    ),
    "norm_backward": (
        Line("cuda", {"TILE": 1024, "num_warps": 8}, size=4096),
        Line("cuda", {"TILE": 1024, "num_warps": 16}),
        Line("hip", {"TILE": 1024, "num_warps": 4}, size=4096),
        Line("hip", {"TILE": 1024, "num_warps": 8}),
    ),
    "norm_backward_columns": _pointwise(ROWS=8, BLOCK=256),
    "norm_backward_sum": _pointwise(BLOCK=32),
    # CHUNK: logits of a program where many share a row; sample_row has a program a row.
    "sample": _pointwise(CHUNK=2048),
    "sample_row": (
        Line("cuda", {"BLOCK": 4096, "num_warps": 16}),
        Line("hip", {"BLOCK": 4096, "num_warps": 8}),
    ),
    # Tiles of 64 queries and more read a key once for all of them; D = 256 has room for less, and a
    # window, a bias or slopes take registers of their own: 16 keys a step there, which is twice the
    # steps of 32, each with its sums over a row: 80 % of the speed.
    "flash_attention": (
        Line("*", _attention(32, 32, 8, 1), "float32", 128, "bias"),
        Line("*", _attention(64, 32, 8, 2), "float32", 64),
        Line("*", _attention(32, 32, 8, 1), "float32", 128),
        Line("*", _attention(16, 16, 4, 1), "float32"),
        Line("cuda:90-119", _attention(128, 64, 8, 3), size=64, mode="window"),
        Line("cuda:90-119", _attention(128, 64, 8, 3), size=64, mode="bias"),
        Line("cuda:90-119", _attention(128, 64, 8, 3), size=64, mode="alibi"),
        Line("cuda:90-119", _attention(128, 64, 4, 3), size=64),
        Line("cuda:90-119", _attention(128, 64, 8, 3), size=128),
        Line("cuda:90-99", _attention(64, 16, 8, 2), mode="window"),
        Line("cuda:90-99", _attention(64, 16, 8, 2), mode="bias"),
        Line("cuda:90-99", _attention(64, 16, 8, 2), mode="alibi"),
        Line("cuda:90-99", _attention(64, 32, 8, 2), mode="softcap"),
        Line("cuda:90-99", _attention(64, 32, 8, 3)),
        Line("cuda:90-119", _attention(64, 64, 8, 2)),
        Line("cuda", _attention(64, 64, 4, 2), size=64),
        Line("cuda", _attention(64, 32, 4, 2), size=128, mode="window"),
        Line("cuda", _attention(64, 32, 4, 2), size=128, mode="bias"),
        Line("cuda", _attention(64, 64, 4, 2), size=128),
        Line("cuda", _attention(64, 32, 8, 2)),
        Line("hip", _attention(64, 64, 4, 2), size=128),
        Line("hip", _attention(64, 32, 4, 2)),
    ),
    # Four waves on AMD: eight would have half of the registers each.
    "flash_attention_backward_q": (
        Line("cuda", _attention(16, 32, 4, 1), "float32", 64),
        Line("cuda", _attention(16, 32, 8, 1), "float32"),
        Line("hip", _attention(32, 32, 4, 1), "float32", 128),
        Line("hip", _attention(16, 32, 4, 1), "float32"),
        Line("hip", _attention(64, 32, 4, 1)),
        Line("cuda:80-89", _attention(64, 32, 4, 2), size=64),
        Line("cuda", _attention(64, 64, 8, 2), size=128),
        Line("cuda", _attention(32, 32, 8, 1)),
    ),
    "flash_attention_backward_kv": (
        Line("cuda", _attention(32, 32, 8, 1), "float32", 128),
        Line("cuda", _attention(16, 32, 8, 1), "float32"),
        Line("hip", _attention(32, 32, 4, 1), "float32", 128),
        Line("hip", _attention(16, 32, 4, 1), "float32"),
        Line("hip", _attention(64, 64, 4, 1), size=128),
        Line("hip", _attention(32, 32, 4, 1)),
        Line("cuda:100-119", _attention(64, 64, 8, 1), size=128),
        Line("cuda", _attention(64, 32, 8, 2), size=128, mode="softcap"),
        Line("cuda", _attention(64, 64, 8, 2), size=128),
        Line("cuda", _attention(32, 32, 8, 1)),
    ),
    # A tile of few rows and one of many have as many warps, which share the keys of a block and the
    # head dim, not the rows: so a row's sums are added in one order. Two warps from D = 128 on have
    # room for 16 rows: a prompt reads its keys twice as often from L2 as with 32.
    "paged_attention": (
        Line("hip", _attention(16, 16, 1, 4), mode="16 rows"),
        Line("hip", _attention(32, 16, 1, 4), size=128),
        Line("hip", _attention(16, 16, 1, 4)),
        Line("cuda", _attention(16, 16, 2, 4), size=64, mode="16 rows"),
        Line("cuda", _attention(32, 16, 2, 4), "halves", size=64),
        Line("cuda", _attention(16, 16, 2, 4), size=128),
        Line("cuda", _attention(16, 16, 4, 4)),
    ),
    # By rows of x: these widen the tile, and leave k's order as it is. At least four warps and 64
    # columns: less would be computed by other instructions (wgmma takes 64).
    "quant_matmul": (
        Line("*", _attention(16, 64, 4, 4), size=16),
        Line("*", _attention(32, 64, 4, 4), size=32),
        Line("*", _attention(64, 64, 4, 4), size=64),
        Line("*", _attention(128, 128, 8, 3)),
    ),
}

# What `python -m bench tune` tries beside the line of the table, and all that a file may say.
_FLASH = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8)}
_FLASH["num_stages"] = (1, 2, 3, 4)
_WARPS = {"num_warps": (1, 2, 4, 8, 16)}
CHOICES = {
    "activation": {"BLOCK": (512, 1024, 2048), **_WARPS},
    "activation_backward": {"BLOCK": (512, 1024, 2048), **_WARPS},
    "embedding": {"BLOCK": (512, 1024, 2048), **_WARPS},
    "rope_cache": {"HEADS": (1, 2, 4, 8), **_WARPS},
    "norm_forward": {"TILE": (512, 1024, 2048), **_WARPS},
    "norm_backward": {"TILE": (512, 1024, 2048), **_WARPS},
    "norm_backward_columns": {"ROWS": (4, 8, 16), "BLOCK": (128, 256), **_WARPS},
    "norm_backward_sum": {"BLOCK": (16, 32, 64), **_WARPS},
    "sample": {"CHUNK": (1024, 2048, 4096), **_WARPS},
    "sample_row": {"BLOCK": (2048, 4096, 8192), **_WARPS},
    "flash_attention": _FLASH,
    "flash_attention_backward_q": _FLASH,
    "flash_attention_backward_kv": _FLASH,
    "paged_attention": {"num_stages": (2, 3, 4, 5, 6)},
    "quant_matmul": {"BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5, 6)},
}
FORMAT = 1

_overrides = {}  # (kernel, case): configuration, while one is being tried
_asked = None  # (kernel, case): configuration, while calls are being recorded


def configuration(kernel: str, device, dtype: torch.dtype, size: int, mode: str = "") -> dict:
    """The keywords of a launch of `kernel`; see `Line` for what `size` and `mode` are of."""
    size = triton.next_power_of_2(size)
    case = f"{str(dtype).removeprefix('torch.')} {size}{', ' * bool(mode)}{mode}"
    key = None if launch.compiling() else _device_name(device.index)
    found = _choose(kernel, launch.target_of(device), key, dtype, size, mode, case)
    if _asked is not None:
        _asked[kernel, case] = found
    return _overrides.get((kernel, case), found) if _overrides else found


@functools.lru_cache(4096)
def _choose(kernel, target, device_name, dtype, size, mode, case):
    measured = _measured(device_name).get(kernel, {}) if device_name else {}
    if case in measured:
        return measured[case]["configuration"]
    return next(
        line.configuration for line in TABLE[kernel] if line.fits(target, dtype, size, mode)
    )


@contextmanager
def recorded():
    """Within the block: ``{(kernel, case): configuration}`` of what is asked for."""
    global _asked
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None


@contextmanager
def tried(choices: dict):
    """Within the block, ``{(kernel, case): configuration}`` are taken before all others."""
    _overrides.update(choices)
    try:
        yield
    finally:
        _overrides.clear()


def forget():
    """Has the files read again."""
    _choose.cache_clear()
    _measured.cache_clear()


@functools.cache
def _device_name(index):
    return "interpreter" if launch.INTERPRETED else torch.cuda.get_device_name(index)


def files(device_name: str) -> tuple[Path, Path]:
    """Where configurations for a device are: those shipped, and the user's own, which count
    before them."""
    cache = os.environ.get("PYLLM_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pyllm"
    )
    name = re.sub(r"\W+", "-", device_name) + ".json"
    return Path(__file__).parent / "tuned" / name, Path(cache, "tuned", name)


@functools.cache
def _measured(device_name):
    merged = {}
    for path in files(device_name):
        if path.exists():
            for kernel, cases in read(path)["kernels"].items():
                merged.setdefault(kernel, {}).update(cases)
    return merged


def read(path: Path) -> dict:
    """The content of a file, checked; raises ValueError that says what is wrong in which."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    try:
        validate(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data


def validate(data) -> None:
    """Raises ValueError unless `data` is what a file of configurations holds::

        {"format": 1, "device": "NVIDIA H100 80GB HBM3", "triton": "3.9.0",
         "kernels": {"flash_attention": {"bfloat16 128, window":
             {"configuration": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
              "us": 512.3, "table_us": 530.1, "call": "llama3-8b, 4096 tokens"}}}}

    A case is a dtype, a size rounded up to a power of two, and a mode. ``us`` is the time of the
    configuration, ``table_us`` that of the table's line, ``call`` what was timed.
    """
    _expect(isinstance(data, dict), "an object", data)
    _expect(data.get("format") == FORMAT, f"format {FORMAT}", data.get("format"))
    kernels = data.get("kernels")
    _expect(isinstance(kernels, dict), "kernels: an object", kernels)
    for kernel, cases in kernels.items():
        _expect(kernel in TABLE, f"a kernel of {', '.join(TABLE)}", kernel)
        _expect(isinstance(cases, dict), f"{kernel}: an object", cases)
        for case, entry in cases.items():
            at = f"{kernel}: {case}: "
            _expect(
                re.fullmatch(r"\w+ \d+(, .+)?", case), f"{kernel}: a case as 'float16 64'", case
            )
            chosen = entry.get("configuration") if isinstance(entry, dict) else entry
            _expect(isinstance(chosen, dict), f"{at}a configuration", entry)
            names = set(TABLE[kernel][0].configuration)
            _expect(set(chosen) == names, f"{at}{', '.join(sorted(names))}", sorted(chosen))
            for name, value in chosen.items():
                known = {line.configuration[name] for line in TABLE[kernel]}
                known = sorted(known | set(CHOICES[kernel].get(name, ())))
                whole = type(value) is int and value in known
                _expect(whole, f"{at}{name}: one of {', '.join(map(str, known))}", value)


def _expect(holds, expected, got):
    if not holds:
        raise ValueError(f"expected {expected}; got {got!r}")


def write(path: Path, device_name: str, kernels: dict) -> None:
    """Adds measured cases to a file, or begins it."""
    old = read(path)["kernels"] if path.exists() else {}
    for kernel, cases in kernels.items():
        old.setdefault(kernel, {}).update(cases)
    data = {"format": FORMAT, "device": device_name, "triton": triton.__version__, "kernels": old}
    validate(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)
    forget()
