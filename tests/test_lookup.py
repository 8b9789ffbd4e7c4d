"""Prompt lookup: what is guessed, and that guesses never change an answer."""

from itertools import zip_longest

import pytest

from pyllm import LLM
from pyllm.runtime.lookup import MAX_PAUSE, PromptLookup
from pyllm.runtime.sampling import SamplingParams

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading."
)
REPEAT = f"{TEXT}\n\n{TEXT}\n\nAlice was beginning to get"
LOOP = "one two three one two three one two"
STORY = "Once upon a time, there was a little girl who"


@pytest.fixture(scope="module")
def llm(smollm2):
    return LLM(smollm2, max_context=1024)


def compare(llm, prompts, k=7, accepts=True, **arguments):
    """Generates with and without guesses; returns the answer with, if all is the same."""
    plain = llm.generate(prompts, **arguments)
    guessed = llm.generate(prompts, prompt_lookup_num_tokens=k, **arguments)
    for p, g in zip(_list(plain), _list(guessed), strict=True):
        assert g.token_ids == p.token_ids
        assert g.text == p.text
        assert g.finish_reason == p.finish_reason
        assert g.logprobs == p.logprobs  # floats, equal bit for bit
        assert p.usage.drafted_tokens == p.usage.accepted_tokens == 0
        assert g.usage.drafted_tokens >= g.usage.accepted_tokens
        assert g.usage.completion_tokens == len(g.token_ids)
    if accepts:
        assert sum(g.usage.accepted_tokens for g in _list(guessed)) > 0
    assert llm.engine.cache.n_free == llm.engine.cache.n_pages
    return guessed


def _list(x):
    return x if isinstance(x, list) else [x]


@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_greedy(llm, k):
    """Long enough to cross pages of 32 tokens at many offsets."""
    answer = compare(llm, REPEAT, k, max_new_tokens=100, ignore_eos=True)
    assert answer.usage.accepted_tokens > 30


def test_sampling(llm):
    usages = []
    for seed in range(4):
        sampled = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": seed}
        answer = compare(llm, REPEAT, max_new_tokens=60, ignore_eos=True, **sampled)
        usages.append(answer.usage)
        assert answer.usage.accepted_tokens > 0
    assert sum(u.drafted_tokens for u in usages) > sum(u.accepted_tokens for u in usages)


def test_batch(llm):
    prompts = [REPEAT, STORY, LOOP, TEXT, REPEAT[:300], "Water boils at", LOOP * 2, "1, 2, 3, 4,"]
    compare(llm, prompts, max_new_tokens=40)
    compare(llm, prompts, max_new_tokens=24, temperature=1.0, min_p=0.05, seed=3)


def test_beside_plain_sequences(llm):
    """Three streams take turns: one guesses, one does not, and one is penalized."""
    ways = [
        (REPEAT, {"prompt_lookup_num_tokens": 5}),
        (LOOP, {}),
        (LOOP, {"repetition_penalty": 1.3}),
    ]
    ways = [(prompt, {**way, "max_new_tokens": 50}) for prompt, way in ways]
    expected = [
        llm.generate(p, **{**way, "prompt_lookup_num_tokens": None}).token_ids for p, way in ways
    ]
    streams = [llm.stream(prompt, **way) for prompt, way in ways]
    for _ in zip_longest(*streams):
        pass
    assert [s.completion.token_ids for s in streams] == expected
    assert [s.completion.usage.accepted_tokens > 0 for s in streams] == [True, False, False]


def test_logprobs(llm):
    compare(llm, REPEAT, max_new_tokens=40, logprobs=3)


def test_penalized_requests_do_not_guess(llm):
    for penalty in ({"repetition_penalty": 1.2}, {"presence_penalty": 0.5}):
        answer = compare(llm, LOOP, accepts=False, max_new_tokens=30, **penalty)
        assert answer.usage.drafted_tokens == 0


def test_limit_and_stop_strings_inside_a_draft(llm):
    """The same answer ended in many places, which then come first, amid or last in a draft."""
    text = llm.generate(REPEAT, max_new_tokens=40).text
    for n in range(1, 40, 3):
        compare(llm, REPEAT, accepts=n > 8, max_new_tokens=n)
        stop = text[3 * n : 3 * n + 9]
        answer = compare(llm, REPEAT, accepts=n > 8, max_new_tokens=60, stop_strings=stop)
        assert answer.finish_reason == "stop"
        assert answer.text == text[: text.index(stop)]


def test_stop_token_inside_a_draft(llm):
    """Of a text that repeats itself, a token that occurs only in the middle of it."""
    prompt = llm.tokenizer.encode(REPEAT)
    whole = llm.generate(prompt, max_new_tokens=40, prompt_lookup_num_tokens=7)
    for at in range(8, 20):
        token = whole.token_ids[at]
        answer = compare(llm, prompt, accepts=False, max_new_tokens=40, stop_token_ids=token)
        assert answer.token_ids[-1] == token
    assert answer.usage.accepted_tokens > 0


