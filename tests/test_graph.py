"""Capture and replay."""

import gc
import random

import pytest
import torch
from cases import rand

from pyllm.ops import relu, rms_norm, silu_mul
from pyllm.runtime.graph import Arena, CaptureError, capture


def step(x, weight):
    y, total = rms_norm(x, weight, residual=x)
    half = y.shape[-1] // 2
    z = silu_mul(y[:, :half], y[:, half:])
    return relu(z), total


def test_replay_equals_eager_bit_for_bit():
    x, weight = rand(5, 64), rand(64, seed=1)
    graph = capture(lambda: step(x, weight), Arena())
    for seed in range(3):
        x.copy_(rand(5, 64, seed=seed))
        for replayed, eager in zip(graph.replay(), step(x, weight), strict=True):
            assert torch.equal(replayed, eager)


def test_memory_is_reused_and_the_result_is_the_same():
    x, weight = rand(3, 32), rand(32, seed=1)

    def deep(x):
        for _ in range(50):
            x = rms_norm(x, weight)
        return x

    arena = Arena()
    graph = capture(lambda: deep(x), arena)
    gc.collect()
    assert arena.nbytes <= 3 * 1024
    assert torch.equal(graph.replay(), deep(x))


def test_a_view_keeps_its_memory():
    x, weight = rand(2, 32), rand(32, seed=1)

    def tricky():
        view = rms_norm(x, weight)[:, 4:20]  # the tensor itself is gone, its storage must not be
        for _ in range(4):
            rms_norm(x, weight, 1.0)
        return relu(view)

    graph = capture(tricky, Arena())
    assert torch.equal(graph.replay(), tricky())


@pytest.mark.parametrize(
    "compute", [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.clone(), lambda x: x.sum().item()]
)
def test_what_cannot_be_recorded_raises(compute):
    x = rand(2, 32)
    with pytest.raises(CaptureError, match="cannot be recorded"):
        capture(lambda: compute(x), Arena())
    assert torch.equal(relu(x), x.relu())  # and leaves nothing behind


def test_an_error_while_capturing_leaves_nothing_behind():
    x, weight = rand(2, 32), rand(31)
    with pytest.raises(ValueError, match="weight"):
        capture(lambda: rms_norm(x, weight), Arena())
    assert torch.equal(relu(x), x.relu())


def test_bytes_come_back_when_tensors_die():
    arena = Arena()
    a, b = arena.empty((100,), torch.float32), arena.empty((100,), torch.float32)
    kept = a[3:50]
    before = arena.nbytes
    del a, b
    c, d = arena.empty((10, 10), torch.bfloat16), arena.empty((256,), torch.float32)
    assert before < arena.nbytes < before + 1024  # b's bytes came back, a's have a view left
    pointers = {t.untyped_storage().data_ptr() for t in (kept, c, d)}
    assert len(pointers) == 3
    assert arena.empty((0, 4), torch.float32).shape == (0, 4)


def test_tensors_of_an_arena_never_overlap_and_all_gaps_close():
    arena, alive, rng = Arena(), {}, random.Random(0)
    arena._REGION = 4096  # so that there are several, some of them for one tensor
    for i in range(2000):
        if len(alive) > 20 or (alive and rng.random() < 0.5):
            value = rng.choice(list(alive))
            assert (alive.pop(value) == value).all()
        else:
            alive[i] = arena.empty((rng.choice([0, 1, 63, 700, 5000]),), torch.int32).fill_(i)
    for value, tensor in alive.items():
        assert (tensor == value).all()
        assert tensor.data_ptr() % 64 == 0
    most = arena.nbytes
    alive.clear()
    del tensor
    arena.empty((1,), torch.int32)  # what died is noticed on the next call
    assert len(arena._free) == len(arena._regions)
    assert arena.nbytes == most
