"""The Triton kernels as a whole: where they run, and with which configurations.

What each computes is tested beside the other backends, in the test of its op; what compilers make
of them in test_machine_code.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyllm
from pyllm.ops import device, rms_norm, silu_mul

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
    if why := device.missing("triton", "cpu"):
        pytest.skip(why)
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


@pytest.fixture
def configurations(tmp_path, monkeypatch):
    """The module, with a user's cache of its own."""
    from pyllm.kernels import configurations

    if why := device.missing("triton", "cpu"):
        pytest.skip(why)
    monkeypatch.setenv("PYLLM_CACHE", str(tmp_path))
    configurations.forget()
    yield configurations
    monkeypatch.undo()
    configurations.forget()


def test_every_kernel_has_a_line_everywhere(configurations):
    from pyllm.bench.triton_code import TARGETS

    for kernel, lines in configurations.TABLE.items():
        for target in TARGETS.values():
            for dtype in (torch.float32, torch.bfloat16):
                assert any(line.fits(target, dtype, 1 << 20, "") for line in lines), kernel
        assert all(set(line.configuration) == set(lines[0].configuration) for line in lines)
        assert set(configurations.CHOICES[kernel]) <= set(lines[0].configuration)


def test_no_line_is_in_the_shadow_of_those_before_it(configurations):
    for kernel, lines in configurations.TABLE.items():
        for i, line in enumerate(lines):
            for before in lines[:i]:
                covers = (
                    before.targets in ("*", line.targets, line.targets.partition(":")[0])
                    and before.dtype in ("*", line.dtype)
                    and before.size >= line.size
                    and before.mode in ("", line.mode)
                )
                assert not covers, f"{kernel}: {line} is never reached"


def test_the_number_of_rows_does_not_change_the_order_of_sums(configurations):
    """Of the kernels whose lines differ by rows: what decides the order is in all lines the same,
    and no file may change it for some."""
    for line in configurations.TABLE["quant_matmul"]:  # BLOCK_M and _N are rows and columns
        assert line.configuration["num_warps"] >= 4
        assert line.configuration["BLOCK_N"] >= 64
    assert "BLOCK_M" not in configurations.CHOICES["quant_matmul"]
    assert min(configurations.CHOICES["quant_matmul"]["BLOCK_N"]) >= 64
    assert min(configurations.CHOICES["quant_matmul"]["num_warps"]) >= 4
    from pyllm.bench.triton_code import TARGETS

    for target in TARGETS.values():
        for dtype in (torch.float32, torch.bfloat16):
            for size in (16, 32, 64, 128, 256):
                few, many = (
                    next(
                        line.configuration
                        for line in configurations.TABLE["paged_attention"]
                        if line.fits(target, dtype, size, mode)
                    )
                    for mode in ("16 rows", "32 rows")
                )
                rows = {"BLOCK_M": few["BLOCK_M"], "num_stages": few["num_stages"]}
                assert many | rows == few
    assert set(configurations.CHOICES["paged_attention"]) == {"num_stages"}


GOOD = {"BLOCK": 512, "num_warps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format 1; got 2"),
        (lambda d: d.pop("kernels"), "kernels: an object; got None"),
        (lambda d: d["kernels"].update(norm={}), "a kernel of activation, .*; got 'norm'"),
        (lambda d: d["kernels"].update(activation=3), "activation: an object; got 3"),
        (lambda d: d["kernels"]["activation"].update(f32={}), "a case as 'float16 64'; got 'f32'"),
        (lambda d: d["kernels"]["activation"].update({"float32 64": 3}), "a configuration; got 3"),
        (lambda d: d["chosen"].pop("BLOCK"), r"BLOCK, num_warps; got \['num_warps'\]"),
        (lambda d: d["chosen"].update(BLOCK=100), "BLOCK: one of 512, 1024, 2048; got 100"),
        (lambda d: d["chosen"].update(num_warps="4"), "num_warps: one of 1, .*; got '4'"),
    ],
)
def test_a_bad_file_is_said(change, message, configurations, tmp_path):
    chosen = dict(GOOD)
    entry = {"configuration": chosen, "us": 1.0, "table_us": 2.0, "call": "x"}
    data = {"format": 1, "kernels": {"activation": {"float32 32": entry}}}
    configurations.validate(data)
    view = {**data, "chosen": chosen}
    change(view)
    data = {name: value for name, value in view.items() if name != "chosen"}
    path = configurations.files("interpreter")[1]
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"interpreter\.json: expected .*{message}"):
        rms_norm(torch.ones(2, 8), torch.ones(8), backend="triton")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"interpreter\.json: expected JSON, got "):
        rms_norm(torch.ones(2, 8), torch.ones(8), backend="triton")


def test_tuning_keeps_what_is_faster_and_right(configurations):
    from pyllm.bench import tune

    lines = []

    def time(calls):
        for (call,) in calls.values():
            call()
        return {i: 1.0 / (i + 1) for i in calls}  # the last is the fastest

    found = tune.tune(["activation"], ["tiny"], ["float32"], device="cpu", match="silu_mul 5",
                      time=time, say=lines.append)  # fmt: skip
    ((case, entry),) = found["activation"].items()
    assert case.startswith("float32 ")
    assert entry["configuration"] != configurations.TABLE["activation"][0].configuration
    assert entry["us"] < entry["table_us"]
    assert any("the table's" in line for line in lines)
    path = configurations.files("interpreter")[1]
    configurations.write(path, "interpreter", found)
    width = int(case.split()[1])
    with configurations.recorded() as asked:
        silu_mul(torch.ones(2, width), torch.ones(2, width), backend="triton")
    assert asked["activation", case] == entry["configuration"]


def test_tuning_keeps_the_line_unless_another_is_clearly_faster(configurations, monkeypatch):
    from pyllm.bench import tune

    def found(seconds):
        found = tune.tune(["rms_norm"], ["tiny"], ["float32"], device="cpu", match="5 x",
                          time=lambda calls: {i: seconds(i) for i in calls})  # fmt: skip
        (entry,) = found["norm_forward"].values()
        return entry["configuration"]

    line = configurations.TABLE["norm_forward"][0].configuration
    assert found(lambda i: 1.0 if i == 0 else 0.98) == line
    monkeypatch.setattr(
        tune, "_wrong", lambda case, a, c: "wrong" if line not in c.values() else None
    )
    assert found(lambda i: 1.0 / (i + 1)) == line
