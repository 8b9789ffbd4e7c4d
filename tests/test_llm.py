"""The whole: a real model writes, and the same bits come out whichever way it is run."""

import pytest
import torch

from pyllm import LLM

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at",
    "In 1969, Neil Armstrong became the first person to",
    "To make bread you need flour,",
]


@pytest.fixture(scope="module")
def llm(smollm2):
    return LLM(smollm2, max_context=1024)


@pytest.fixture(scope="module")
def ids(llm):
    return [llm.tokenizer.encode(p) for p in PROMPTS]


def test_it_writes(llm):
    answer = llm.chat([{"role": "user", "content": "Why is the sky blue?"}])
    assert "light" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(answer.token_ids)


def test_alone_and_in_a_batch(llm, ids):
    alone = [llm.generate(p, max_new_tokens=20).token_ids for p in ids]
    together = llm.generate(ids, max_new_tokens=20)
    assert [c.token_ids for c in together] == alone


def test_replay_equals_eager(smollm2, llm, ids):
    eager = LLM(smollm2, max_context=1024, replay=False)
    for prompt in (ids[0], ids[:3]):
        a = llm.generate(prompt, max_new_tokens=12, logprobs=2)
        b = eager.generate(prompt, max_new_tokens=12, logprobs=2)
        for x, y in zip(_list(a), _list(b), strict=True):
            assert x.token_ids == y.token_ids
            assert x.logprobs == y.logprobs  # floats, equal bit for bit


def _list(x):
    return x if isinstance(x, list) else [x]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_equals_whole(smollm2, llm, chunk):
    tokens = llm.tokenizer.encode(" ".join(PROMPTS))
    chunked = LLM(smollm2, max_context=1024, max_batch=1, max_tokens=chunk)
    assert torch.equal(chunked.logits(tokens), llm.logits(tokens))


def test_decoding_equals_prefill(llm, ids):
    answer = llm.generate(ids[1], max_new_tokens=24, logprobs=0)
    tokens = [*ids[1], *answer.token_ids]
    logits = llm.logits(tokens)
    greedy = logits.argmax(-1)[len(ids[1]) - 1 : -1].tolist()
    assert answer.token_ids == greedy
    # Reported log-probabilities are those of these very logits.
    expected = torch.log_softmax(logits.double(), -1)
    for i, entry in enumerate(answer.logprobs):
        row = expected[len(ids[1]) - 1 + i]
        assert abs(entry.logprob - row[entry.token_id].item()) < 1e-5


def test_cached_prefix_changes_nothing(smollm2, llm):
    text = " ".join(PROMPTS)
    first = llm.generate(text, max_new_tokens=16)
    again = llm.generate(text, max_new_tokens=16)
    assert again.usage.cached_tokens > 0
    assert again.token_ids == first.token_ids
    fresh = LLM(smollm2, max_context=1024).generate(text, max_new_tokens=16)
    assert fresh.usage.cached_tokens == 0
    assert fresh.token_ids == first.token_ids


def test_preempted_sequences_lose_nothing(smollm2, llm, ids):
    """A cache too small for all of them at once: some give their pages up and start again."""
    small = LLM(smollm2, max_context=96, max_batch=4)
    small.engine.cache.extend([], 0)
    taken = []
    small.engine.cache.extend(taken, (small.engine.cache.n_free - 4) * 32)
    expected = llm.generate(ids[:4], max_new_tokens=60, ignore_eos=True)
    answers = small.generate(ids[:4], max_new_tokens=60, ignore_eos=True)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]


def test_sampling_is_reproducible_and_its_own(llm, ids):
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_new_tokens": 16}
    a = llm.generate(ids[0], **sampled)
    together = llm.generate(ids[:3], **sampled)
    assert together[0].token_ids == a.token_ids
    assert llm.generate(ids[0], **{**sampled, "seed": 8}).token_ids != a.token_ids


def test_stream_equals_generate(llm):
    whole = llm.generate(PROMPTS[1], max_new_tokens=40)
    stream = llm.stream(PROMPTS[1], max_new_tokens=40)
    assert "".join(stream) == whole.text
    assert stream.completion.token_ids == whole.token_ids


def test_streams_interleave(llm):
    whole = [llm.generate(p, max_new_tokens=20).text for p in PROMPTS[:2]]
    a, b = (llm.stream(p, max_new_tokens=20) for p in PROMPTS[:2])
    texts = [next(a), next(b)]
    texts[1] += "".join(b)
    texts[0] += "".join(a)
    assert texts == whole


def test_leaving_a_stream_early_gives_everything_back(llm):
    free = llm.engine.cache.n_free
    with llm.stream(PROMPTS[0], max_new_tokens=50) as stream:
        next(stream)
    assert llm.engine.cache.n_free == free
    assert not llm.engine.scheduler.running


def test_stop_string_and_limit(llm):
    whole = llm.generate(PROMPTS[1], max_new_tokens=30)
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 30
    word = whole.text.split()[5]
    stopped = llm.generate(PROMPTS[1], max_new_tokens=30, stop_strings=word)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(word)]
    token = whole.token_ids[3]
    by_id = llm.generate(PROMPTS[1], max_new_tokens=30, stop_token_ids=(token,))
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert llm.generate(PROMPTS[1], max_new_tokens=0).token_ids == []


def test_full_context_ends_with_length(smollm2):
    short = LLM(smollm2, max_context=24)
    answer = short.generate(PROMPTS[0], ignore_eos=True)
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 24


def test_repetition_penalty_acts(llm):
    plain = llm.generate(PROMPTS[0], max_new_tokens=60, ignore_eos=True)
    penalized = llm.generate(PROMPTS[0], max_new_tokens=60, ignore_eos=True, repetition_penalty=1.5)
    assert len(set(penalized.token_ids)) > len(set(plain.token_ids))


def test_bad_input(llm):
    with pytest.raises(ValueError, match="expected some text, got an empty string"):
        llm.generate("")
    with pytest.raises(ValueError, match="at least one token"):
        llm.generate([[]])
    with pytest.raises(ValueError, match=r"expected at most 1023 tokens \(max_context is 1024\)"):
        llm.generate([5] * 1024)
    with pytest.raises(ValueError, match="token ids from 0 to 49151, got 49152"):
        llm.generate([1, 49152])
    with pytest.raises(ValueError, match="token ids from 0 to 49151, got 'x'"):
        llm.generate([["x"]])
    with pytest.raises(ValueError, match="role"):
        llm.chat([{"role": "wizard", "content": "hello"}])
    with pytest.raises(ValueError, match="max_context: expected 1 to 8192"):
        LLM(llm.path, max_context=9000)


def test_the_reference_backend_writes_too(smollm2, llm, ids):
    """In plain PyTorch: the same answer, unless rounding decides between two tokens."""
    reference = LLM(smollm2, max_context=128, backend="reference")
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu"):
        LLM(smollm2, backend="fpga")
    ours = llm.generate(ids[0], max_new_tokens=3, logprobs=0)
    theirs = reference.generate(ids[0], max_new_tokens=3, logprobs=0)
    assert theirs.token_ids[0] == ours.token_ids[0]
    assert abs(theirs.logprobs[0].logprob - ours.logprobs[0].logprob) < 0.1


def test_progress_ends_at_the_whole(smollm2):
    seen = []
    LLM(smollm2, max_context=64, progress=lambda done, total: seen.append((done, total)))
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(total)) == 1
    assert 0.99 < done[-1] / total[-1] <= 1
