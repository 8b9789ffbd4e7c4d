"""The baseline path compiles for another architecture and computes the same there.

It needs a cross compiler and, to run, a user-mode emulator (on Debian and Ubuntu:
``apt-get install g++-aarch64-linux-gnu qemu-user``).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER} on the path")
needs_emulator = pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"no {EMULATOR} on the path")


def compile_for_aarch64(*arguments):
    command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", "-DPYLLM_ISA=baseline", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def sources():
    return sorted([*ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])


@needs_compiler
@pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)
def test_compiles_for_aarch64(source):
    compile_for_aarch64("-fsyntax-only", source)


@pytest.mark.slow
@needs_compiler
@needs_emulator
def test_computes_the_same_on_aarch64(tmp_path):
    program = tmp_path / "portable"
    compile_for_aarch64("-static", "-o", program, ROOT / "tests/portable.cpp", *sources())
    result = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "ok\n"
