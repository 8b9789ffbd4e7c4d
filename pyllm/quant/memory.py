"""Memory for weights and for the cache of keys and values, in large pages.

A decoding step reads every weight once. The processor prefetches within a page only, and finding
the next one takes a walk through the page tables (two of them in a virtual machine): one Zen 4 core
read 20 GB/s from pages of 4 KB and 31 GB/s from pages of 2 MB. Most weights are smaller than such a
page, so they are cut from slabs. A slab is freed with the last weight in it, and only what is
written to takes up memory.
"""

import threading

import torch

from pyllm import _C

SLAB_BYTES = 32 << 20
PAGE_BYTES = 2 << 20
ALIGNMENT = 64

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)  # what is left of the newest slab


def allocate(nbytes: int) -> torch.Tensor:
    """An uninitialized uint8 ``[nbytes]``, aligned to 64 bytes."""
    global _free
    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    with _lock:
        if size > SLAB_BYTES // 2:
            return _slab(size)[:nbytes]
        if size > _free.numel():
            _free = _slab(SLAB_BYTES)
        memory, _free = _free[:nbytes], _free[size:]
    return memory


def _slab(nbytes):
    slab = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8)
    _C.advise_huge_pages(slab)
    return slab[-slab.data_ptr() % PAGE_BYTES :]
