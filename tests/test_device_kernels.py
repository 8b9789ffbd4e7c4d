"""A whole model by the kernels of a device: CUDA C++ by the emulator, Triton by its interpreter."""

import pytest
import torch
from fake_gpu import World
from test_device import answers, on_device, prompts
from tiny_models import tiny_gguf

from pyllm import LLM
from pyllm.ops import device
from pyllm.runtime.lookup import PromptLookup

WHY_NOT = device.missing("triton", "cpu")
KERNELS = ["emulator,triton,reference", "triton,emulator,reference"]
executed = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", context=512)


def near_ties(reference, prompt, token_ids, eps):
    """How many tokens are not the reference's first choice, all of them but for rounding."""
    logits = reference.logits([*prompt, *token_ids])[len(prompt) - 1 : -1]
    gaps = logits.amax(1) - logits[torch.arange(len(token_ids)), token_ids]
    assert (gaps <= 4 * eps * logits.abs().amax(1)).all()
    return int((gaps > 0).sum())


@executed
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_kernels_write(monkeypatch, path, kernels, dtype):
    """Captured and replayed, each token is what PyTorch in the same dtype takes."""
    world = World(plans=False).install(monkeypatch)
    llm = on_device(monkeypatch, world, path, True, backend=kernels, dtype=dtype)
    assert llm.engine.replay
    found = [ids for ids, _, _ in answers(llm, prompts(2), max_new_tokens=5)]
    assert (world.captures, world.replays) == (1, 4)
    reference = on_device(monkeypatch, world, path, True, backend="reference", dtype=dtype)
    assert not reference.engine.replay
    eps = torch.finfo(getattr(torch, dtype)).eps
    pairs = zip(prompts(2), found, strict=True)
    assert sum(near_ties(reference, prompt, ids, eps) for prompt, ids in pairs) <= 2


@executed
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_kernels_in_every_way(monkeypatch, path, kernels):
    """The same tokens alone or in a batch, in chunks, from cached pages, guessed, sampled."""
    world = World(3, plans=False).install(monkeypatch)
    options = {"backend": kernels, "dtype": "float16"}
    llm = on_device(monkeypatch, world, path, True, **options)
    several, new = [[20, 21, 22, 23] * 9, prompts(1)[0]], {"max_new_tokens": 4}
    (first, _, _), second = expected = answers(llm, several, **new)
    assert answers(llm, several[1:], **new) == [second]

    def half_right(lookup, token_ids, room):
        known = len(token_ids) - len(several[0])
        return [*first[known : known + 1], 0][:room]

    monkeypatch.setattr(PromptLookup, "draft", half_right)
    again = llm.generate(several[0], ignore_eos=True, prompt_lookup_num_tokens=3, **new)
    assert again.usage.cached_tokens == 32
    assert again.usage.drafted_tokens > again.usage.accepted_tokens > 0
    assert again.token_ids == first
    chunked = on_device(monkeypatch, world, path, True, max_tokens=16, **options)
    assert answers(chunked, several, **new) == expected
    sampled = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5, **new}
    assert answers(chunked, several, **sampled)[1:] == answers(llm, several[1:], **sampled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kernels", ["cuda,triton,reference", "triton,cuda,reference"])
def test_a_gpu_writes(path, kernels, dtype):
    """As above, with nothing in the place of the GPU; and nothing is captured while it serves."""
    options = {"device": "cuda", "dtype": dtype, "max_context": 256, "max_batch": 4}
    llm = LLM(path, backend=kernels, **options)
    assert llm.warm_up() == 3
    several = answers(llm, prompts(3), max_new_tokens=8)
    assert answers(llm, prompts(3)[2:], max_new_tokens=8) == several[2:]
    assert len(llm.engine._graphs) == 3
    reference = LLM(path, backend="reference", **options)
    eps = torch.finfo(getattr(torch, dtype)).eps
    pairs = zip(prompts(3), several, strict=True)
    assert sum(near_ties(reference, prompt, ids, eps) for prompt, (ids, _, _) in pairs) <= 4
