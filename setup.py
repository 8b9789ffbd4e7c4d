"""Builds the native part by calling CMake; everything declarative is in pyproject.toml."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Options of the build that environment variables of the same names set; see CMakeLists.txt.
CMAKE_VARIABLES = ("PYLLM_EMULATOR", "PYLLM_CUDA", "PYLLM_CUDA_ARCHS")


def works(tool, minimum=(0, 0)):
    """Whether `tool` is on the path, runs, and is recent enough. One that pip installed in another
    environment is on the path of an isolated build, yet does not run there."""
    try:
        version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    found = re.search(r"(\d+)\.(\d+)", version.stdout)
    return found is not None and tuple(map(int, found.groups())) >= minimum


def missing_tools():
    """What pip has to install for the build because the system does not have it."""
    tools = [] if works("cmake", (3, 18)) else ["cmake>=3.18"]
    return tools if works("ninja") or works("make") else [*tools, "ninja"]


def run(command):
    if subprocess.run(command).returncode:
        # No traceback: what the compiler said should be the last thing on the screen.
        raise SystemExit(f"failed: {shlex.join(command)}")


class CMakeBuild(build_ext):
    def run(self):
        # Who only installs does not wait for the CUDA kernels on the emulator, which tests run.
        self.for_development = self.inplace or self.editable_mode
        super().run()

    def build_extension(self, ext):
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        # The objects are worth keeping; the cache is not: it names tools of the isolated
        # environment of an earlier build, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        generator = "Ninja" if works("ninja") else "Unix Makefiles"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", generator),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPYLLM_EMULATED_KERNELS={'ON' if self.for_development else 'OFF'}",
            *(f"-D{v}={os.environ[v]}" for v in CMAKE_VARIABLES if v in os.environ),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run(configure)
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        run(["cmake", "--build", str(build), "--parallel", str(jobs)])

    def copy_extensions_to_source(self):
        """In place and editable builds: the libraries with the CUDA kernels lie beside _C."""
        super().copy_extensions_to_source()
        for library in Path(self.build_lib, "pyllm").glob("libpyllm_*.so"):
            self.copy_file(str(library), str(ROOT / "pyllm" / library.name))


setup(
    # kernels/ and bench/ are at the top level of the repository, and in pyllm once installed.
    # kernels/ has no __init__.py, so that it never shadows another package of that name.
    # The headers of csrc/ are what `pyllm emulate` compiles a kernel with.
    packages=[
        *find_packages(include=["pyllm*"]),
        "pyllm.kernels",
        "pyllm.bench",
        "pyllm.bench.commands",
        "pyllm.csrc",
    ],
    package_dir={"pyllm.kernels": "kernels", "pyllm.bench": "bench", "pyllm.csrc": "csrc"},
    package_data={
        "pyllm.kernels": ["README.md", "tuned/*.json"],
        "pyllm.bench": ["alice.txt", "instructions.json", "machine_code.json", "traffic.json"],
        "pyllm.csrc": ["core/*.h", "cuda/*.h", "cuda/*.cuh", "cuda/*.def", "emulator/*.h"],
    },
    ext_modules=[Extension("pyllm._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
