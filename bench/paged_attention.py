"""paged_attention beside PyTorch's attention: ``python -m bench.paged_attention``.

Prints for each shape the median and quartiles in microseconds, the GB/s of the cache that is read
and the GFLOP/s. Every call reads another layer's cache, as decoding does.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from pyllm.ops import paged_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import PagedBatch, rand

# Name, sequences as (new tokens, past), query heads, KV heads and head dim, of SmolLM2-135M and
# Llama-3.2-1B.
SHAPES = [
    ("decode 512", [(1, 511)], 9, 3, 64),
    ("decode 2048", [(1, 2047)], 9, 3, 64),
    ("decode 8 x 512", [(1, 511)] * 8, 9, 3, 64),
    ("prefill 512", [(512, 0)], 9, 3, 64),
    ("decode 2048, 1B", [(1, 2047)], 32, 8, 64),
    ("prefill 512, 1B", [(512, 0)], 32, 8, 64),
]
LAYERS = 30


def prepare(sequences, heads, kv_heads, head_dim, dtype=torch.float16):
    """Calls of ours and of torch, one a layer, and the bytes and operations of each."""
    batch = PagedBatch(sequences)
    q = rand(batch.tokens, heads, head_dim)
    tables = {
        "cu_seqlens_q": batch.cu_seqlens_q,
        "page_table": batch.page_table,
        "context_lens": batch.context_lens,
    }
    ours, torchs = [], []
    for layer in range(LAYERS):
        shape = (batch.n_pages, batch.page_size, kv_heads, head_dim)
        k, v = (rand(*shape, dtype=dtype, seed=2 * layer + i) for i in (0, 1))
        ours.append(lambda k=k, v=v: paged_attention(q, k, v, **tables))
        new, keys = sequences[0][0], sum(sequences[0])
        dense = [
            x.flatten(0, 1)[: len(sequences) * keys].view(len(sequences), keys, kv_heads, -1)
            .transpose(1, 2).float()
            for x in (k, v)
        ]  # fmt: skip
        queries = q.view(len(sequences), new, heads, head_dim).transpose(1, 2)
        torchs.append(
            lambda dense=dense, queries=queries, causal=new > 1: (
                torch.nn.functional.scaled_dot_product_attention(
                    queries, *dense, is_causal=causal, enable_gqa=True
                )
            )
        )
    seen = sum(past * new + new * (new + 1) // 2 for new, past in sequences)
    n_bytes = 2 * sum(map(sum, sequences)) * kv_heads * head_dim * dtype.itemsize
    return ours, torchs, n_bytes, 4 * seen * heads * head_dim


def main():
    for name, *shape in SHAPES:
        ours, torchs, n_bytes, operations = prepare(*shape)
        times = {"pyllm": [], "torch (float32)": []}
        for repeat in range(6):
            for label, calls in zip(times, (ours, torchs), strict=True):
                for call in calls:
                    begin = time.perf_counter()
                    call()
                    if repeat:
                        times[label].append((time.perf_counter() - begin) * 1e6)
        for label, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            print(
                f"{name:16} {label:16} {median:8.1f} us ({low:.1f} to {high:.1f})"
                f" {n_bytes / median / 1e3:6.1f} GB/s {operations / median / 1e3:7.1f} GFLOP/s"
            )


if __name__ == "__main__":
    main()
