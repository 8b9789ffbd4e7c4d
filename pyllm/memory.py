"""Memory for weights and for the cache of keys and values, in large pages.

A decoding step reads every weight once. The processor prefetches within a page only, and finding
the next one takes a walk through the page tables (two of them in a virtual machine): one Zen 4 core
read 20 GB/s from pages of 4 KB and 31 GB/s from pages of 2 MB. Most weights are smaller than such a
page, so they are cut from slabs. A slab is freed with the last weight in it, and only what is
written to takes up memory.
"""

import threading
from contextlib import contextmanager

import numpy as np

from pyllm import _C

SLAB_BYTES = 32 << 20
PAGE_BYTES = 2 << 20
ALIGNMENT = 64
MOST_POPULATED = 1 << 30

_lock = threading.Lock()
_free = np.empty(0, dtype=np.uint8)  # what is left of the newest slab


def allocate(nbytes: int):
    """An uninitialized uint8 tensor ``[nbytes]``, aligned to 64 bytes."""
    global _free
    import torch

    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    with _lock:
        if size > len(_free):
            if size > SLAB_BYTES // 2:
                return torch.from_numpy(_slab(size)[:nbytes])
            _free = _slab(SLAB_BYTES)
        memory, _free = _free[:nbytes], _free[size:]
    return torch.from_numpy(memory)


@contextmanager
def populated(nbytes: int):
    """Makes a slab for the next `nbytes` of weights; until the block ends, a thread has the system
    find memory for it (for the first GB), so that this work and that of the block overlap.

    In a virtual machine whose host has to find it first, that takes up to 0.2 s for 100 MB.
    """
    global _free
    slab = _slab(nbytes)
    with _lock:
        _free = slab
    thread = threading.Thread(target=_C.populate, args=(slab[: min(nbytes, MOST_POPULATED)],))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _slab(nbytes):
    slab = np.empty(nbytes + PAGE_BYTES, dtype=np.uint8)
    _C.advise_huge_pages(slab)
    return slab[-slab.ctypes.data % PAGE_BYTES :][:nbytes]
