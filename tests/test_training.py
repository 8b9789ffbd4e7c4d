"""A small model trained with pyllm's ops and with PyTorch's: the loss curves agree."""

import pytest
import torch
import torch.nn.functional as F
from cases import rand
from compare import assert_close

from pyllm import ops

VOCAB, WIDTH, HEADS, LAYERS, STEPS = 23, 32, 4, 2, 200


class Torch:
    """What the model needs, by PyTorch."""

    @staticmethod
    def embedding(ids, weight):
        return F.embedding(ids.long(), weight)

    @staticmethod
    def rms_norm(x, weight, eps, residual):
        return F.rms_norm(x + residual, weight.shape, weight, eps), x + residual

    @staticmethod
    def layer_norm(x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def matmul(x, weight, bias=None):
        return F.linear(x, weight, bias)

    @staticmethod
    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    @staticmethod
    def silu_mul(gate, up):
        return F.silu(gate) * up


class Pyllm:
    embedding, layer_norm, matmul, silu_mul = (
        ops.embedding, ops.layer_norm, ops.matmul, ops.silu_mul,
    )  # fmt: skip

    @staticmethod
    def rms_norm(x, weight, eps, residual):
        return ops.rms_norm(x, weight, eps, residual=residual)

    @staticmethod
    def attention(q, k, v):
        return ops.flash_attention(q, k, v, causal=True)


def parameters(dtype):
    shapes = {"embedding": (VOCAB, WIDTH), "weight": (WIDTH,), "bias": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"{i} qkv": (WIDTH * 2, WIDTH), f"{i} out": (WIDTH, WIDTH), f"{i} norm": (WIDTH,),
            f"{i} norm 2": (WIDTH,), f"{i} up": (96, WIDTH), f"{i} down": (WIDTH, 48),
        }  # fmt: skip
    p = {n: rand(*s, seed=i, scale=s[-1] ** -0.5) for i, (n, s) in enumerate(shapes.items())}
    for name in p:
        if "norm" in name or name == "weight":
            p[name] = torch.ones(WIDTH)
    return {name: x.to(dtype).requires_grad_() for name, x in p.items()}


def loss_of(o, p, ids):
    """A decoder with grouped heads and a gated unit, its embedding shared with the head."""
    batch, n = ids.shape
    h = o.embedding(ids.flatten(), p["embedding"]).view(batch, n, WIDTH)
    delta = torch.zeros_like(h)
    for i in range(LAYERS):
        y, h = o.rms_norm(delta, p[f"{i} norm"], 1e-5, residual=h)
        qkv = o.matmul(y, p[f"{i} qkv"]).view(batch, n, 2 * HEADS, WIDTH // HEADS)
        q, k, v = qkv.split([HEADS, HEADS // 2, HEADS // 2], dim=2)
        delta = o.matmul(o.attention(q, k, v).reshape(batch, n, WIDTH), p[f"{i} out"])
        y, h = o.rms_norm(delta, p[f"{i} norm 2"], 1e-5, residual=h)
        delta = o.matmul(o.silu_mul(*o.matmul(y, p[f"{i} up"]).chunk(2, -1)), p[f"{i} down"])
    y = o.layer_norm(h + delta, p["weight"], p["bias"], 1e-5)
    logits = o.matmul(y, p["embedding"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].long().flatten())


def losses(o, dtype=torch.float32, step=loss_of):
    p = parameters(dtype)
    optimizer = torch.optim.AdamW(p.values(), lr=3e-3)
    # Sequences that count in steps of 1 to 4: what comes next can be learned.
    generator = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(STEPS):
        begin = torch.randint(0, VOCAB, (8, 1), generator=generator)
        stride = torch.randint(1, 5, (8, 1), generator=generator)
        ids = ((begin + stride * torch.arange(12)) % VOCAB).int()
        loss = step(o, p, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other at every small op make this slow beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loss_curves_agree():
    actual, own, exact = losses(Pyllm), losses(Torch), losses(Torch, torch.float64)
    assert exact[-10:].mean() < 0.3 * exact[0]
    assert_close(actual, exact, own)


def test_the_compiled_step_trains_alike():
    compiled = torch.compile(
        lambda p, ids: loss_of(Pyllm, p, ids), fullgraph=True, backend="aot_eager"
    )
    actual = losses(Pyllm, step=lambda o, p, ids: compiled(p, ids))
    own, exact = losses(Torch), losses(Torch, torch.float64)
    assert_close(actual, exact, own)