def test_full_context(smollm2, llm):
    ids = llm.tokenizer.encode(f"{LOOP} three {LOOP}")
    for room in range(1, 20, 3):
        short = LLM(smollm2, max_context=len(ids) + room)
        answer = compare(short, ids, accepts=room > 4, ignore_eos=True)
        assert len(answer.token_ids) == room
        assert answer.finish_reason == "length"


def test_preempted_sequences_lose_nothing(smollm2, llm):
    """A cache too small for all of them at once: some give their pages up and start again."""
    small = LLM(smollm2, max_context=160, max_batch=4)
    prompts = [LOOP, TEXT, STORY, f"{LOOP} three"]
    arguments = {"max_new_tokens": 80, "ignore_eos": True}
    expected = [a.token_ids for a in llm.generate(prompts, **arguments)]
    held = []
    small.engine.cache.extend(held, (small.engine.cache.n_free - 8) * 32)
    answers = small.generate(prompts, prompt_lookup_num_tokens=7, **arguments)
    assert [a.token_ids for a in answers] == expected
    assert sum(a.usage.accepted_tokens for a in answers) > 0


def test_only_accepted_tokens_are_remembered(smollm2):
    """Guesses fill pages; a later prompt that has them as its tokens must not find these pages."""
    llm = LLM(smollm2, max_context=512)
    sampled = {"temperature": 1.0, "max_new_tokens": 100, "ignore_eos": True}
    remembered = set()
    real = llm.engine.cache.remember

    def remember(pages, token_ids, done, n_tokens):
        assert n_tokens <= len(token_ids)
        remembered.update(tuple(token_ids[:i]) for i in range(32, n_tokens + 1, 32))
        real(pages, token_ids, done, n_tokens)

    llm.engine.cache.remember = remember
    prompts = [llm.tokenizer.encode(f"{i}. {REPEAT}") for i in range(3)]  # no page in common
    answers = [llm.generate(p, seed=1, prompt_lookup_num_tokens=7, **sampled) for p in prompts]
    assert sum(a.usage.drafted_tokens - a.usage.accepted_tokens for a in answers) > 10
    texts = [[*p, *a.token_ids] for p, a in zip(prompts, answers, strict=True)]
    assert remembered == {tuple(t[:i]) for t in texts for i in range(32, len(t), 32)}
    # And what these pages hold is what a fresh cache would.
    fresh = LLM(smollm2, max_context=512)
    for text in texts:
        again = llm.generate(text, max_new_tokens=8, logprobs=0)
        assert again.usage.cached_tokens == (len(text) - 1) // 32 * 32
        assert again.logprobs == fresh.generate(text, max_new_tokens=8, logprobs=0).logprobs


def test_bad_argument():
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: expected an integer from 0"):
        SamplingParams(prompt_lookup_num_tokens=-1)


def test_draft():
    def draft(max_tokens, ids, room=9):
        lookup = PromptLookup(max_tokens)
        while max_tokens > 1 and lookup._length < max_tokens:
            lookup.update(lookup._length, lookup._length)
        return lookup.draft(ids, room)

    assert draft(4, [1, 2, 3]) == []
    ids = [5, 1, 2, 3, 7, 9, 9, 2, 3, 8, 1, 2, 3]
    # Three tokens that fit go before two that fit later.
    assert draft(3, ids) == [7, 9, 9]
    assert draft(2, ids) == [7, 9]
    assert draft(3, ids, room=1) == [7]
    assert draft(3, [4, 2, 3, 5, 2, 3, 6, 2, 3]) == [6, 2, 3]  # the latest
    assert draft(5, [1, 2, 1, 2]) == [1, 2, 1, 2, 1]  # beyond the end
    grown = PromptLookup(1)
    for n in range(1, len(ids)):
        grown.draft(ids[:n], 9)
    assert grown.draft(ids, 9) == [7]


def test_length_and_pauses():
    ids = [1, 2, 3] * 20
    lookup = PromptLookup(10)
    lengths = []
    for right in (True, True, True, True, False, False, False):
        lengths.append(len(lookup.draft(ids, 99)))
        lookup.update(lengths[-1], lengths[-1] if right else 1)
    assert lengths == [3, 7, 10, 10, 10, 5, 2]
    pauses = [0]
    while len(pauses) < 8:
        if draft := lookup.draft(ids, 99):
            lookup.update(len(draft), 0)
            pauses.append(0)
        else:
            pauses[-1] += 1
    assert pauses == [0, 0, 1, 3, 7, 15, MAX_PAUSE, 0]
    while not lookup.draft(ids, 99):
        pass
    lookup.update(1, 1)
    assert len(lookup.draft(ids, 99)) == 3
