"""What kernels are measured beside: one short adapter each.

An adapter has a name, says why it is missing on a device (or None), and for each op that it knows
has a function that takes a case's arguments and options and returns a call without arguments, or
None where it cannot do this case. What it converts before (weights into its own format) is not
timed. To add one, write such functions and put it into `BASELINES`; nothing else knows them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Baseline:
    """Somebody else's kernels.

    Attributes:
        name: as in `--baseline` and in the tables.
        ops: by op ``prepare(arguments, options) -> call or None``.
        devices: where it runs.
        module: what has to be installed.
        optional: whether it has to be asked for, because preparing it takes long.
    """

    name: str
    ops: dict[str, Callable]
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None
    optional: bool = False

    def missing(self, device: str) -> str | None:
        """Why it is not measured on `device`, or None."""
        if device not in self.devices:
            return f"for {' and '.join(self.devices)} only"
        if self.module and importlib.util.find_spec(self.module) is None:
            return "not installed"
        return None


# PyTorch, as one would write it.


def _residual(norm, a):
    if a.get("residual") is None:
        return lambda: norm(a["x"])

    def run():
        total = a["x"] + a["residual"]
        return norm(total), total

    return run


def _rms_norm(a, options):
    w, eps = a["weight"], 1e-6
    return _residual(lambda x: F.rms_norm(x, w.shape, w, eps), a)


def _layer_norm(a, options):
    w, b = a["weight"], a["bias"]
    return _residual(lambda x: F.layer_norm(x, w.shape, w, b, 1e-5), a)


def _activation(a, options):
    kind = options["kind"]
    if kind == "silu_mul":
        return lambda: F.silu(a["gate"]) * a["up"]
    if kind == "gelu_mul":
        return lambda: F.gelu(a["gate"]) * a["up"]
    return lambda: F.gelu(a["x"])


def _matmul(a, options):
    return lambda: F.linear(a["x"], a["weight"])


def _dense(a, options):
    """The same matmul on weights that are not quantized, in x's dtype."""
    weight = a["weight"].dequantize().to(a["x"].dtype)
    return lambda: F.linear(a["x"], weight)


def _attention(a, options, backends=None):
    if "lengths" in options:
        return None if backends else _each_sequence(a, options)
    q, k, v = (a[name].transpose(1, 2) for name in "qkv")

    def run():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=options["causal"], enable_gqa=True)
        return y.transpose(1, 2)

    if backends is None:
        return run
    from torch.nn.attention import sdpa_kernel

    def restricted():
        with sdpa_kernel(backends):
            return run()

    try:
        restricted()
    except RuntimeError:  # it does not take these shapes or dtypes
        return None
    return restricted


def _each_sequence(a, options):
    """One after another: faster on a CPU than padding them is (see `_padded`)."""
    parts = (a[name].split(options["lengths"]) for name in "qkv")
    sequences = [[x.transpose(0, 1)[None] for x in qkv] for qkv in zip(*parts, strict=True)]

    def run():
        each = [
            F.scaled_dot_product_attention(*qkv, is_causal=options["causal"], enable_gqa=True)
            for qkv in sequences
        ]
        return torch.cat([y[0].transpose(0, 1) for y in each])

    return run


def _padded(a, options):
    """A ragged batch padded to its longest sequence, which is not timed, with a mask."""
    lengths = options.get("lengths")
    if lengths is None:
        return None
    pad = torch.nn.utils.rnn.pad_sequence
    q, k, v = (pad(a[n].split(lengths), batch_first=True).transpose(1, 2) for n in "qkv")
    keys = torch.arange(max(lengths), device=q.device)
    seen = (keys < torch.tensor(lengths, device=q.device)[:, None])[:, None, None]
    if options["causal"]:
        seen = seen & (keys <= keys[:, None])
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def _paged(a, options):
    """Keys and values of every sequence in one piece, without the cost of gathering them."""
    batch, keys = options["batch"], options["keys"]
    k, v = (
        torch.stack([a[cache][rows].flatten(0, 1)[:keys] for rows in a["page_table"].long()])
        .to(a["q"].dtype).transpose(1, 2)
        for cache in ("k_cache", "v_cache")
    )  # fmt: skip
    q = a["q"].unflatten(0, (batch, -1)).transpose(1, 2)

    def run():
        causal = q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    return run


def _rope(a, options):
    cos, sin = a["cos_sin"][a["positions"].long()].chunk(2, -1)
    cos, sin = (torch.cat((t, t), -1).unsqueeze(1) for t in (cos, sin))
    slots = options["slots"]
    k_cache, v_cache = (a[name].flatten(0, 1) for name in ("k_cache", "v_cache"))

    def rotate(x):
        low, high = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)

    def run():
        k_cache.index_copy_(0, slots, rotate(a["k"]).to(k_cache.dtype))
        v_cache.index_copy_(0, slots, a["v"].to(v_cache.dtype))
        return rotate(a["q"])

    return run


def _sample(a, options):
    logits = a["logits"]
    if options["greedy"]:

        def greedy():
            tokens = logits.argmax(-1)
            return tokens.int(), torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]

        return greedy
    k, p, temperature = options["top_k"], options["top_p"], options["temperature"]

    def run():  # the k highest, of these the most probable
        top, ids = (logits / temperature).topk(k, -1)
        weights = torch.softmax(top, -1)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= p, 0)
        tokens = ids.gather(1, torch.multinomial(weights, 1))
        return tokens[:, 0].int(), torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]

    return run


