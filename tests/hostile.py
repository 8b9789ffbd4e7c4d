"""Corrupt files for the readers: mutations of real headers, and what opening one may do."""

import time
import tracemalloc

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pyllm.loading import LoadError, open_checkpoint

EXTREMES = [0, 1, 2**8 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("number"), st.floats(0, 1), st.sampled_from(EXTREMES)),
        st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("truncate"), st.floats(0, 1), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def mutated(data, header, mutations):
    """The data with mutations in its first `header` bytes."""
    data = bytearray(data)
    for kind, where, value in mutations:
        at = int(where * (min(header, len(data)) - 1)) if data else 0
        if not data:
            break
        if kind == "flip":
            data[at] ^= value
        elif kind == "number":
            width = 8 if value >= 2**32 else 4
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == "delete":
            del data[at : at + value]
        else:
            del data[at:]
    return bytes(data)


def opened_within_bounds(path, tokenizer=True):
    """Opens a file; the only error that may come is LoadError, soon and with little memory."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.raw(name).nbytes  # noqa: B018 - it must exist
        if tokenizer:
            checkpoint.tokenizer().decode([1, 2, 3])
    except LoadError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20, f"{peak} bytes for a file of {path.stat().st_size}"
    assert time.monotonic() - begin < 10  # a hang, not a timing
