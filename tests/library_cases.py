"""What tests/test_library.py goes through: ops, their tensors and the same in plain PyTorch."""

import torch
import torch.nn.functional as F
from cases import rand

from pyllm import ops
from pyllm.ops import quantize_activation
from pyllm.quant import QuantTensor

EPS = 1e-5


def leaf(*shape, seed=0, dtype=torch.float32):
    return rand(*shape, seed=seed).to(dtype).requires_grad_()


def at_least_float(x):
    """What must be float32, or float64 with all the others."""
    return x if x.dtype == torch.float64 else x.float()


def norm_case(op, parameters, residual=False):
    names = ["x", *(["residual"] if residual else []), *parameters]
    shapes = [(32,) if name in ("weight", "bias") else (3, "L", 32) for name in names]

    def call(*tensors, backend=None):
        return getattr(ops, op)(**dict(zip(names, tensors, strict=True)), eps=EPS, backend=backend)

    def formula(*tensors):
        given = dict(zip(names, tensors, strict=True))
        x = given.pop("x")
        total = x + given.pop("residual") if residual else x
        y = getattr(F, op)(total, (32,), **given, eps=EPS)
        return (y, total) if residual else y

    return call, shapes, formula


def activation_case(op, formula, n=1):
    return lambda *t, backend=None: op(*t, backend=backend), [(3, "L", 32)] * n, formula


