#!/usr/bin/env bash
# Builds, tests and measures pyllm on a machine with a GPU, without a network, in a few minutes:
#   bench/on_gpu.sh --minutes 8 --out results    (--help: more)
# With --dry-run on one without: the kernels run on the emulator and in Triton's interpreter.
# Needs PyTorch, Triton, pybind11, CMake, pytest, typer, rich, and nvcc for the CUDA kernels.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && exec "${PYTHON:-python3}" -m bench.on_gpu "$@"
