"""Runs a CUDA file on the CPU: finds races and bad accesses, and counts the traffic.

::

    program = emulator.compile("saxpy.cu")
    launch = program.launch("saxpy", grid=4, block=256, args=[1000, 2.0, x, y], seed=1)
    print(launch.table())

How it works, and what it finds: ``csrc/emulator/README.md``.
"""

import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyllm import _C

# How kernels are compiled for it; the same as in CMakeLists.txt.
FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-x", "c++"),
    *("-fsanitize=thread", "--param=tsan-distinguish-volatile=1"),
    *("-fno-threadsafe-statics", "-fno-thread-jumps", "-Wno-unknown-pragmas"),
    "-Werror=frame-larger-than=98304",  # a lane's stack has 128 KiB
]
_LIBRARY = Path(_C.__file__).with_name("libpyllm_emulator.so")
_NUMBERS = {
    "f4": ctypes.c_float, "f8": ctypes.c_double, "i1": ctypes.c_int8, "u1": ctypes.c_uint8,
    "i2": ctypes.c_int16, "u2": ctypes.c_uint16, "i4": ctypes.c_int32, "u4": ctypes.c_uint32,
    "i8": ctypes.c_int64, "u8": ctypes.c_uint64, "p8": ctypes.c_void_p,
}  # fmt: skip


class EmulatorError(RuntimeError):
    """What a kernel did wrong; the message has source line, block, warp, lane and thread."""


@dataclass
class Kernel:
    """A kernel as it can be launched: its parameters' names and kinds (``p8``, ``f4``, ``i4``)."""

    name: str
    parameters: list[str]
    kinds: list[str]
    entry: object


@dataclass
class Launch:
    """What a launch did.

    `traffic` has, for each buffer, the bytes that lanes asked for and the sectors of 32 bytes that
    moved; for each place in the source, requests by warps and transactions (sectors of global
    memory, wavefronts of shared memory) against how few would do; and instructions by kind.
    """

    traffic: dict

    def lines(self) -> list[dict]:
        """The traffic by source line, in order; each with ``source`` and ``ratio``."""
        sites = self.traffic["sites"]
        places = source_lines(self.traffic["library"], [site["pc"] for site in sites])
        found = {}
        for site, place in zip(sites, places, strict=True):
            key = (place, site["space"], site["write"])
            line = found.setdefault(
                key, {"source": place, "space": site["space"], "write": site["write"],
                      "requests": 0, "bytes": 0, "transactions": 0, "ideal": 0},
            )  # fmt: skip
            for name in ("requests", "bytes", "transactions", "ideal"):
                line[name] += site[name]
        for line in found.values():
            line["ratio"] = line["transactions"] / max(line["ideal"], 1)
        return sorted(found.values(), key=lambda line: _place_key(line["source"]))

    def table(self) -> str:
        """The traffic as text."""
        t = self.traffic
        grid, block = ("x".join(map(str, t[name])) for name in ("grid", "block"))
        rows = [f"{t['kernel']}: grid {grid}, block {block}, {t['shared_bytes']} bytes shared"]
        rows.append(
            f"  {'buffer':24} {'read':>12} {'written':>12} {'sectors x 32':>13} {'size':>12}"
        )
        for name, b in t["buffers"].items():
            sectors = 32 * (b["read_sectors"] + b["written_sectors"])
            rows.append(
                f"  {name:24} {b['read']:12} {b['written']:12} {sectors:13} {b['bytes']:12}"
            )
        rows.append(f"  {'line':24} {'':12} {'requests':>12} {'transactions':>13} {'x ideal':>12}")
        for line in self.lines():
            what = f"{line['space']} {'write' if line['write'] else 'read'}"
            rows.append(
                f"  {line['source']:24} {what:12} {line['requests']:12} "
                f"{line['transactions']:13} {line['ratio']:12.2f}"
            )
        counts = ", ".join(f"{name} {n}" for name, n in t["instructions"].items())
        return "\n".join([*rows, f"  warp instructions: {counts or 'none counted'}"])


