"""quant_matmul at the shapes of real models: ``python -m bench.quant_matmul``.

Each figure is the median of replays of a plan of the same matmul on different weights, so that for
one token the weights come from memory and not from the caches. Activations are quantized
beforehand; their quantization is timed on its own.
"""

import argparse
import statistics
import time

import torch

from pyllm import _C, memory
from pyllm.ops import quant_matmul, quantize_activation
from pyllm.quant import QuantTensor, packing

from . import limits

# (N, K): attention's output, the fused q, k, v, gate and up, down, the output head.
MODELS = {
    "SmolLM2-135M": [(576, 576), (960, 576), (3072, 576), (576, 1536), (49152, 576)],
    "Llama-3.2-1B": [(2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192), (128256, 2048)],
}
FORMATS = {"Q4_1": (4, False), "Q4_0": (4, True), "Q8_0": (8, True)}
TOKENS = (1, 8, 512)
COLD_BYTES = 192 << 20  # of weights in a plan, several times the largest cache


def random_weights(n, k, format, copies):
    """Weights of random quants and scales, at different addresses."""
    bits, symmetric = FORMATS[format]
    panel = QuantTensor.from_float(torch.randn(16, k), bits=bits, symmetric=symmetric).packed
    weights = []
    for _ in range(copies):
        packed = memory.allocate(packing.packed_bytes(n, k, bits, 32, not symmetric))
        packed.view(-1, panel.numel())[:] = panel
        weights.append(QuantTensor(packed, (n, k), bits, 32, not symmetric))
    return weights


def plan_of(calls):
    plan = _C.Plan()
    plan.begin()
    for call in calls:
        call()
    plan.end()
    return plan


def seconds(plan, repeats):
    """Median and spread (half the range of the middle half) of a replay, per launch."""
    plan.replay()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan.replay()
        times.append((time.perf_counter() - begin) / len(plan))
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), (quarters[2] - quarters[0]) / 2


def measure(n, k, format, tokens, repeats=9):
    """Seconds of one matmul, their spread, and the bytes of its weights."""
    bits, symmetric = FORMATS[format]
    nbytes = packing.packed_bytes(n, k, bits, 32, not symmetric)
    copies = max(1, COLD_BYTES // nbytes) if tokens <= 8 else 2
    weights = random_weights(n, k, format, copies)
    x = quantize_activation(torch.randn(tokens, k), 32)
    out = torch.empty(tokens, n)
    plan = plan_of([lambda w=w: quant_matmul(x, w, out=out) for w in weights])
    return *seconds(plan, repeats), nbytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--format", choices=FORMATS, default="Q4_1")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    print(f"{options.model} {options.format}, {_C.isa()}, {_C.num_threads()} threads")
    print(
        f"{'M':>4} {'N':>7} {'K':>6} {'µs':>9} {'±':>7} {'GB/s':>6} {'share':>6} {'GOP/s':>7} share"
    )
    for tokens in options.tokens:
        for n, k in MODELS[options.model]:
            # The limits drift with the neighbors on the machine, so they are measured each time.
            read, int8 = limits.read_bandwidth(1), limits.peak_arithmetic("int8", 2) or float("nan")
            time_s, spread, nbytes = measure(n, k, options.format, tokens)
            bandwidth, rate = nbytes / time_s, 2 * n * k * tokens / time_s
            print(
                f"{tokens:4} {n:7} {k:6} {time_s * 1e6:9.1f} {spread * 1e6:7.1f} "
                f"{bandwidth / 1e9:6.1f} {bandwidth / read:6.1%} "
                f"{rate / 1e9:7.1f} {rate / int8:6.1%}"
            )
