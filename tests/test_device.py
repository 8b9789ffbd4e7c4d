"""The engine on a device: the same tokens, with steps under way while Python goes on.

There need not be a GPU: see fake_gpu.py.
"""

import pytest
import torch
from fake_gpu import CaptureRefused, FakeGpu, World
from tiny_models import VOCAB, tiny_gguf, tiny_hf

from pyllm import LLM
from pyllm.runtime import engine as engine_module
from pyllm.runtime import llm as llm_module
from pyllm.runtime.device import Gpu, Processor, bucket, buckets, find_device


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", context=512)


@pytest.fixture(scope="module")
def plain(path):
    return LLM(path, max_context=256, max_batch=16)


@pytest.fixture(params=[True, 1, 2], ids=["late", "sometimes", "other times"])
def world(request, monkeypatch):
    return World(request.param).install(monkeypatch)


def on_device(monkeypatch, world, path, halves=False, **options):
    monkeypatch.setattr(llm_module, "find_device", lambda _: FakeGpu(world, halves))
    options = {"max_context": 256, "max_batch": 16, "dtype": "float16", **options}
    return LLM(path, **options)


def prompts(n, length=9):
    generator = torch.Generator().manual_seed(n)
    return [
        torch.randint(3, VOCAB, (length + 5 * i,), generator=generator).tolist() for i in range(n)
    ]


def answers(llm, prompts, **arguments):
    arguments = {"max_new_tokens": 24, "ignore_eos": True, **arguments}
    return [(c.token_ids, c.finish_reason, c.logprobs) for c in llm.generate(prompts, **arguments)]


@pytest.mark.parametrize("n", [1, 3, 11])
def test_the_same_tokens(monkeypatch, world, path, plain, n):
    llm = on_device(monkeypatch, world, path)
    for arguments in ({}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}):
        assert answers(llm, prompts(n), **arguments) == answers(plain, prompts(n), **arguments)
    assert llm.engine.cache.n_free == llm.engine.cache.n_pages


def test_steps_overlap(monkeypatch, path, plain):
    """While decoding goes on, each step is begun before the one before has been waited for."""
    world = World().install(monkeypatch)
    llm = on_device(monkeypatch, world, path)
    begun, finish = [], llm.engine._finish

    def counted(step):
        begun.append(llm.engine._under_way is not None)
        finish(step)

    monkeypatch.setattr(llm.engine, "_finish", counted)
    assert answers(llm, prompts(3), max_new_tokens=40) == answers(
        plain, prompts(3), max_new_tokens=40
    )
    assert sum(begun) >= 36
    assert world.replays >= 38
    assert world.captures == 1  # a graph of four sequences, of which one is padding


def test_nothing_is_captured_while_serving_what_was_warmed_up(monkeypatch, world, path, plain):
    llm = on_device(monkeypatch, world, path)
    assert llm.warm_up() == world.captures == len(buckets(16)) == 5
    assert llm.warm_up() == world.captures == 5  # once is enough
    for n in (1, 3, 11):
        assert answers(llm, prompts(n)) == answers(plain, prompts(n))
    assert world.captures == 5
    assert llm.engine.cache.n_free == llm.engine.cache.n_pages


def test_more_sizes_than_are_kept_by_themselves_are_kept_when_warmed_up(monkeypatch, path):
    world = World().install(monkeypatch)
    monkeypatch.setattr(engine_module, "MAX_GRAPHS", 2)
    llm = on_device(monkeypatch, world, path)
    assert llm.warm_up() == 5
    answers(llm, prompts(3))
    assert world.captures == 5


def test_on_the_processor_there_is_nothing_to_warm_up(plain):
    assert plain.warm_up() == 0


def test_numbers_of_sequences_are_padded():
    sizes = sorted({bucket(n) for n in range(1, 50)})
    assert sizes == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56]
    assert all(0 <= bucket(n) - n < max(n, 8) for n in range(1, 300))


