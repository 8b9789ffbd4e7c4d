"""`scaled_dot_product_attention` against PyTorch's, which it has the signature of."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import rand
from compare import EPS, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyllm
from pyllm import _C
from pyllm.ops import scaled_dot_product_attention
from pyllm.ops.registry import BackendError, use

pytestmark = pytest.mark.filterwarnings("error:scaled_dot_product_attention")


def formula(*tensors, **options):
    """PyTorch's, by its plain formula."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors, **options)


def check(query, key, value, mask=None, **options):
    def double(x):
        return x if x is None or x.dtype == torch.bool else x.double()

    y = scaled_dot_product_attention(query, key, value, mask, **options)
    exact = formula(*map(double, (query, key, value, mask)), **options)
    own = formula(query, key, value, mask, **options)
    assert y.dtype == own.dtype
    assert y.shape == own.shape
    if y.numel():
        assert_close(y, exact, own)


@st.composite
def calls(draw):
    """Arguments of all kinds: leading dimensions, heads, lengths, masks, options."""
    size = st.integers(1, 3)
    leading = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    heads, ratio = draw(size), draw(size)
    n, keys, dim = (
        draw(st.integers(0, 9)),
        draw(st.integers(0, 9)),
        draw(st.sampled_from([1, 8, 20])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    no_heads = not leading and draw(st.booleans())
    gqa = not no_heads and draw(st.booleans())

    def tensor(heads, length, seed):
        # Leading dimensions broadcast; of nothing, PyTorch does not look at them.
        some = [draw(st.sampled_from([d, 1])) if n and keys else d for d in leading]
        shape = (length, dim) if no_heads else (*some, heads, length, dim)
        x = rand(*shape, seed=seed, dtype=dtype)
        layout = draw(st.sampled_from(["contiguous", "heads inside", "transposed"]))
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "heads inside" and x.ndim > 2:
            return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        return x

    kv_heads = heads if gqa else draw(st.sampled_from([1, heads * ratio]))
    q = tensor(heads * ratio, n, 0)
    k, v = tensor(kv_heads, keys, 1), tensor(kv_heads, keys, 2)
    k_leading = (*k.shape[:-3], 1) if gqa else k.shape[:-2]
    full = torch.broadcast_shapes(q.shape[:-2], k_leading)  # the mask has no more than the logits
    kind = draw(st.sampled_from(["none", "bool", "float", "infinite"]))
    mask = None
    if kind != "none":
        shape = [draw(st.sampled_from([d, 1])) for d in (*full, n, keys)]
        shape = shape[draw(st.integers(0, len(shape) - 2)) :]
        mask = rand(*shape, seed=3)
        if kind == "bool":
            mask = mask > 0
        elif kind == "infinite":
            mask = torch.where(mask > 0, 0, -torch.inf)
        if kind != "bool":
            mask = mask.to(draw(st.sampled_from([torch.float32, dtype])))
    options = {
        "is_causal": mask is None and draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3, 0.0])),
        "enable_gqa": gqa,
    }
    return (q, k, v, mask), options


@given(calls())
@settings(max_examples=150, deadline=None)
def test_is_what_pytorch_computes(call):
    arguments, options = call
    check(*arguments, **options)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize(("n", "keys"), [(1, 300), (5, 5), (3, 7), (7, 3)], ids=str)
def test_the_short_way_gives_the_same_bits(n, keys, heads_inside, mask, monkeypatch):
    q, k, v = rand(2, 4, n, 24), rand(2, 2, keys, 24, seed=1), rand(2, 2, keys, 24, seed=2)
    if heads_inside:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    masks = {"bool": rand(2, 1, n, keys) > -0.5, "float": rand(n, keys)}
    arguments = (q, k, v, masks.get(mask), 0.0, mask == "causal", None, True)
    short = _C.scaled_dot_product_attention(*arguments[:4], *arguments[5:])
    assert short.transpose(1, 2).is_contiguous()
    assert torch.equal(scaled_dot_product_attention(*arguments), short)
    monkeypatch.setattr(_C, "scaled_dot_product_attention", lambda *arguments: None)
    assert torch.equal(scaled_dot_product_attention(*arguments), short)


def test_signature_is_that_of_pytorch():
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    ours = {name: p.default for name, p in parameters.items() if name != "backend"}
    assert list(ours)[:3] == ["query", "key", "value"]
    assert dict(list(ours.items())[3:]) == {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    }  # fmt: skip
    q = rand(2, 3, 5, 8)
    positional = (q, q, q, torch.ones(5, 5).tril().bool(), 0.0, False, 0.4, True)
    expected = F.scaled_dot_product_attention(*positional[:6], scale=0.4, enable_gqa=True)
    torch.testing.assert_close(scaled_dot_product_attention(*positional), expected)


