"""Rows of an embedding table by token id. Source: pyllm/ops/embedding.py, csrc/core/quant_matrix.h.

Floor: one row read and one written a token. A row of quantized weights lies in four bytes of every
64, so eight times its bytes are read; a decoding step has a few KB, and costs what a launch does.
"""

import torch
import triton
import triton.language as tl
from pyllm.kernels.configurations import configuration
from pyllm.kernels.launch import launch
from pyllm.kernels.primitives import round_to

PANEL = tl.constexpr(16)  # rows that lie interleaved


@triton.jit
def embedding_kernel(token_ids, weight, out, stride, out_stride, n, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row).to(tl.int64)
    exists = (token >= 0) & (token < n)
    x = tl.load(weight + token * stride + at, mask=at < tl.where(exists, width, 0), other=0.0)
    x = tl.where(exists, x.to(tl.float32), float("nan"))
    tl.store(out + row * out_stride + at, round_to(x, out.dtype.element_ty), mask=at < width)


@triton.jit
def quant_embedding_kernel(
    token_ids, quants, scales, out, out_stride, n, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`quants` are the bytes of the packed weight, `scales` the same memory as float16."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row).to(tl.int64)
    exists = (token >= 0) & (token < n)
    inside = at < tl.where(exists, width, 0)
    scale_bytes: tl.constexpr = 64 if MINIMUM else 32
    group_bytes: tl.constexpr = scale_bytes + PANEL * GROUP * BITS // 8
    span: tl.constexpr = GROUP * BITS // 8  # weights in the low, or only, part of the bytes
    panel, lane = token // PANEL, token % PANEL
    group = (panel * (width // GROUP) + at // GROUP) * group_bytes
    i = at % GROUP
    byte = group + scale_bytes + i % span // 4 * 64 + lane * 4 + i % 4
    q = tl.load(quants + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        q = (q >> (i // span * 4)) & 15
    if not MINIMUM:
        q -= 1 << (BITS - 1)
    x = tl.load(scales + group // 2 + lane, mask=inside, other=0.0).to(tl.float32) * q
    if MINIMUM:
        x += tl.load(scales + group // 2 + 16 + lane, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(exists, x, float("nan"))
    tl.store(out + row * out_stride + at, round_to(x, out.dtype.element_ty), mask=at < width)


def _grid(token_ids, out):
    chosen = configuration("embedding", out.device, out.dtype, out.shape[1])
    block = min(triton.next_power_of_2(out.shape[1]), chosen["BLOCK"])
    return (len(token_ids), triton.cdiv(out.shape[1], block)), chosen | {"BLOCK": block}


def embedding(token_ids, weight, out):
    """Rows of ``weight [V, D]``, any float dtypes; token_ids are contiguous."""
    if out.numel() == 0:
        return
    grid, chosen = _grid(token_ids, out)
    launch(
        embedding_kernel, grid, token_ids, weight, out, weight.stride(0), out.stride(0),
        *weight.shape, **chosen,
    )  # fmt: skip


def quant_embedding(token_ids, packed, n, k, bits, group_size, has_minimum, out):
    """Rows of a `QuantTensor`, given as its ``kernel_arguments()``."""
    if out.numel() == 0:
        return
    grid, chosen = _grid(token_ids, out)
    launch(
        quant_embedding_kernel, grid, token_ids, packed, packed.view(torch.float16), out,
        out.stride(0), n, k, BITS=bits, GROUP=group_size, MINIMUM=has_minimum,
        enable_fp_fusion=False, **chosen,
    )  # fmt: skip
