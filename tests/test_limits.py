import pytest
import torch

from pyllm import _C


def test_operations_are_counted_and_memory_of_any_size_is_read():
    threads = _C.num_threads()
    once, twice = (_C.peak_arithmetic("float32", n) for n in (10, 20))
    assert once > 0
    assert twice == 2 * once
    assert once % (threads * 10 * 32) == 0
    for size in (0, 1, 255, 256, 1 << 20, (1 << 20) + 7):
        _C.read_memory(torch.ones(size, dtype=torch.uint8))


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected int8, float32 or bfloat16, got 'int3'"):
        _C.peak_arithmetic("int3", 1)
    with pytest.raises(ValueError, match="data: expected uint8"):
        _C.read_memory(torch.ones(8))