@pytest.mark.parametrize(("n", "keys"), [(4, 4), (3, 7), (7, 3)], ids=str)
def test_causal_with_a_mask_and_a_query_that_sees_nothing(n, keys):
    q, k, v = rand(2, 2, n, 8), rand(2, 2, keys, 8, seed=1), rand(2, 2, keys, 8, seed=2)
    mask = rand(n, keys, seed=3) > -0.5
    mask[1] = False
    y = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    both = mask & torch.ones(n, keys, dtype=torch.bool).tril()
    assert_close(y, formula(q.double(), k.double(), v.double(), both), formula(q, k, v, both))
    assert (y[:, :, 1] == 0).all()


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_gradients(mask):
    tensors = [rand(2, h, n, 8, seed=n) for h, n in ((4, 6), (2, 9), (2, 9))]
    options = {"enable_gqa": True, "is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = rand(6, 9) > 0
    if mask == "float":
        tensors.append(rand(4, 6, 9))

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = function(*leaves, **options)
        return torch.autograd.grad(y, leaves, rand(*y.shape, seed=5).to(dtype))

    actual = gradients(scaled_dot_product_attention, torch.float32)
    exact, own = (gradients(formula, dtype) for dtype in (torch.float64, torch.float32))
    for a, e, b in zip(actual, exact, own, strict=True):
        # The last place of the log-sum-exp, which is below 8 here, is a factor of all weights.
        assert_close(a, e, b, floor=8 * EPS[torch.float32] * max(e.abs().max().item(), 1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"value": rand(2, 3, 5, 4)}, "value has another width than query, 4 and 8"),
        ({n: rand(2, 3, 5, 300) for n in ("query", "key", "value")}, "query is 300 wide"),
        ({n: rand(2, 3, 5, 8).double() for n in ("query", "key", "value")}, "query is .*float64"),
    ],
    ids=["dropout", "width of value", "width", "dtype"],
)
def test_what_pytorch_serves(change, why):
    arguments = {n: rand(2, 3, 5, 8, seed=i) for i, n in enumerate(("query", "key", "value"))}
    arguments |= change
    with pytest.warns(UserWarning, match=f"PyTorch's own serves: {why}"):
        y = scaled_dot_product_attention(**arguments)
    assert torch.equal(y, F.scaled_dot_product_attention(**arguments))
    with pytest.raises(ValueError, match=f"backend 'cpu' was asked for, but {why}"):
        scaled_dot_product_attention(**arguments, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.nested.nested_tensor([rand(3, 8), rand(2, 8)])},
            "query: expected a dense",
        ),
        (
            {"value": rand(5, 8).to_sparse()},
            "value: expected a dense tensor, got a torch.sparse_coo",
        ),
        ({"key": rand(8)}, r"key: expected \[..., H, S, E\], got \[8\]"),
        ({"key": rand(2, 3, 4, 8)}, r"value \[..., S, Ev\], got"),
        ({"key": rand(2, 3, 5, 7)}, r"key \[..., S, E\]"),
        ({"value": rand(2, 3, 5, 8).half()}, "of one dtype"),
        ({"key": rand(2, 2, 5, 8), "value": rand(2, 2, 5, 8)}, "as many heads .* got 3, 2 and 2"),
        ({"key": rand(2, 2, 5, 8), "enable_gqa": True}, "divisors of the 3 heads"),
        ({"query": rand(3, 3, 5, 8)}, "leading dimensions that broadcast"),
        ({"attn_mask": torch.ones(5, 5).int()}, "attn_mask: expected bool, float32 or"),
        ({"attn_mask": torch.ones(5)}, "attn_mask: expected"),
        ({"attn_mask": torch.ones(4, 5)}, "broadcasts to"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict.fromkeys(("query", "key", "value"), rand(2, 3, 5, 8)) | change
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(**arguments)


def test_sdpa_is_for_the_block_and_the_thread():
    q = rand(2, 3, 5, 8)
    seen = []

    def attend():
        # The emulator has no kernel for float32: who is asked is who complains.
        try:
            F.scaled_dot_product_attention(q, q, q)
            seen.append("torch")
        except BackendError:
            seen.append("pyllm")

    with use("cuda"):
        attend()
        with pyllm.sdpa():
            attend()
            thread = threading.Thread(target=attend)
            thread.start()
            thread.join()
        attend()
    with pyllm.sdpa(backend="cuda"):
        attend()
    assert seen == ["torch", "pyllm", "torch", "torch", "pyllm"]
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = rand(2, 5, 16)
    with pyllm.sdpa():
        y = layer(x)
    torch.testing.assert_close(y, layer(x))


def test_sdpa_compiles():
    def block(q, k):
        return F.scaled_dot_product_attention(q.sin(), k, k, is_causal=True).exp()

    def inside(q, k):
        with pyllm.sdpa():
            return block(q, k)

    def graph_targets(function):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        y = torch.compile(function, fullgraph=True, backend=backend)(q, k)
        torch.testing.assert_close(y, block(q, k))
        return [str(node.target) for node in graphs[0].graph.nodes]

    q, k = rand(2, 3, 5, 8), rand(2, 3, 7, 8, seed=1)
    assert "pyllm.flash_attention.default" in graph_targets(inside)
    assert not any("pyllm" in target for target in graph_targets(block))
    with pyllm.sdpa():
        assert "pyllm.flash_attention.default" in graph_targets(block)
