"""The paged cache of keys and values.

Pages of `page_size` tokens are handed out to sequences one by one. A full page stays findable
by its tokens after its sequence is done, until the page is needed: a later prompt that begins with
the same tokens (the next turn of a chat, a shared system prompt) takes it over and need not compute
it. That changes no result, because keys and values do not depend on how a prompt was chunked.
"""

import math
from collections import OrderedDict

from pyllm.memory import allocate


class OutOfPages(RuntimeError):
    """No page is free: a sequence has to wait, or to give its pages up."""


class PagedCache:
    """Keys and values of all layers.

    Args:
        spare_pages: more pages at the end, which are never handed out.
        allocate: makes the memory, a uint8 tensor of so many bytes.
        side_by_side: whether keys lie side by side, element by element. The CPU kernels like it,
            which have nothing to transpose then.

    Attributes:
        layers: for each layer ``(k, v)``, both ``[pages, page_size, kv_heads, head_dim]``.
    """

    def __init__(
        self, *, n_layers, n_pages, page_size, kv_heads, head_dim, dtype, spare_pages=0,
        allocate=allocate, side_by_side=True,
    ):  # fmt: skip
        self.page_size = page_size
        self.n_pages = n_pages
        # One stretch of memory for all layers: in the processor's memory it still grows only with
        # use, since the layers of a page follow each other. In each come the keys of a head and
        # then its values, so that a decoding step reads them from memory in long runs.
        shape = (n_pages + spare_pages, n_layers, kv_heads, 2, page_size * head_dim)
        memory = allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        rows = memory.unflatten(-1, (page_size, head_dim)).permute(3, 1, 0, 4, 2, 5)
        keys, values = rows
        if side_by_side:
            keys = memory[..., 0, :].unflatten(-1, (head_dim, page_size)).permute(1, 0, 4, 2, 3)
        self.layers = list(zip(keys, values, strict=True))
        self._refs = [0] * n_pages
        # Free pages in the order in which they are taken: never used ones first, then those whose
        # contents were used longest ago.
        self._free = OrderedDict.fromkeys(range(n_pages))
        self._key_of: dict[int, tuple] = {}  # page -> its key in _page_of
        self._page_of: dict[tuple, int] = {}  # (serial of the page before, tokens) -> page
        self._serial: dict[int, int] = {}  # page -> number of its contents
        self._next_serial = 1

    @property
    def n_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """How many pages `n_tokens` take."""
        return -(-n_tokens // self.page_size)

    def extend(self, pages: list[int], n_tokens: int) -> None:
        """Appends pages until `pages` has room for `n_tokens`; takes all or none."""
        missing = self.pages_for(n_tokens) - len(pages)
        if missing > len(self._free):
            raise OutOfPages(f"{missing} pages needed, {len(self._free)} are free")
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._refs[page] = 1
            pages.append(page)

    def release(self, pages: list[int]) -> None:
        """Gives pages back. What they hold can still be found until they are handed out again."""
        for page in reversed(pages):  # the end of a sequence goes first
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)
        pages.clear()

    def remember(self, pages: list[int], token_ids: list[int], done: int, n_tokens: int) -> None:
        """Makes the full pages of the first `n_tokens` findable; those of `done` already are."""
        for i in range(done // self.page_size, n_tokens // self.page_size):
            parent = self._serial.get(pages[i - 1]) if i else 0
            if pages[i] in self._key_of or parent is None:
                continue
            key = (parent, tuple(token_ids[i * self.page_size : (i + 1) * self.page_size]))
            if key in self._page_of:
                return  # another sequence computed the same; what follows hangs on its page
            self._page_of[key] = pages[i]
            self._key_of[pages[i]] = key
            self._serial[pages[i]] = self._next_serial
            self._next_serial += 1

    def take_prefix(self, token_ids: list[int]) -> list[int]:
        """Takes over the pages that hold the longest known prefix of `token_ids`.

        At least one token is left to compute, because its logits are wanted.
        """
        pages, serial = [], 0
        for end in range(self.page_size, len(token_ids), self.page_size):
            page = self._page_of.get((serial, tuple(token_ids[end - self.page_size : end])))
            if page is None:
                break
            if self._refs[page] == 0:
                del self._free[page]
            self._refs[page] += 1
            serial = self._serial[page]
            pages.append(page)
        return pages

    def _forget(self, page: int) -> None:
        if key := self._key_of.pop(page, None):
            del self._page_of[key]
            del self._serial[page]


def cache_nbytes(*, n_layers, n_tokens, kv_heads, head_dim, dtype, page_size) -> int:
    """Bytes that a cache for `n_tokens` takes, in whole pages."""
    pages = -(-n_tokens // page_size)
    return 2 * n_layers * pages * page_size * kv_heads * head_dim * dtype.itemsize
