"""The Triton kernels as a whole: where they run, what they are compiled to, configurations.

What each computes is tested beside the other backends, in the test of its op.
"""

import importlib.util
import json
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
# Each takes a minute.
TARGETS = [
    "cuda:90",
    pytest.param("hip:gfx942", marks=pytest.mark.slow),
    *(pytest.param(target, marks=pytest.mark.long) for target in ("cuda:80", "cuda:100")),
]
# The KB of shared memory that a block may have.
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}

# The most bytes a thread that a kernel of an op spills; of those that are not named, none.
SPILLS = {
    "cuda": {"flash_attention": 232, "flash_attention_backward": 96, "paged_attention": 496},
    "hip": {
        "flash_attention": 152,
        "flash_attention_backward": 3668,
        "paged_attention": 200,
        "quant_matmul": 100,
    },
}


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


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_spills_no_more_than_is_known(target):
    rows = json.loads(python("-m", "pyllm.bench.triton_code", target))
    assert rows
    may_spill = SPILLS[target.partition(":")[0]]
    assert not [row for row in rows if row["spills"] > may_spill.get(row["op"], 0)]
    assert all(row["shared"] <= SHARED[target] * 1024 for row in rows)


def test_every_kernel_is_compiled():
    from pyllm.bench.triton_code import CASES

    from pyllm.ops.registry import OPS

    assert set(CASES) == {name for name, op in OPS.items() if "triton" in op.backends}