TORCH = {
    "rms_norm": _rms_norm, "layer_norm": _layer_norm, "activation": _activation,
    "matmul": _matmul, "quant_matmul": _dense, "flash_attention": _attention,
    "paged_attention": _paged, "rope_cache": _rope, "sample": _sample,
}  # fmt: skip


def _compiled(op):
    def prepare(a, options):
        torch._dynamo.reset()
        return torch.compile(TORCH[op](a, options), dynamic=False)

    return prepare


def _sdpa(name):
    def prepare(a, options):
        from torch.nn.attention import SDPBackend

        return _attention(a, options, [getattr(SDPBackend, name)])

    return prepare


def _torch_int4(a, options):
    """PyTorch's own 4-bit matmul, of the same sizes; its rounding is its own."""
    x, w = a["x"], a["weight"]
    n, k = w.shape
    if w.bits != 4 or x.dtype != torch.bfloat16 or n % 32 or k % 32:
        return None
    group = 32
    q = torch.randint(0, 16, (n, k), dtype=torch.int32, device=x.device)
    scales = torch.rand(k // group, n, 2, device=x.device).to(torch.bfloat16)
    if x.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)
    packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).byte(), 8)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _torch_int8(a, options):
    """PyTorch's matmul on 8-bit weights with a scale a row, of the same sizes."""
    x, w = a["x"], a["weight"]
    if w.bits != 8 or x.dtype != torch.bfloat16:
        return None
    q = torch.randint(-127, 128, w.shape, dtype=torch.int8, device=x.device)
    scales = torch.rand(w.shape[0], device=x.device).to(torch.bfloat16)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, q, scales)


def _gemlite(a, options):
    """Its kernels of halves by the same quants; it chooses one by the number of rows."""
    x, w = a["x"], a["weight"]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return None
    from gemlite.helper import A16Wn

    q, scale, minimum = w.parts()
    # What it multiplies with is (q - zero) * scale.
    zero = torch.full_like(scale, w.offset)
    if minimum is not None:
        zero = -minimum.float() / scale.float()
    layer = A16Wn(device=x.device, dtype=x.dtype).from_weights(
        q.contiguous(), scale, zero, w.bits, w.group_size
    )
    return lambda: layer(x)


def _liger_rms_norm(a, options):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    run = LigerRMSNormFunction.apply
    return _residual(lambda x: run(x, a["weight"], 1e-6, 0.0, "llama", False), a)


def _liger_layer_norm(a, options):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    run = LigerLayerNormFunction.apply
    return _residual(lambda x: run(x, a["weight"], a["bias"], 1e-5), a)


def _liger_activation(a, options):
    if options["kind"] != "silu_mul":
        return None
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda: LigerSiLUMulFunction.apply(a["gate"], a["up"])


def _flash_attn(a, options):
    if "lengths" in options:
        return None
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(a["q"], a["k"], a["v"], causal=options["causal"])


def _flashinfer_rms_norm(a, options):
    import flashinfer

    return _residual(lambda x: flashinfer.norm.rmsnorm(x, a["weight"], 1e-6), a)


def _flashinfer_attention(a, options):
    import flashinfer

    if a["q"].shape[0] != 1:
        return None
    q, k, v = (a[name][0] for name in "qkv")
    run = flashinfer.single_prefill_with_kv_cache
    return lambda: run(q, k, v, causal=options["causal"])[None]


GPU = ("cuda",)
BASELINES = [
    Baseline("torch", TORCH),
    Baseline("torch padded", {"flash_attention": _padded}),
    Baseline("torch.compile", {op: _compiled(op) for op in TORCH if op != "sample"}, optional=True),
    Baseline("sdpa math", {"flash_attention": _sdpa("MATH")}, optional=True),
    Baseline("sdpa flash", {"flash_attention": _sdpa("FLASH_ATTENTION")}),
    Baseline("sdpa efficient", {"flash_attention": _sdpa("EFFICIENT_ATTENTION")}, GPU),
    Baseline("sdpa cudnn", {"flash_attention": _sdpa("CUDNN_ATTENTION")}, GPU),
    Baseline("torch int4", {"quant_matmul": _torch_int4}),
    Baseline("torch int8", {"quant_matmul": _torch_int8}),
    Baseline(
        "liger",
        {
            "rms_norm": _liger_rms_norm, "layer_norm": _liger_layer_norm,
            "activation": _liger_activation,
        },
        GPU, "liger_kernel",
    ),
    Baseline("gemlite", {"quant_matmul": _gemlite}, GPU, "gemlite"),
    Baseline("flash-attn", {"flash_attention": _flash_attn}, GPU, "flash_attn"),
    Baseline(
        "flashinfer", {"rms_norm": _flashinfer_rms_norm, "flash_attention": _flashinfer_attention},
        GPU, "flashinfer",
    ),
]  # fmt: skip


def select(names: str | None, device: str) -> tuple[list[Baseline], dict[str, str]]:
    """The baselines of ``torch,liger`` (None: all but the slow ones), and why others are absent."""
    known = {b.name: b for b in BASELINES}
    asked = [b.name for b in BASELINES if not b.optional] if names is None else names.split(",")
    asked = [name for name in asked if name != "none"]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"--baseline: expected none, {', '.join(known)}; got {', '.join(unknown)}")
    absent = {name: why for name in asked if (why := known[name].missing(device))}
    return [known[name] for name in asked if name not in absent], absent
