"""Linear layers over quantized or plain weights."""

import torch
from torch import nn

from pyllm import _C
from pyllm.ops import embedding, matmul, quant_matmul
from pyllm.ops.alloc import empty
from pyllm.ops.registry import dispatches

# Up to so many rows pyllm's product of dtypes on the CPU was faster than PyTorch's at every size
# measured: few rows are bound by reading the weights, and PyTorch has no fast product of float16,
# nor of bfloat16 before AVX-512.
_ALL = 1 << 40
_FEW_ROWS = {
    "avx512": {torch.float32: _ALL, torch.bfloat16: 256, torch.float16: _ALL},
    "avx2": {torch.float32: 8, torch.bfloat16: _ALL, torch.float16: _ALL},
}.get(_C.isa(), {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4})


class Linear(nn.Linear):
    """As ``torch.nn.Linear``, at inference on the CPU by pyllm's kernel where that is faster.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.
    """

    backend = None

    def forward(self, x):
        return multiply(x, self.weight, self.bias, self.backend)


def multiply(x, weight, bias, backend=None):
    """``x @ weightᵀ + bias``, by the faster of two."""
    if (
        not x.is_cpu
        or dispatches(x, weight, bias)  # before sizes are looked at, which may be symbolic
        or weight.dtype != x.dtype
        or not 0 < x.numel() <= _FEW_ROWS.get(x.dtype, 0) * x.shape[-1]
    ):
        return nn.functional.linear(x, weight, bias)
    return matmul(x, weight, None if bias is None else bias.float(), backend=backend)


class FusedLinear(nn.Module):
    """Several linear layers on the same input: ``x @ W_iᵀ + b_i`` for each i.

    Weights of one format lie in one matrix and take one kernel call.

    Args:
        weights: matrices ``[N, K]``, each a float tensor or what `quant_matmul` takes, one for each
            call.
        biases: for each matrix a float ``[N]``, or None.
        splits: for each matrix the sizes of the outputs that lie in it; None: one each.
        dtype: of the outputs; None: as of the input.
    """

    def __init__(self, weights, biases=None, splits=None, dtype=None):
        super().__init__()
        self.dtype = dtype
        self.weights = list(weights)
        self.biases = list(biases or [None] * len(self.weights))
        self.splits = splits or [[w.shape[0]] for w in self.weights]
        groups = {getattr(w, "packed_group_size", None) for w in self.weights}
        # The groups that the op before may quantize its result in for all of these: see `rms_norm`.
        self.quantize = groups.pop() if len(groups) == 1 else None

    def forward(self, x):
        outputs = []
        for weight, bias, sizes in zip(self.weights, self.biases, self.splits, strict=True):
            y = self._multiply(x, weight, bias)
            outputs += y.split(sizes, -1) if len(sizes) > 1 else [y]
        return outputs

    def _multiply(self, x, weight, bias):
        out = None
        if isinstance(x, torch.Tensor) and self.dtype not in (None, x.dtype):
            out = empty((*x.shape[:-1], weight.shape[0]), self.dtype, x.device)
        multiply = matmul if isinstance(weight, torch.Tensor) else quant_matmul
        return multiply(x, weight, bias, out=out)


class Embedding(nn.Module):
    """Rows of a matrix ``[V, D]``, a `QuantTensor` or a float tensor, in `dtype`."""

    def __init__(self, weight, dtype=torch.float32):
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, token_ids):
        out = empty((*token_ids.shape, self.weight.shape[1]), self.dtype, token_ids.device)
        return embedding(token_ids, self.weight, out=out)
