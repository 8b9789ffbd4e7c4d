"""`quant_matmul` at the matrices of a model's layer, in the formats of GGUF files."""

import torch

from pyllm import memory, ops
from pyllm.quant import QuantTensor, packing

from .case import Case, nbytes

# name: bits, symmetric
FORMATS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}
GROUP = 32


def cases(model, shape, setting):
    """Every matrix of a layer, for one token, small batches and a prompt."""
    for tokens in (1, 5) if setting.small else (1, 16, 64, 512):
        for name, (n, k) in shape.matrices().items():
            if name == "head" and tokens > 1:
                continue  # only rows that are sampled have logits
            for format in ("Q4_0", "Q8_0") if setting.small else FORMATS:
                yield _case(model, name, tokens, n, k, format, setting)


def _case(model, name, tokens, n, k, format, setting):
    bits, symmetric = FORMATS[format]
    weight_bytes = packing.packed_bytes(n, k, bits, GROUP, not symmetric)
    x, y = setting.rand(tokens, k), setting.rand(tokens, n)

    def make():
        return {
            "x": setting.rand(tokens, k),
            "weight": random_weight(n, k, bits, symmetric, setting.device),
        }

    def call(a, backend):
        return ops.quant_matmul(**a, backend=backend)

    def meant(a, backend):
        if backend != "cpu":
            return a
        # The CPU kernel multiplies x in int8 groups.
        x = ops.quantize_activation(a["x"], GROUP, backend="reference").dequantize()
        return {**a, "x": x.to(a["x"].dtype)}

    int8 = setting.device == "cpu"
    return Case(
        "quant_matmul", f"{model}, {name} {format} {tokens} x {k} x {n}", make, call,
        nbytes(x, y) + weight_bytes, 2 * tokens * n * k,
        "int8_gops" if int8 else "bfloat16_gflops", size=tokens, meant=meant,
    )  # fmt: skip


def random_weight(n, k, bits, symmetric, device="cpu") -> QuantTensor:
    """A weight of random quants and scales, in memory of its own."""
    panel = QuantTensor.from_float(torch.randn(16, k), bits=bits, symmetric=symmetric).packed
    packed = memory.allocate(packing.packed_bytes(n, k, bits, GROUP, not symmetric))
    packed.view(-1, panel.numel())[:] = panel
    return QuantTensor(packed.to(device), (n, k), bits, GROUP, not symmetric)
