"""``python -m pyllm.bench.triton_code TARGET``: compiles the Triton kernels, with no GPU.

`CASES` calls every op so that each of its kernels is launched once in each shape worth looking at;
nothing runs, and what would have been launched is compiled for a target: ``cuda:90`` and so on.
"""

import argparse
import json
import re

import torch
import triton
from pyllm.kernels.launch import compile_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyllm import ops
from pyllm.bench import cubin
from pyllm.quant import QuantRows, QuantTensor, packing

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


def _activation(name, rows=32, width=14336, dtype=torch.bfloat16, gated=True, **options):
    inputs = [torch.empty(rows, width, dtype=dtype) for _ in range(1 + gated)]
    getattr(ops, name)(*inputs, backend="triton", **options)


def _activation_backward(kind, gated=True):
    inputs = [torch.empty(32, 14336, dtype=torch.bfloat16) for _ in range(2 + gated)]
    ops.activation_backward(kind, *inputs, backend="triton")


def _rope_cache(dtype=torch.bfloat16, cache=torch.float16, heads=(32, 8), rotary=128, **options):
    q, kv = (torch.empty(16, h, 128, dtype=dtype) for h in heads)
    caches = (torch.empty(9, 16, heads[1], 128, dtype=cache) for _ in range(2))
    ints = torch.empty(64, dtype=torch.int32)
    ops.rope_cache(
        q, kv, kv, torch.empty(64, rotary), ints[:16], *caches, cu_seqlens_q=ints[:17],
        page_table=ints.view(16, 4), backend="triton", **options,
    )  # fmt: skip


SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")


def _ints(*shape):
    return torch.empty(*shape, dtype=torch.int32)


def _embedding(weight):
    ops.embedding(_ints(16), weight, backend="triton")


def _sample(**options):
    ops.sample(torch.empty(4, 128256), backend="triton", **options)


def _norm_backward(op, width, rows=64, dtype=torch.bfloat16, residual=False):
    x = torch.empty(rows, width, dtype=dtype)
    grad = torch.empty_like(x) if residual else None
    weight = torch.empty(width, dtype=dtype)
    getattr(ops, op)(x, x, weight, residual_grad=grad, backend="triton")


def _norm_backward_cases(op):
    return {
        "bf16 128": lambda: _norm_backward(op, 128),
        "bf16 4096 residual": lambda: _norm_backward(op, 4096, residual=True),
        "fp32 8192": lambda: _norm_backward(op, 8192, dtype=torch.float32),
        "bf16 16384": lambda: _norm_backward(op, 16384),
    }


def _attention(dim, heads, kv_heads, dtype=torch.bfloat16, backward=False, **options):
    q = torch.empty(1, 4096, heads, dim, dtype=dtype)
    k = torch.empty(1, 4096, kv_heads, dim, dtype=dtype)
    options = {"causal": True, **options, "backend": "triton"}
    if not backward:
        ops.flash_attention(q, k, k, **options)
        return
    lse = torch.empty(1, 4096, heads)
    ops.flash_attention_backward(q, q, k, k, q, lse, **options)


def _attention_cases(**options):
    return {
        "bf16 64": lambda: _attention(64, 16, 16, **options),
        "bf16 128": lambda: _attention(128, 32, 8, **options),
        "bf16 128 window": lambda: _attention(128, 32, 8, window=1024, **options),
        "bf16 256 softcap": lambda: _attention(256, 8, 4, softcap=50.0, **options),
        "fp32 64": lambda: _attention(64, 8, 8, torch.float32, **options),
    }


def _paged(dim, tokens, batch, dtype=torch.bfloat16, cache_dtype=None, page_size=64, **options):
    q = torch.empty(tokens, 32, dim, dtype=dtype)
    cache = torch.empty(256, page_size, 8, dim, dtype=cache_dtype or dtype)
    i32 = {"dtype": torch.int32}
    tables = {
        "cu_seqlens_q": torch.zeros(batch + 1, **i32),
        "page_table": torch.zeros(batch, 64, **i32),
        "context_lens": torch.zeros(batch, **i32),
    }
    if not cache.is_floating_point() or cache.itemsize == 1:
        options |= {"k_scale": torch.ones(8), "v_scale": torch.ones(8)}
    ops.paged_attention(q, cache, cache, **tables, **options, backend="triton")


def _quant_matmul(rows, bits=4, group_size=32, symmetric=False, dtype=torch.bfloat16):
    n, k = 4096, 4096
    size = packing.packed_bytes(n, k, bits, min(group_size, 32), not symmetric)
    packed = torch.zeros(size, dtype=torch.uint8)
    weight = QuantTensor(packed, (n, k), bits, group_size, not symmetric)
    ops.quant_matmul(torch.empty(rows, k, dtype=dtype), weight, backend="triton")


def _row_matmul(rows, dtype):
    q = torch.empty(4096, 4096, dtype=dtype)
    x, weight = QuantRows(q[:rows], torch.empty(rows)), QuantRows(q, torch.empty(4096))
    ops.quant_matmul(x, weight, backend="triton")