def test_sequences_come_and_go(monkeypatch, world, path, plain):
    """Answers of other lengths, ended by tokens that nobody can foresee."""
    llm = on_device(monkeypatch, world, path, max_batch=3)
    whole = [ids for ids, _, _ in answers(plain, prompts(9))]
    stops = tuple(ids[4 + i % 7] for i, ids in enumerate(whole))
    arguments = {"stop_token_ids": stops}
    expected = answers(plain, prompts(9), **arguments)
    assert len({len(ids) for ids, _, _ in expected}) > 2
    assert answers(llm, prompts(9), **arguments) == expected
    assert answers(llm, prompts(9), **arguments) == expected  # with what the cache remembers now
    arguments = {"repetition_penalty": 1.3, "stop_token_ids": stops}
    assert answers(llm, prompts(9), **arguments) == answers(plain, prompts(9), **arguments)
    assert llm.engine.cache.n_free == llm.engine.cache.n_pages


def test_a_request_starts_at_once(monkeypatch, world, path):
    llm = on_device(monkeypatch, world, path)
    first = llm.stream(prompts(1)[0], max_new_tokens=40, ignore_eos=True)
    next(first)
    llm.engine.step()
    second = llm.stream(prompts(2)[1], max_new_tokens=40, ignore_eos=True)
    llm.engine.step()
    assert second.completion.usage.completion_tokens == 0
    llm.engine.step()
    assert second.completion.usage.completion_tokens == 1


def test_what_hangs_on_tokens(monkeypatch, world, path, plain):
    """Penalties, guesses and the likeliest tokens, beside plain sequences."""
    llm = on_device(monkeypatch, world, path)
    ways = [
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "temperature": 0.8, "seed": 1},
        {"prompt_lookup_num_tokens": 5},
        {"logprobs": 3},
        {"logprobs": 0},
        {},
    ]
    loop = [20, 21, 22, 23] * 6
    for way in ways:
        assert answers(llm, [loop, loop[1:]], **way) == answers(plain, [loop, loop[1:]], **way)
    streams = [llm.stream(loop, max_new_tokens=30, ignore_eos=True, **way) for way in ways]
    for stream in streams:
        next(stream)
    for stream, way in zip(streams, ways, strict=True):
        "".join(stream)
        expected = plain.generate(loop, max_new_tokens=30, ignore_eos=True, **way)
        assert stream.completion.token_ids == expected.token_ids
        assert stream.completion.text == expected.text


def test_prefill_in_chunks(monkeypatch, world, path, plain):
    llm = on_device(monkeypatch, world, path, max_tokens=16)
    assert answers(llm, prompts(4, 40)) == answers(plain, prompts(4, 40))
    tokens = prompts(1, 50)[0]
    assert torch.equal(llm.logits(tokens), plain.logits(tokens))


def test_too_few_pages(monkeypatch, world, path, plain):
    """Sequences give their pages up and start again, while steps are under way."""
    llm = on_device(monkeypatch, world, path, max_context=128, max_batch=4)
    taken = []
    llm.engine.cache.extend(taken, (llm.engine.cache.n_free - 5) * 32)
    arguments = {"max_new_tokens": 50}
    assert answers(llm, prompts(4), **arguments) == answers(plain, prompts(4), **arguments)


def test_full_context_and_limits(monkeypatch, world, path, plain):
    llm = on_device(monkeypatch, world, path, max_context=64)
    for n in (1, 2, 3):
        assert answers(llm, prompts(2), max_new_tokens=n) == answers(
            plain, prompts(2), max_new_tokens=n
        )
    ids, reason, _ = answers(llm, prompts(1), max_new_tokens=None)[0]
    assert (len(ids) + len(prompts(1)[0]), reason) == (64, "length")


def test_leaving_early(monkeypatch, world, path, plain):
    llm = on_device(monkeypatch, world, path)
    expected = answers(plain, prompts(2))
    for n in range(1, 5):
        with llm.stream(prompts(1)[0], max_new_tokens=50, ignore_eos=True) as stream:
            for _ in range(n):
                next(stream)
            other = llm.stream(prompts(2)[1], max_new_tokens=24, ignore_eos=True)
            next(other)
        "".join(other)
        assert other.completion.token_ids == expected[1][0]
        assert answers(llm, prompts(2)) == expected
        assert llm.engine.cache.n_free == llm.engine.cache.n_pages


