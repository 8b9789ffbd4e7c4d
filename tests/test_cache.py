"""Pages: who owns them, what is found again, and that none is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.runtime.cache import OutOfPages, PagedCache, cache_nbytes


def make(n_pages=8, page_size=4):
    return PagedCache(
        n_layers=2, n_pages=n_pages, page_size=page_size, kv_heads=1, head_dim=8,
        dtype=torch.float16,
    )  # fmt: skip


def compute(cache, tokens, pages=None):
    pages = cache.take_prefix(tokens) if pages is None else pages
    found = len(pages) * cache.page_size
    cache.extend(pages, len(tokens))
    cache.remember(pages, tokens, found, len(tokens))
    return pages, found


def test_layers_have_the_documented_shape_and_size():
    cache = make()
    assert cache.layers[0][0].shape == (8, 4, 1, 8)
    nbytes = sum(t.nbytes for layer in cache.layers for t in layer)
    sizes = {"n_layers": 2, "kv_heads": 1, "head_dim": 8, "dtype": torch.float16, "page_size": 4}
    assert cache_nbytes(n_tokens=32, **sizes) == nbytes
    assert cache_nbytes(n_tokens=29, **sizes) == nbytes


def test_all_or_nothing():
    cache = make(n_pages=3)
    pages = []
    cache.extend(pages, 9)
    with pytest.raises(OutOfPages):
        cache.extend([], 5)
    assert cache.n_free == 0
    assert sorted(pages) == [0, 1, 2]


def test_a_prefix_is_found_after_its_sequence_is_gone():
    cache = make()
    tokens = list(range(10))
    pages, found = compute(cache, tokens)
    assert found == 0
    first = list(pages)
    cache.release(pages)
    assert cache.n_free == 8
    again, found = compute(cache, [*tokens[:8], 99, 98, 97])
    assert found == 8
    assert again[:2] == first[:2]


def test_one_token_is_always_left_to_compute():
    cache = make()
    pages, _ = compute(cache, list(range(8)))
    cache.release(pages)
    assert len(cache.take_prefix(list(range(8)))) == 1


def test_pages_are_shared_while_in_use():
    cache = make()
    a, _ = compute(cache, list(range(9)))
    b, found = compute(cache, list(range(9)))
    assert found == 8
    assert a[:2] == b[:2]
    cache.release(a)
    with pytest.raises(OutOfPages):  # b still holds three pages of eight
        cache.extend([], 6 * 4)
    cache.release(b)
    assert cache.n_free == 8


def test_reused_pages_are_forgotten():
    cache = make(n_pages=2)
    pages, _ = compute(cache, list(range(8)))
    cache.release(pages)
    other, _ = compute(cache, list(range(100, 108)))
    cache.release(other)
    assert cache.take_prefix(list(range(9))) == []


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(0, 3)),
        max_size=25,
    )
)
@settings(deadline=None, max_examples=200)
def test_found_pages_hold_exactly_the_tokens(requests):
    """Whatever comes and goes: no page is lost or owned twice, and what is found is right."""
    cache = make(n_pages=6, page_size=2)
    contents = {}  # page -> the tokens up to and including it
    live = []
    for tokens, finish in requests:
        pages = cache.take_prefix(tokens)
        for i, page in enumerate(pages):
            assert contents[page] == tuple(tokens[: 2 * (i + 1)])
        try:
            found = 2 * len(pages)
            cache.extend(pages, len(tokens))
        except OutOfPages:
            cache.release(pages)
        else:
            for i in range(found // 2, len(pages)):
                contents[pages[i]] = tuple(tokens[: 2 * (i + 1)])
            cache.remember(pages, tokens, found, len(tokens))
            live.append(pages)
        for _ in range(min(finish, len(live))):
            cache.release(live.pop(0))
        used = {page for pages in live for page in pages}
        assert cache.n_free == 6 - len(used)
