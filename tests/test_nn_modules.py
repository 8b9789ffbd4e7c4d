"""Modules with the constructors of torch: against those of torch, in place and on their own."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch import nn

import pyllm
from pyllm.nn import Attention, GeGLU, LayerNorm, Linear, MultiheadAttention, RMSNorm, SwiGLU

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def like(module):
    """The module in float64, where only torch computes."""
    return copy.deepcopy(module).double()


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("shape", [(24,), (3, 8), 24])
def test_norms(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, dtype=dtype) if shape == (3, 8) else torch.randn(4, 24, dtype=dtype)
    for ours, theirs, options in (
        (LayerNorm, nn.LayerNorm, {}),
        (LayerNorm, nn.LayerNorm, {"bias": False}),
        (LayerNorm, nn.LayerNorm, {"elementwise_affine": False, "eps": 1e-3}),
        (RMSNorm, nn.RMSNorm, {}),
        (RMSNorm, nn.RMSNorm, {"eps": 1e-3, "elementwise_affine": False}),
    ):
        own, other = ours(shape, dtype=dtype, **options), theirs(shape, dtype=dtype, **options)
        for parameter in other.parameters():
            parameter.normal_()
        own.load_state_dict(other.state_dict(), strict=True)
        # eps=None is that of the dtype
        if isinstance(other, nn.RMSNorm) and other.eps is None:
            exact = like(other)
            exact.eps = torch.finfo(dtype).eps
        else:
            exact = like(other)
        assert_close(own(x), exact(x.double()), other(x))


def test_norm_of_several_dimensions_takes_no_residual():
    x = torch.randn(4, 3, 8)
    with pytest.raises(ValueError, match="expected a norm over the last dimension, got one over 2"):
        LayerNorm((3, 8))(x, x)


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_linear(rows, dtype):
    torch.manual_seed(0)
    own, other = Linear(48, 20, dtype=dtype), nn.Linear(48, 20, dtype=dtype)
    own.load_state_dict(other.state_dict())
    x = torch.randn(rows, 48, dtype=dtype)
    assert_close(own(x), like(other)(x.double()), other(x))


def masks(q, k, batch, heads):
    """Options of a call by name."""
    torch.manual_seed(1)
    causal = torch.ones(q, k, dtype=torch.bool).triu(1)
    hidden = torch.rand(batch * heads, q, k) > 0.7
    hidden[..., 0] = False
    padding = torch.arange(k)[None] >= torch.tensor([[k], [k - 2]])
    return {
        "none": {},
        "causal": {"attn_mask": causal, "is_causal": q == k},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding},
        "each head": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(q, k)},
        "float padding": {"key_padding_mask": torch.randn(batch, k)},
    }


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("mask", masks(5, 5, 2, 4))
@pytest.mark.parametrize("kind", ["self", "cross", "sizes", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first, kind, mask, dtype):
    torch.manual_seed(0)
    queries, keys = (5, 5) if kind == "self" else (5, 7)
    options = {"kdim": 24, "vdim": 40} if kind == "sizes" else {}
    options |= {"bias": kind != "no bias", "batch_first": batch_first, "dtype": dtype}
    own, other = (
        cls(32, 4, **options).eval() for cls in (MultiheadAttention, nn.MultiheadAttention)
    )
    for parameter in other.parameters():
        parameter.normal_(std=0.3)
    own.load_state_dict(other.state_dict(), strict=True)
    q = torch.randn(2, queries, 32, dtype=dtype)
    k = q if kind == "self" else torch.randn(2, keys, own.kdim, dtype=dtype)
    v = k if kind != "sizes" else torch.randn(2, keys, own.vdim, dtype=dtype)
    options = masks(queries, keys, 2, 4)[mask]

    def call(module, to):
        def cast(x):
            return x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        query, key, value = (cast(x if batch_first else x.transpose(0, 1)) for x in (q, k, v))
        # torch's own test for self-attention is whether they are one tensor
        key = query if kind == "self" else key
        value = key if kind != "sizes" else value
        arguments = {name: cast(x) for name, x in options.items()}
        return module(query, key, value, need_weights=False, **arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, expected = call(like(other), torch.float64)[0], call(other, dtype)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual, weights = call(own, dtype)
    assert weights is None
    assert_close(actual, exact, expected)


@torch.no_grad()
def test_multihead_attention_of_one_sequence():
    own = MultiheadAttention(32, 4).eval()
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        own(x, x, x, need_weights=False)[0],
        own(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0],
    )


@pytest.mark.parametrize(
    ("options", "call", "why"),
    [
        ({}, {}, "the attention weights are wanted"),
        ({"dropout": 0.5}, {"need_weights": False}, "there is dropout"),
        ({"add_zero_attn": True}, {"need_weights": False}, "of add_bias_kv or add_zero_attn"),
        ({"add_bias_kv": True}, {"need_weights": False}, "of add_bias_kv or add_zero_attn"),
    ],
)
def test_multihead_attention_by_torch(options, call, why):
    own, other = (
        cls(32, 4, batch_first=True, **options).train()
        for cls in (MultiheadAttention, nn.MultiheadAttention)
    )
    own.load_state_dict(other.state_dict())
    x = torch.randn(2, 5, 32)
    torch.manual_seed(0)
    expected = other(x, x, x, **call)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=why):
        actual = own(x, x, x, **call)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("rows", [1, 20])
def test_gated_blocks(rows, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, 16, dtype=dtype)
    for block, activation in (
        (SwiGLU(16, 40, dtype=dtype), nn.functional.silu),
        (GeGLU(16, 40, bias=True, dtype=dtype), nn.functional.gelu),
        (GeGLU(16, 40, approximate="tanh", dtype=dtype), nn.GELU("tanh")),
    ):

        def reference(b, x, activation=activation):
            return b.down_proj(activation(b.gate_proj(x)) * b.up_proj(x))

        assert_close(block(x), reference(like(block), x.double()), reference(block, x))


@torch.no_grad()
@DTYPES
def test_attention(dtype):
    torch.manual_seed(0)
    x, context = torch.randn(2, 6, 32, dtype=dtype), torch.randn(2, 9, 32, dtype=dtype)
    layer = Attention(32, 4, 2, head_dim=12, causal=True, dtype=dtype)

    def reference(m, x, context, causal=False, mask=None):
        q, k, v = (
            p(y).unflatten(-1, (-1, 12)).transpose(1, 2)
            for p, y in ((m.q_proj, x), (m.k_proj, context), (m.v_proj, context))
        )
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return m.o_proj(y.transpose(1, 2).flatten(2))

    exact = reference(like(layer), x.double(), x.double(), True)
    assert_close(layer(x), exact, reference(layer, x, x, True))
    cross, seen = Attention(32, 4, 2, head_dim=12, dtype=dtype), torch.rand(6, 9) > 0.3
    exact = reference(like(cross), x.double(), context.double(), mask=seen)
    assert_close(cross(x, context, seen), exact, reference(cross, x, context, mask=seen))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_plain_transformer(batch_first):
    """What torch computes in one call at inference is left; what it does not is replaced."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x = torch.randn(6, 6, 32)
    padding = torch.arange(6)[None] >= torch.tensor([6, 5, 4, 3, 2, 6])[:, None]
    seen = ~padding if batch_first else ~padding.t()
    y = model(x, src_key_padding_mask=padding)
    exact = like(model)(x.double(), src_key_padding_mask=padding)
    if batch_first:
        with pytest.raises(ValueError, match=r"layers.0: torch computes it in one call"):
            pyllm.patch(model)
    else:
        pyllm.patch(model)
        assert isinstance(model.layers[0].self_attn, MultiheadAttention)
        assert_close(model(x, src_key_padding_mask=padding)[seen], exact[seen], y[seen])
        pyllm.unpatch(model)
    pyllm.patch(model, linear="int8", backend="reference")
    quantized = model(x, src_key_padding_mask=padding)[seen]
    weights = {n: m.quant.dequantize() for n, m in model.named_modules() if hasattr(m, "quant")}
    assert len(weights) == 4
    pyllm.unpatch(model)
    assert torch.equal(model(x, src_key_padding_mask=padding), y)
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
    exact = like(model)(x.double(), src_key_padding_mask=padding)[seen]
    assert_close(quantized, exact, model(x, src_key_padding_mask=padding)[seen])


def test_bad_arguments():
    with pytest.raises(ValueError, match="approximate: expected 'none' or 'tanh', got 'erf'"):
        GeGLU(4, 8, approximate="erf")
    with pytest.raises(ValueError, match=r"expected num_heads to divide .*, got 3, 32 and 3"):
        Attention(32, 3)


PAGES = sorted(Path(pyllm.nn.__file__).parent.glob("[a-z]*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_pages_say_runs(page):
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert len(blocks) > 1
    exec(compile("\n".join(blocks), page.name, "exec"), {})