class Program:
    """A compiled file: its `kernels` by name, and the `launches` that were run."""

    def __init__(self, library: Path, parameters: dict[str, list[str]], folder):
        self._folder = folder  # goes when the program goes
        self.seed = 1
        self.launches: list[Launch] = []
        self._emulator = ctypes.CDLL(str(_LIBRARY))
        self._emulator.emulator_report.restype = ctypes.c_char_p
        entries = ctypes.CDLL(str(library)).emulator_entries
        entries.restype = ctypes.POINTER(_Entry)
        self.kernels = {}
        for entry in entries():
            if not entry.name:
                break
            name, kinds = entry.name.decode(), entry.signature.decode().split()
            names = parameters.get(name) or [f"argument {i}" for i in range(len(kinds))]
            self.kernels[name] = Kernel(name, names, kinds, entry.launch)

    def launch(self, name, *, grid, block, args, shared_bytes=0, seed=None, threads=1) -> Launch:
        """Runs a kernel to its end.

        Args:
            name: of the kernel, as in `kernels`.
            grid, block: an int or up to three.
            args: a tensor (or anything with ``data_ptr`` and ``nbytes``) for a pointer, which may
                touch that tensor's memory; or a number.
            shared_bytes: of dynamic shared memory.
            seed: of the order in which lanes run; by default `self.seed`.
            threads: of the host.

        Raises:
            EmulatorError: what the kernel did wrong.
        """
        kernel = self.kernels[name]
        if len(args) != len(kernel.kinds):
            raise TypeError(f"{name}: expected {len(kernel.kinds)} arguments, got {len(args)}")
        dims = (ctypes.c_uint * 6)(*_three(grid), *_three(block))
        values = []
        self._emulator.emulator_configure(
            ctypes.c_uint64(self.seed if seed is None else seed), threads
        )
        self._emulator.emulator_unregister_all()
        for parameter, kind, value in zip(kernel.parameters, kernel.kinds, args, strict=True):
            if kind not in _NUMBERS:
                raise TypeError(f"{name}: {parameter} is a structure; pass its members one by one")
            if hasattr(value, "data_ptr"):
                self._emulator.emulator_register(
                    ctypes.c_void_p(value.data_ptr()), ctypes.c_size_t(value.nbytes),
                    parameter.encode(),
                )  # fmt: skip
                value = value.data_ptr()
            values.append(_NUMBERS[kind](value))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._emulator.emulator_report()
        error = kernel.entry(dims, shared_bytes, pointers)
        self._emulator.emulator_unregister_all()
        if error:
            raise EmulatorError(error.decode())
        launch = Launch(json.loads(self._emulator.emulator_report())[-1])
        self.launches.append(launch)
        return launch


class _Entry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("signature", ctypes.c_char_p),
        (
            "launch",
            ctypes.CFUNCTYPE(
                ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_void_p
            ),
        ),
    ]


