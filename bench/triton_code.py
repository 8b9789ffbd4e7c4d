"""``python -m pyllm.bench.triton_code TARGET``: compiles the Triton kernels, with no GPU.

`CASES` calls every op so that each of its kernels is launched once in each shape worth looking at;
nothing runs, and what would have been launched is compiled for a target: ``cuda:90`` and so on.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

import torch
import triton
from pyllm.kernels.launch import compile_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyllm import ops

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


def _norm(op, rows, width, dtype=torch.bfloat16, residual=False, **options):
    x = torch.empty(rows, width, dtype=dtype)
    weight = torch.empty(width, dtype=dtype)
    added = torch.empty_like(x) if residual else None
    getattr(ops, op)(x, weight, residual=added, backend="triton", **options)


def _norm_cases(op):
    return {
        "bf16 128": lambda: _norm(op, 512, 128),
        "bf16 4096": lambda: _norm(op, 32, 4096),
        "bf16 4096 residual": lambda: _norm(op, 32, 4096, residual=True),
        "bf16 4096 residual to int8": lambda: _norm(
            op, 32, 4096, residual=True, quantize=torch.int8
        ),
        "bf16 4096 to e4m3": lambda: _norm(op, 32, 4096, quantize=torch.float8_e4m3fn),
        "fp32 16384": lambda: _norm(op, 32, 16384, torch.float32),
        "fp16 65536": lambda: _norm(op, 32, 65536, torch.float16),
    }


# Op: case: what launches it.
CASES = {
    "layer_norm": _norm_cases("layer_norm"),
    "rms_norm": _norm_cases("rms_norm"),
}


def compile_cases(target: GPUTarget, ops=tuple(CASES)) -> list[dict]:
    """The kernels of every case: registers a thread, bytes spilled a thread, shared memory."""
    rows = []
    for op in ops:
        for case, run in CASES[op].items():
            with compile_only(target) as launches:
                run()
            for launch in launches:
                compiled = _compile(launch, target)
                row = {"op": op, "case": case, "kernel": launch.kernel.__name__}
                rows.append({**row, **_resources(compiled, target)})
    return rows


def _compile(launch, target):
    """As Triton does at a launch: each argument has a type, and some are constants."""
    signature, constants, attributes = {}, {}, {}
    options = dict(launch.options)
    for i, parameter in enumerate(launch.kernel.params):
        name, special = parameter.name, not parameter.do_not_specialize
        value = launch.arguments[i] if i < len(launch.arguments) else options.pop(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (whole and value == 1 and special):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        at = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(at, int) and special and at % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
        signature[name] = triton.runtime.jit.mangle_type(value)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def _resources(compiled, target):
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]

        def number(name):
            return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

        spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return {
            "registers": number("vgpr_count"),
            "spills": spilled,
            "shared": compiled.metadata.shared,
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    (file,) = [p for name, p in compiled.metadata_group.items() if name.endswith(".cubin")]
    command = [tool, "--dump-resource-usage", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", text)}
    spilled = used["STACK"] + used["LOCAL"]
    return {"registers": used["REG"], "spills": spilled, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--op", choices=CASES, action="append")
    arguments = parser.parse_args()
    rows = compile_cases(TARGETS[arguments.target], arguments.op or tuple(CASES))
    print(json.dumps(rows, indent=1))
