"""What a cubin says of its kernels: registers, shared memory, occupancy and instructions."""

import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

# What is counted: name, and a pattern of the instruction.
INSTRUCTIONS = {
    "hmma": r"HMMA\b",  # of tensor cores: halves, bytes, and those of a warp group
    "imma": r"IMMA\b",
    "gmma": r"[HIQ]GMMA\b",
    "utcmma": r"UTC\w*MMA\b",  # tcgen05
    "ldg_128": r"LDG\b\S*\.128\b",
    "ldg_narrow": r"LDG\b(?!\S*\.128)",
    "stg_128": r"STG\b\S*\.128\b",
    "stg_narrow": r"STG\b(?!\S*\.128)",
    "ldgsts": r"LDGSTS\b",  # cp.async
    "bulk": r"(?:UBLKCP|UTMALDG|UTMASTG)\b",  # bulk and tensor copies
    "ldsm": r"LDSM\b",  # ldmatrix
    "local": r"(?:LDL|STL)\b",
}
# As in "/*0010*/  @!P0 LDG.E.128 R4, [R2.64] ;".
_OPCODE = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def missing() -> str | None:
    """Why cubins cannot be read here, or None if they can."""
    lacking = [name for name in ("cuobjdump", "nvdisasm") if not _tool(name)]
    return f"there is no {' and no '.join(lacking)}; triton brings both" if lacking else None


def _tool(name) -> Path | None:
    """From the path, beside nvcc, or from the wheels of triton or NVIDIA."""
    found = shutil.which(name)
    beside = Path(os.path.realpath(shutil.which("nvcc") or "nvcc")).with_name(name)
    wheels = Path(sysconfig.get_path("purelib"))
    patterns = (f"triton/backends/nvidia/bin/{name}", f"nvidia/*/bin/{name}")
    wheel = next((p for pattern in patterns for p in wheels.glob(pattern)), None)
    return Path(found) if found else beside if beside.exists() else wheel


def _run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(cubin) -> dict[str, dict]:
    """Of each kernel, by its mangled name: ``registers``; ``shared``, bytes that it declares;
    ``threads``, the most that a block may have, and the ``blocks`` of that size that fit a
    multiprocessor; ``stack``, bytes of local memory; how many instructions of each kind, where
    there are any. Shared memory that only the launch asks for is in none of these.
    """
    threads = max_threads(Path(cubin).read_bytes())
    sections = re.split(r"^\.text\.(\w+):\n", _run(_tool("nvdisasm"), "-c", cubin), flags=re.M)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    kernels = {}
    for name, *numbers in _RESOURCES.findall(_run(_tool("cuobjdump"), "-res-usage", cubin)):
        if name not in code:  # a function that is no kernel
            continue
        registers, stack, shared = map(int, numbers)
        a_block = threads.get(name, 1024)
        kernels[name] = {
            "registers": registers, "shared": shared, "threads": a_block,
            "blocks": blocks(registers, a_block, shared), "stack": stack, **count(code[name]),
        }  # fmt: skip
    return kernels


def blocks(registers, threads, shared, room=164 << 10) -> int:
    """How many blocks fit a multiprocessor of sm_80 or sm_90: 64 Ki registers, given to warps by
    256; 64 warps; 32 blocks; `room`, by default the smaller of the two, in shared memory, of which
    each block takes 1 KiB more than it asks for."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, 64 // warps, 32, room // (shared + 1024))


def count(code: str) -> dict[str, int]:
    """How many instructions of each kind there are in a disassembly; only kinds that are."""
    opcodes = Counter(_OPCODE.findall(code))
    found = {
        name: sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
        for name, pattern in INSTRUCTIONS.items()
    }
    return {name: n for name, n in found.items() if n}


def max_threads(elf: bytes) -> dict[str, int]:
    """Each kernel's ``__launch_bounds__``, which the section ``.nv.info.<kernel>`` keeps."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, number, names = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(number)]
    text = sections[names][4]
    found = {}
    for name_at, _, _, _, at, length in sections:
        name = elf[text + name_at : elf.index(b"\0", text + name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        end = at + length
        while at < end:  # format, attribute, then the value's size, or the value
            kind, attribute, value = struct.unpack_from("<BBH", elf, at)
            at += 4
            if kind != 4:
                continue
            if attribute in (0x05, 0x10):  # EIATTR_MAX_THREADS, EIATTR_REQNTID
                x, y, z = struct.unpack_from("<III", elf, at)
                found[name.removeprefix(".nv.info.")] = x * y * z
            at += value
    return found


def demangled(names) -> dict[str, str]:
    """``norm_kernel<f16, float, true, false, 4>`` of each mangled name."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    plain = _run(tool, *names).splitlines() if tool and names else names
    short = {}
    for mangled, name in zip(names, plain, strict=True):
        name = re.sub(r"pyllm::(cuda::)?|\(anonymous namespace\)::", "", name)
        short[mangled] = re.sub(r"^void |\([A-Z].*\)$", "", name)
    return short