def test_keys_and_values_fit_into_memory(monkeypatch, path):
    world = World().install(monkeypatch)
    token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head dim, bytes
    for room, memory in ((300, 300 * token), (2048, 1e9)):
        monkeypatch.setattr(llm_module, "find_device", lambda _, m=memory: FakeGpu(world, memory=m))
        llm = LLM(path, max_context=256)
        assert room - 64 < llm.engine.cache.n_pages * 32 <= room
    monkeypatch.setattr(llm_module, "find_device", lambda _: FakeGpu(world, memory=300 * token))
    with pytest.raises(ValueError, match=r"max_context: 301 tokens take .* room for 268 tokens"):
        LLM(path, max_context=301)


def test_eager_too(monkeypatch, world, path, plain):
    llm = on_device(monkeypatch, world, path, replay=False)
    assert answers(llm, prompts(3)) == answers(plain, prompts(3))
    assert world.captures == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_family_computes_in_halves(monkeypatch, tmp_path, kind):
    """Weights of floats, with biases or norms of the heads: in the dtype that the file is in."""
    model = tiny_hf(tmp_path / kind, kind, dtype="bfloat16")
    world = World(plans=False).install(monkeypatch)
    llm = on_device(monkeypatch, world, model, True, dtype=None, backend="reference")
    weights = [llm.model.embed.weight, *llm.model.head.weights]
    weights += [w for block in llm.model.blocks for w in block.mlp.gate_up.weights]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert llm.engine.cache.layers[0][0].dtype == torch.bfloat16
    monkeypatch.setattr(llm_module, "find_device", find_device)
    tokens = prompts(1, 30)[0]
    exact, half = LLM(model, max_context=256).logits(tokens), llm.logits(tokens)
    assert (half - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_dtypes_of_a_device(monkeypatch, path):
    world = World(plans=False).install(monkeypatch)
    llm = on_device(monkeypatch, world, path, True, dtype=None, backend="reference")
    assert llm.model.embed.dtype == torch.bfloat16  # a GGUF file does not say
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got 'float32'"):
        on_device(monkeypatch, world, path, True, dtype="float32")


REFUSED = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: x if x.any() else None,
    "int": lambda x: int(x[0]),
    "numpy": lambda x: x.numpy(),
    "tensor": lambda x: x + torch.tensor([1.0, 2.0]),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "repeats": lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.long)),
    "wait": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_capture_refuses(monkeypatch, name):
    world = World(plans=False).install(monkeypatch)
    device, x, calls = FakeGpu(world), torch.ones(2), []

    def step():
        calls.append(1)
        return REFUSED[name](x) if len(calls) > 1 else x

    with pytest.raises(CaptureRefused):
        device.capture(step)
    assert device.capture(lambda: x * 2).replay().tolist() == [2, 2]  # and leaves nothing behind


def test_memory_that_the_warm_up_did_not_see_is_refused(monkeypatch):
    world = World(plans=False).install(monkeypatch)
    x, others = torch.ones(2), [torch.ones(2), torch.ones(2)]
    with pytest.raises(CaptureRefused, match="memory that the warm-up had not touched"):
        FakeGpu(world).capture(lambda: x + others.pop())


def test_a_replay_reads_buffers_and_nothing_else(monkeypatch):
    world = World(plans=False).install(monkeypatch)
    x, factor = torch.ones(3), [2.0]

    def step():
        y = x * factor[0]
        return y.view(3, 1) + 1, torch.relu_(y[1:] - 5)

    graph = FakeGpu(world).capture(step)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    factor[0] = 100.0
    first, second = graph.replay()
    assert first.flatten().tolist() == [3, 5, 7]
    assert second.tolist() == [0, 1]


def test_devices_by_name(monkeypatch):
    assert isinstance(find_device(None), Processor)
    assert isinstance(find_device("cpu"), Processor)
    for name in ("gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "tpu:0"):
        with pytest.raises(ValueError, match="device: expected 'cpu', 'cuda' or 'cuda:1'"):
            find_device(name)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match="needs a PyTorch built for GPUs"):
        find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PYLLM_DEVICE", "cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:1' was asked for, but PyTorch finds no GPU"):
        find_device(None)
    World().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="expected 'cuda:0' to 'cuda:1', got 'cuda:2'"):
        find_device("cuda:2")
    assert isinstance(find_device(None), Gpu)
    assert find_device("cuda").torch_device == torch.device("cuda:0")