# Op: case: what launches it.
CASES = {
    "activation": {
        "bf16 silu_mul": lambda: _activation("silu_mul"),
        "fp16 gelu_mul": lambda: _activation("gelu_mul", dtype=torch.float16),
        "fp32 gelu tanh": lambda: _activation(
            "gelu", dtype=torch.float32, gated=False, approximate="tanh"
        ),
        "bf16 relu 100": lambda: _activation("relu", width=100, gated=False),
    },
    "activation_backward": {
        "bf16 silu_mul": lambda: _activation_backward("silu"),
        "bf16 gelu_mul": lambda: _activation_backward("gelu"),
        "bf16 gelu tanh": lambda: _activation_backward("gelu_tanh", gated=False),
    },
    "embedding": {
        "bf16": lambda: _embedding(torch.empty(99, 4096, dtype=torch.bfloat16)),
        "4 bits": lambda: _embedding(QuantTensor.from_float(torch.ones(16, 4096), bits=4)),
        "8 bits": lambda: _embedding(QuantTensor.from_float(torch.ones(16, 4096), bits=8)),
    },
    "flash_attention": _attention_cases(),
    "flash_attention_backward": _attention_cases(backward=True),
    "paged_attention": {
        "bf16 64 decode": lambda: _paged(64, 4, 4),
        "bf16 128 decode": lambda: _paged(128, 4, 4),
        "bf16 128 decode, pages of 16": lambda: _paged(128, 4, 4, page_size=16),
        "bf16 128 decode, e4m3": lambda: _paged(128, 4, 4, cache_dtype=torch.float8_e4m3fn),
        "bf16 128 decode, int8": lambda: _paged(128, 4, 4, cache_dtype=torch.int8),
        "bf16 128 prompt": lambda: _paged(128, 4096, 1),
        "bf16 256 decode": lambda: _paged(256, 4, 4),
        "fp32 64 decode": lambda: _paged(64, 4, 4, torch.float32),
    },
    "quant_matmul": {
        "bf16 4 bits, 1 row": lambda: _quant_matmul(1),
        "bf16 4 bits, 64 rows": lambda: _quant_matmul(64),
        "bf16 4 bits, 4096 rows": lambda: _quant_matmul(4096),
        "fp16 4 bits in groups of 128, 1 row": lambda: _quant_matmul(
            1, group_size=128, dtype=torch.float16
        ),
        "bf16 8 bits, symmetric, 1 row": lambda: _quant_matmul(1, 8, symmetric=True),
        "int8 rows, 1 row": lambda: _row_matmul(1, torch.int8),
        "int8 rows, 4096 rows": lambda: _row_matmul(4096, torch.int8),
        "e4m3 rows, 1 row": lambda: _row_matmul(1, torch.float8_e4m3fn),
        "e4m3 rows, 4096 rows": lambda: _row_matmul(4096, torch.float8_e4m3fn),
    },
    "layer_norm": _norm_cases("layer_norm"),
    "layer_norm_backward": _norm_backward_cases("layer_norm_backward"),
    "rms_norm": _norm_cases("rms_norm"),
    "rms_norm_backward": _norm_backward_cases("rms_norm_backward"),
    "sample": {
        "greedy": lambda: _sample(),
        "greedy, no logprobs": lambda: _sample(logprobs=False),
        "all": lambda: _sample(
            **{name: torch.empty(4) for name in SAMPLING},
            top_k=_ints(4),
            seed=torch.empty(4, dtype=torch.int64),
            position=_ints(4),
            history=_ints(4, 512),
            prompt_lens=_ints(4),
            history_lens=_ints(4),
        ),
    },
    "rope_cache": {
        "bf16": lambda: _rope_cache(cache=torch.bfloat16),
        "fp32 interleaved, partial": lambda: _rope_cache(
            torch.float32, rotary=64, interleaved=True
        ),
    },
}


def compile_cases(target: GPUTarget, ops=tuple(CASES)) -> dict[str, dict[str, dict]]:
    """``{op: {"case: kernel": row}}``, rows as of `cubin.read`; ``spilled``, bytes a thread, where
    the compiler says it. ``shared`` is all that a block has."""
    found = {}
    for op in ops:
        rows = found[op] = {}
        for case, run in CASES[op].items():
            with compile_only(target) as launches:
                run()
            for launch in launches:
                name = f"{case}: {launch.kernel.__name__}"
                assert name not in rows, f"{op}: two launches of {name}"
                compiled = _compile(launch, target)
                rows[name] = (_hip if target.backend == "hip" else _cuda)(compiled, target)
    return found


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


def _cuda(compiled, target):
    (file,) = [p for name, p in compiled.metadata_group.items() if name.endswith(".cubin")]
    (row,) = cubin.read(file).values()
    shared = compiled.metadata.shared
    room = (164 if target.arch < 90 else 228) << 10
    blocks = cubin.blocks(row["registers"], row["threads"], shared, room)
    return row | {"shared": shared, "blocks": blocks}


# What is counted of AMD's assembly, by the names of the table.
HIP_INSTRUCTIONS = {
    "mfma": r"v_mfma_",
    "ldg_128": r"(?:global|buffer)_load_dwordx4",
    "stg_128": r"(?:global|buffer)_store_dwordx4",
    "local": r"scratch_(?:load|store)",
}


def _hip(compiled, target):
    assembly = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    threads = compiled.metadata.num_warps * target.warp_size
    registers, shared = number("vgpr_count"), compiled.metadata.shared
    counts = {n: len(re.findall(rf"^\s+{p}", assembly, re.M)) for n, p in HIP_INSTRUCTIONS.items()}
    return {
        "registers": registers, "shared": shared, "threads": threads,
        "blocks": hip_blocks(registers, threads, shared),
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spilled": 4 * number("vgpr_spill_count"), "stack": number("private_segment_fixed_size"),
        **{name: n for name, n in counts.items() if n},
    }  # fmt: skip


def hip_blocks(registers, threads, shared) -> int:
    """How many blocks fit a compute unit of gfx942: 4 SIMDs of 8 waves with 512 registers a lane,
    taken by 8; 64 KiB of shared memory."""
    a_simd = min(8, 512 // (-(-registers // 8) * 8))
    return min(4 * a_simd * 64 // threads, (64 << 10) // max(shared, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--op", choices=CASES, action="append")
    arguments = parser.parse_args()
    print(json.dumps(compile_cases(TARGETS[arguments.target], arguments.op or tuple(CASES))))
