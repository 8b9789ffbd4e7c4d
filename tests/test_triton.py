"""The Triton kernels as a whole: where they run, and with which configurations.

What each computes is tested beside the other backends, in the test of its op; what compilers make
of them in test_machine_code.py.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyllm
from pyllm.ops import device

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def python(*arguments, **variables):
    """What an interpreter prints that has Triton's interpreter only if `variables` say so."""
    env = {**os.environ, "PYTHONPATH": str(Path(pyllm.__file__).parents[1]), **variables}
    if "TRITON_INTERPRET" not in variables:
        env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


CALL = """
import os, sys, torch
from pyllm.ops import rms_norm
from pyllm.ops.registry import BackendError
assert "triton" not in sys.modules
try:
    print(rms_norm(torch.ones(2, 8), torch.ones(8), backend="triton").shape)
except BackendError as error:
    print(error)
"""


def test_on_the_cpu_it_needs_the_interpreter():
    assert "set TRITON_INTERPRET=1 before triton is imported" in python("-c", CALL)
    assert "torch.Size([2, 8])" in python("-c", CALL, TRITON_INTERPRET="1")
    # The variable alone does not make an imported triton an interpreter.
    late = f"import triton{CALL.replace('assert', 'os.environ.update(TRITON_INTERPRET=str(1)) #')}"
    assert "set TRITON_INTERPRET=1 before triton is imported" in python("-c", late)


def test_says_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(device, "_installed", lambda name: None)
    assert "Triton is not installed" in device.missing("triton", "cuda")


def test_every_kernel_is_compiled():
    from pyllm.bench.triton_code import CASES

    from pyllm.ops.registry import OPS

    assert set(CASES) == {name for name, op in OPS.items() if "triton" in op.backends}