def attention_case(heads=4, names=(), lengths=None, **options):
    """Attention of these heads, 2 of keys and values; ragged with sequences of these lengths."""
    shapes = [(3, "L", h, 8) if lengths is None else (sum(lengths), h, 8) for h in (heads, 2, 2)]
    of_name = {"bias": (1, heads, "L", "L"), "sinks": (heads,)}
    shapes += [of_name[name] for name in names]
    lse = options.get("return_lse", False)
    ragged = {}
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        ragged = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}

    def call(q, k, v, *rest, backend=None):
        tensors = {n: at_least_float(t) for n, t in zip(names, rest, strict=True)}
        return ops.flash_attention(q, k, v, **tensors, **ragged, **options, backend=backend)

    def formula(q, k, v, *rest):
        given = dict(zip(names, rest, strict=True))
        if lengths is not None:
            parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
            return torch.cat([one(*(t[None] for t in part), **given)[0][0] for part in parts])
        return one(q, k, v, **given)[: 1 + lse] if lse else one(q, k, v, **given)[0]

    def one(q, k, v, bias=None, sinks=None):
        k, v = (t.repeat_interleave(heads // 2, 2) for t in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
        if softcap := options.get("softcap"):
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if options.get("causal"):
            hidden |= distance < 0
        if window := options.get("window"):
            hidden |= distance >= window
        logits = logits.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            logits = torch.cat((logits, sinks[:, None, None].expand(*logits.shape[:3], 1)), -1)
        weights = logits.softmax(-1)[..., : k.shape[1]]
        return torch.einsum("bhqk,bkhd->bqhd", weights, v), logits.logsumexp(-1).transpose(1, 2)

    return call, shapes, formula


QUANT = QuantTensor.from_float(rand(24, 32, seed=7), bits=4)
IDS = torch.tensor([3, 0, 3, 7], dtype=torch.int32)

# name -> (function of tensors and backend=, shapes of the tensors, the same in plain PyTorch). "L"
# is a length, dynamic where something is traced. All tensors can be differentiated.
DIFFERENTIABLE = {
    "rms_norm": norm_case("rms_norm", ["weight"]),
    "rms_norm of a sum": norm_case("rms_norm", ["weight"], residual=True),
    "layer_norm": norm_case("layer_norm", ["weight", "bias"]),
    "layer_norm without parameters": norm_case("layer_norm", []),
    "layer_norm with a bias": norm_case("layer_norm", ["bias"]),
    "layer_norm of a sum": norm_case("layer_norm", ["weight", "bias"], residual=True),
    "flash_attention": attention_case(return_lse=True),
    "flash_attention, causal": attention_case(causal=True, softcap=2.0, window=3),
    "flash_attention, biased": attention_case(names=("bias", "sinks")),
    "flash_attention, ragged": attention_case(lengths=(5, 0, 7), causal=True),
    "relu": activation_case(ops.relu, F.relu),
    "gelu": activation_case(ops.gelu, F.gelu),
    "silu_mul": activation_case(ops.silu_mul, lambda x, y: F.silu(x) * y, 2),
    "gelu_mul": activation_case(
        lambda *t, backend: ops.gelu_mul(*t, "tanh", backend=backend),
        lambda x, y: F.gelu(x, approximate="tanh") * y, 2,
    ),
    "matmul": (
        lambda x, w, b, backend=None: ops.matmul(x, w, at_least_float(b), backend=backend),
        [(3, "L", 32), (24, 32), (24,)], F.linear,
    ),
    "quant_matmul": (
        lambda x, b, backend=None: ops.quant_matmul(x, QUANT, at_least_float(b), backend=backend),
        [(3, "L", 32), (24,)], lambda x, b: F.linear(x, QUANT.dequantize().to(x.dtype), b),
    ),
    "embedding": (
        lambda w, backend=None: ops.embedding(IDS, w, backend=backend),
        [(9, 16)], lambda w: F.embedding(IDS, w),
    ),
}  # fmt: skip


def leaves(shapes, dtype=torch.float32, length=5):
    sizes = [[length if size == "L" else size for size in shape] for shape in shapes]
    return [leaf(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def opcheck_cases():
    x, residual, weight, bias = rand(3, 5, 32), rand(3, 5, 32, seed=1), rand(32, seed=2), rand(32)
    q, k = rand(2, 5, 4, 8), rand(2, 6, 2, 8, seed=1)
    tokens, keys, cu_seqlens = (
        rand(11, 4, 8),
        rand(11, 2, 8, seed=1),
        torch.tensor([0, 4, 11]).int(),
    )
    sides = (0.3, -1, 0, 0.0, None)
    bias4, lse = rand(1, 4, 5, 6), rand(2, 5, 4).abs() + 3
    quantized = QUANT.packed, 24, 32, 4, 32, True, False
    cache = torch.zeros(4, 8, 2, 8)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    positions = torch.tensor([*range(4), *range(7)], dtype=torch.int32)
    lens = torch.tensor([4, 7], dtype=torch.int32)
    yield "rms_norm", x, weight, EPS, None
    yield "add_rms_norm", x, residual, weight, EPS, None
    yield "rms_norm_backward", residual, x, weight, None, EPS, None
    yield "rms_norm_backward", residual, x, weight, residual, EPS, None
    yield "layer_norm", x, weight, bias, EPS, None
    yield "layer_norm", x, None, None, EPS, None
    yield "add_layer_norm", x, residual, weight, bias, EPS, None
    yield "layer_norm_backward", residual, x, weight, residual, EPS, None
    yield "layer_norm_backward", residual, x, None, None, EPS, None
    yield "flash_attention", q, k, k, None, None, None, None, None, *sides
    yield "flash_attention", q, k, k, None, None, None, bias4, rand(4), *sides
    yield "flash_attention", tokens, keys, keys, cu_seqlens, cu_seqlens, None, None, None, *sides
    yield (
        "flash_attention_backward",
        q,
        q,
        k,
        k,
        *[None] * 3,
        bias4,
        rand(4),
        q,
        lse,
        lse,
        True,
        *sides,
    )
    yield "flash_attention_backward", q, q, k, k, *[None] * 5, q, lse, None, False, *sides
    yield "activation", "gelu", x, None
    yield "gated_activation", "silu", x, residual, None
    yield "matmul", x, rand(24, 32), rand(24), None
    yield "matmul", x, rand(24, 32), None, None
    yield "quant_matmul", x, *quantized, rand(24), None, None
    yield "quant_matmul", quantize_activation(x).data, *quantized, None, 32, None
    yield "quant_matmul_backward", rand(3, 5, 24), *quantized, None
    yield "quantize_activation", x, 32, None
    yield "embedding", IDS, rand(9, 16), None
    yield "quant_embedding", IDS, *quantized, None
    yield ("rope_cache", tokens, keys, keys, rand(9, 8), positions, cache, cache.clone(),
           cu_seqlens, table, False, None)  # fmt: skip
    yield ("paged_attention", tokens, cache, cache, cu_seqlens, table, lens, *[None] * 4, *sides)
    yield "sample", rand(2, 9), rand(2).abs(), *[None] * 11, True, None
    yield "sample", rand(2, 9), *[None] * 12, False, None