def compile(source, *, kernels=None, flags=()) -> Program:
    """Compiles a ``.cu`` file for the emulator, with the C++ compiler ``$CXX`` or ``c++``.

    Args:
        source: the file. ``cuda/primitives.cuh`` and the other headers of pyllm can be included.
        kernels: their names, with template arguments where they have them: ``["scale<float>"]``.
            By default every ``__global__`` function that is no template.
        flags: more for the compiler, ``["-DBLOCK=64"]``.

    Raises:
        RuntimeError: if there is no compiler, or with what it said.
    """
    source = Path(source)
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise RuntimeError("no C++ compiler was found; install one or set CXX")
    if not _LIBRARY.exists():
        raise RuntimeError(f"this build has no emulator: there is no {_LIBRARY}")
    text = source.read_text()
    found = _find_kernels(text)
    names = list(found) if kernels is None else list(kernels)
    if not names:
        raise RuntimeError(f"{source}: found no __global__ function that is no template")
    folder = tempfile.TemporaryDirectory(prefix="pyllm-emulator-")
    generated = Path(folder.name, source.stem + ".cu")  # what some of its lines are reported as
    entries = " ".join(f"EMULATE_KERNEL({name})" for name in names)
    generated.write_text(
        f'#line 1 "{source.resolve()}"\n{_without_extern_shared(text)}\n'
        f'#include "cuda/emulate.cuh"\nEMULATE_BEGIN {entries} EMULATE_END\n'
    )
    library = generated.with_suffix(".so")
    headers = _headers()
    compiled = str(library.with_suffix(".o"))
    include = [f"-I{headers}", f"-I{source.resolve().parent}"]
    prefix = ["-include", f"{headers}/emulator/cuda.h"]
    rpath = f"-Wl,-rpath,{_LIBRARY.parent}"
    # Linked without -fsanitize: the emulator, not the sanitizer, answers to the compiler's hooks.
    for step in (
        [
            compiler,
            *FLAGS,
            *flags,
            *include,
            *prefix,
            "-xc++",
            "-c",
            str(generated),
            "-o",
            compiled,
        ],
        [compiler, "-shared", "-o", str(library), compiled, str(_LIBRARY), rpath],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{done.stderr.strip()}\nfailed: {' '.join(step)}")
    return Program(library, found, folder)


def run(source, harness=None, *, seeds=3, flags=()) -> Program:
    """Compiles a ``.cu`` file and runs it as a harness says, under several orders of lanes.

    Args:
        source: the file.
        harness: a Python file with ``run(program)``, which launches kernels and checks what they
            wrote, and optionally ``KERNELS``, the `kernels` of `compile`. By default the ``.py``
            file of the same name.
        seeds: how many orders.
        flags: more for the compiler.

    Returns:
        The program, with the launches of the first order.

    Raises:
        EmulatorError: what a kernel did wrong.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    harness = Path(harness or Path(source).with_suffix(".py"))
    space = runpy.run_path(str(harness))
    if not callable(space.get("run")):
        raise ValueError(f"{harness}: expected a function run(program)")
    program = compile(source, kernels=space.get("KERNELS"), flags=flags)
    for program.seed in range(1, seeds + 1):
        space["run"](program)
        if program.seed == 1:
            first = list(program.launches)
    program.launches = first
    return program


def source_lines(library: str, addresses: list[int]) -> list[str]:
    """``file.cu:12`` of return addresses in a library, by addr2line; else the address."""
    if not addresses:
        return []
    command = ["addr2line", "-a", "-i", "-s", "-e", library, *(hex(a - 1) for a in addresses)]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [hex(a) for a in addresses]
    places = []
    for block in re.split(r"^0x[0-9a-f]+\n", out, flags=re.MULTILINE)[1:]:
        frames = [line.split(" ")[0] for line in block.splitlines()]
        frames = [f for f in frames if not f.startswith(("?", "cuda.h:", "ptx_"))]
        places.append(frames[0] if frames else "?")
    return places


def _place_key(source: str):
    name, _, line = source.rpartition(":")
    return (name, int(line) if line.isdigit() else 0)


def _three(size):
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (*sizes, *(1,) * (3 - len(sizes)))


def _headers() -> Path:
    """The folder of the headers: of the installed package, or of the repository."""
    installed = Path(__file__).with_name("csrc")
    return installed if installed.exists() else Path(__file__).parents[1] / "csrc"


_KERNEL = re.compile(
    r"(?P<template>\btemplate\s*<[^;{}]*>\s*)?__global__\s+"
    r"(?:static\s+|__launch_bounds__\s*\([^)]*\)\s*)*void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)"
)


def _find_kernels(text: str) -> dict[str, list[str]]:
    """The names of the parameters of each kernel that is no template."""
    found = {}
    for match in _KERNEL.finditer(text):
        if not match["template"]:
            names = (re.findall(r"\w+", p) for p in match["parameters"].split(","))
            found[match["name"]] = [n[-1] for n in names if n]
    return found


def _without_extern_shared(text: str) -> str:
    """``extern __shared__ T name[];`` as what the emulator has instead, in the same line."""
    pattern = (
        r"extern\s+__shared__\s+((?:__align__|alignas)\s*\([^)]*\)\s*)?"
        r"([\w:<> ]+?)\s+(\w+)\s*\[\s*\]\s*;"
    )
    return re.sub(pattern, r"\2* const \3 = static_cast<\2*>(::emu::dynamic_shared());", text)
