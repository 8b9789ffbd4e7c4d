"""A whole model on a GPU: decoding one and many sequences, a long prompt, and the time of a token.

The model has the shape of a real one and random weights, made on the device: speed does not depend
on what they are. Bytes a token are those of the matrices and of the keys and values that are read;
a share of the bandwidth is of the data sheet's where the device is known, and beside it of what a
copy reaches. What was predicted before any run stands beside each figure (see `predict`).
"""

import gc
import statistics
import time
from dataclasses import dataclass

import torch

from pyllm.models.config import DecoderConfig
from pyllm.models.llama import Llama
from pyllm.nn import Embedding, FusedLinear, RMSNorm
from pyllm.ops import registry
from pyllm.quant import QuantFragments, QuantTensor
from pyllm.runtime.device import find_device
from pyllm.runtime.engine import Engine
from pyllm.runtime.sampling import SamplingParams
from pyllm.runtime.sequence import Sequence
from pyllm.runtime.text import TextStream

from . import limits
from .shapes import SHAPES

LAYERS = {"llama3-8b": 32, "tiny": 2}
GROUP = 128  # of int4; smaller where K is
# Of the data sheets: GB/s, dense bfloat16 TFLOP/s.
PEAKS = {
    "H200": (4800, 989), "H100 PCIe": (2039, 756), "H100": (3350, 989), "A100": (2039, 312),
    "B200": (8000, 2250), "L40S": (864, 362), "4090": (1008, 165),
}  # fmt: skip
# What predictions rest on: the share of the bandwidth that a kernel with much to read reaches (of
# bytes of halves by cuBLAS, of int4 by ours), microseconds from one kernel of a graph to the next,
# and the share of the peak of a large product of halves.
READS = {"bf16": 0.92, "int4": 0.80}
GAP_US, PRODUCT = 1.0, 0.70
KERNELS_OF_LAYER, OTHER_KERNELS = 10, 6


@dataclass
class Test:
    """What is measured: `batch` sequences after a prompt of `context` tokens, `new` tokens each."""

    name: str
    bits: int
    batch: int
    context: int
    new: int
    bar: str


TESTS = [
    Test("bf16, 1 sequence at 2k", 16, 1, 2048, 256, "80 % of the bandwidth"),
    Test("bf16, 1 sequence at 512", 16, 1, 512, 128, ""),
    Test("bf16, 32 sequences at 512", 16, 32, 512, 128, "20 x 1 sequence"),
    Test("bf16, prompt of 8k", 16, 1, 8192, 2, "60 % of the peak"),
    Test("int4, 1 sequence at 2k", 4, 1, 2048, 256, "55 % of the bandwidth, 2.5 x bf16"),
    Test("int4, 32 sequences at 512", 4, 32, 512, 128, ""),
]


class RandomWeights:
    """In place of `pyllm.models.weights.Weights`: matrices that keep the size of their input."""

    def __init__(self, device, dtype, bits, backend):
        self._device, self._dtype, self._bits, self._backend = device, dtype, bits, backend
        torch.manual_seed(0)

    def layer(self, i):
        return self

    def vector(self, name, n):
        return None

    def rms_norm(self, name, n, eps):
        if name in ("q_norm", "k_norm"):
            return None
        return RMSNorm(n, eps, device=self._device)

    def matrix(self, name, *, n, k):
        return self._random(n, k)

    def embedding(self, matrix):
        return Embedding(matrix, self._dtype)

    def linear(self, *names, k, n):
        return FusedLinear([self._weight(sum(n), k)], None, [n])

    def head(self, embedding, *, k, n):
        return FusedLinear([self._weight(n, k)], dtype=torch.float32)

    def _random(self, n, k):
        weight = torch.empty(n, k, dtype=self._dtype, device=self._device)
        return weight.normal_(std=k**-0.5)

    def _weight(self, n, k):
        if self._bits == 16:
            return self._random(n, k)
        group = GROUP if k % GROUP == 0 else 32
        options = {"device": self._device}
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, **options)
        # Quants are uniform from -8 to 7, of standard deviation 4.6.
        scale = torch.full((n, k // group), k**-0.5 / 4.6, dtype=torch.float16, **options)
        chosen = registry.OPS["quant_matmul"].choose(self._device.type, self._backend)
        form = QuantFragments if chosen == "cuda" else QuantTensor
        return form.from_parts(q, scale, bits=4)


class Clock:
    """In place of a tokenizer: notes when each token is handed out."""

    def __init__(self):
        self.times = []

    def push(self, token):
        self.times.append(time.perf_counter())
        return ""

    def finish(self):
        return ""


def config_of(shape, layers, context) -> DecoderConfig:
    """A Llama of `shape`."""
    s = SHAPES[shape]
    return DecoderConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate,
        n_layers=layers, n_heads=s.heads, n_kv_heads=s.kv_heads, head_dim=s.head_dim,
        max_context=context, norm_eps=1e-5, rope_theta=500000.0, rope_dim=s.head_dim,
    )  # fmt: skip


def parameters_of(config) -> tuple[int, int]:
    """The weights in the matrices of all layers, and those in the head."""
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    return c.n_layers * layer, c.vocab_size * c.hidden_size


def step_bytes(config, test) -> float:
    """What a step has to read: matrices, and the keys and values up to half of the new tokens."""
    per_weight = 2 if test.bits == 16 else (4 + 16 / GROUP) / 8
    cached = 4 * config.n_layers * config.n_kv_heads * config.head_dim
    return sum(parameters_of(config)) * per_weight + test.batch * cached * (
        test.context + test.new / 2
    )


def prompt_operations(config, test) -> float:
    """Of one prompt: two for each weight of the layers and token, four for each query and key."""
    layers, head = parameters_of(config)
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * test.context**2 / 2
    return 2 * (layers * test.context + head) + attention


def predict(config, test, peaks) -> dict:
    """Seconds of a step and of a prompt, from bytes, operations and launches."""
    bandwidth, peak = peaks[0] * 1e9, peaks[1] * 1e12
    share = READS["bf16" if test.bits == 16 else "int4"]
    launches = config.n_layers * KERNELS_OF_LAYER + OTHER_KERNELS
    step = step_bytes(config, test) / (share * bandwidth) + launches * GAP_US * 1e-6
    return {"step": step, "prompt": prompt_operations(config, test) / (PRODUCT * peak)}


def measure(
    shape="llama3-8b", device="cuda", backend=None, dtype="bfloat16", minutes=8.0, peers=True,
    scale=1, progress=lambda text: None,
):  # fmt: skip
    """Runs `TESTS`, then Hugging Face's model of the same shape while time is left.

    Args:
        shape: a key of `LAYERS`.
        minutes: what is not begun by then is left out; a test takes less than one.
        scale: divides contexts, batches and numbers of tokens, for dry runs.
    """
    end = time.monotonic() + 60 * minutes
    dtype = getattr(torch, dtype)
    tests = [
        Test(t.name, t.bits, max(t.batch // scale, 1), max(t.context // scale, 2),
             max(t.new // scale, 2), t.bar)
        for t in TESTS
    ]  # fmt: skip
    longest = max(t.context + t.new for t in tests)
    config = config_of(shape, LAYERS[shape], longest)
    where = find_device(device)
    name = torch.cuda.get_device_name() if where.torch_device.type == "cuda" else "no GPU"
    peaks = next((p for key, p in PEAKS.items() if key in name), PEAKS["H100"])
    data = {"device": name, "shape": shape, "dtype": str(dtype), "peaks": peaks, "tests": []}
    if where.torch_device.type == "cuda":
        progress("limits")
        data["limits"] = limits.measure_cuda()
    for bits in (16, 4):
        progress(f"weights of {bits} bits")
        with torch.inference_mode():
            model = Llama(config, RandomWeights(where.torch_device, dtype, bits, backend)).eval()
        batch = max(t.batch for t in tests)
        tokens = max(t.batch * (t.context + t.new + 32) for t in tests)
        engine = Engine(
            model, max_context=longest, max_batch=batch, max_tokens=where.max_tokens,
            cache_tokens=tokens, cache_dtype=dtype, backend=backend, device=where,
        )  # fmt: skip
        for test in (t for t in tests if t.bits == bits):
            if time.monotonic() > end:
                break
            progress(test.name)
            data["tests"].append(_summary(config, test, peaks, _run(engine, config, test)))
        del engine, model
        _free(where)
    if where.torch_device.type == "cuda":
        progress("the text of a real model")
        data["real"] = _real_text(device, backend)
    if peers and where.torch_device.type == "cuda":
        data["hugging_face"] = _hugging_face(config, tests[0], dtype, end, progress)
    return data


def _run(engine, config, test):
    """Seconds of a prompt, and the times between tokens of all sequences; warmed up first."""
    for new in (min(test.new, 6), test.new):
        clocks = [Clock() for _ in range(test.batch)]
        generator = torch.Generator().manual_seed(new)  # another prompt: nothing is in the cache
        begin = time.perf_counter()
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        sequences = []
        for clock in clocks:
            ids = torch.randint(config.vocab_size, (test.context,), generator=generator).tolist()
            sequence = Sequence(ids, params, TextStream(clock), (), test.context + new, 0)
            sequences.append(sequence)
            engine.add(sequence)
        while not all(s.finished for s in sequences):
            engine.step()
    # From where all sequences decode on.
    first = max(clock.times[0] for clock in clocks)
    steps = [
        b - a
        for clock in clocks
        for a, b in zip(clock.times, clock.times[1:], strict=False)
        if a >= first
    ]
    return {"prompts": first - begin, "steps": steps or [clocks[0].times[-1] - first]}


def _summary(config, test, peaks, run):
    steps = sorted(run["steps"])
    median = statistics.median(steps)
    predicted = predict(config, test, peaks)
    prompt = run["prompts"] / test.batch
    return {
        **vars(test),
        "step_ms": 1e3 * median, "tokens_per_s": test.batch / median,
        "p99_over_p50": steps[min(len(steps) - 1, len(steps) * 99 // 100)] / median,
        "bandwidth_share": step_bytes(config, test) / median / (peaks[0] * 1e9),
        "prompt_tokens_per_s": test.context / prompt,
        "peak_share": prompt_operations(config, test) / prompt / (peaks[1] * 1e12),
        "predicted_step_ms": 1e3 * predicted["step"],
        "predicted_bandwidth_share": step_bytes(config, test)
        / predicted["step"]
        / (peaks[0] * 1e9),
        "predicted_prompt_tokens_per_s": test.context / predicted["prompt"],
    }  # fmt: skip


def _real_text(device, backend, tokens=64):
    """How many greedy tokens of SmolLM2 are the processor's, before the first that is not."""
    from pyllm import LLM
    from pyllm.loading import LoadError, resolve

    try:
        path = resolve("smollm2-135m")
    except LoadError as error:
        return {"left out": str(error)}
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    found = {}
    for name, way in (("cpu", {}), (device, {"backend": backend, "dtype": "float16"})):
        llm = LLM(path, device=name, max_context=512, **way)
        for _ in range(2):
            found[name] = llm.chat(question, max_new_tokens=tokens)
    ours, theirs = found[device], found["cpu"]
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs.token_ids))
    return {
        "model": "smollm2-135m", "same tokens": same, "of": len(theirs.token_ids),
        "text": ours.text, "text of the processor": theirs.text,
        "tokens_per_s": ours.usage.decode_tokens_per_second,
    }  # fmt: skip


def _hugging_face(config, test, dtype, end, progress):
    """Tokens a second of ``generate``: eager, and with a static cache and torch.compile."""
    import transformers

    c = config
    settings = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, tie_word_embeddings=False,
        max_position_embeddings=c.max_context, eos_token_id=None,
    )  # fmt: skip
    progress("Hugging Face's model")
    with torch.device("cuda"), torch.inference_mode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = transformers.LlamaForCausalLM(settings).eval()
        finally:
            torch.set_default_dtype(before)
        ids = torch.randint(c.vocab_size, (1, test.context))
    model.generation_config.pad_token_id = 0
    ways = {"eager": {}, "static cache, compiled": {"cache_implementation": "static"}}
    found = {}
    for name, way in ways.items():
        if time.monotonic() + 90 > end:
            found[name] = "left out: no time"
            continue
        progress(f"Hugging Face, {name}")
        try:
            found[name] = _generate_speed(model, ids, way)
        except Exception as error:  # a peer's failure is a result
            found[name] = f"failed: {type(error).__name__}: {error}"
    return found


def _generate_speed(model, ids, way):
    def seconds(new):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **way)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(8)
    seconds(72)  # a static cache of this size; a compiler's second thoughts
    return 64 / (min(seconds(72) for _ in range(2)) - min(seconds(8) for _ in range(2)))


def _free(where):
    gc.collect()
    if where.torch_device.type == "cuda":
        torch.cuda.empty_cache()


HEAD = (
    "test", "ms a step", "predicted", "tokens/s", "of bandwidth", "predicted", "p99 / p50",
    "prompt tokens/s", "predicted", "of peak", "bar",
)  # fmt: skip


def cells(data) -> list[list[str]]:
    """A line a test, what was predicted beside it; then the peers."""
    rows = [
        [
            r["name"], f"{r['step_ms']:.2f}", f"{r['predicted_step_ms']:.2f}",
            f"{r['tokens_per_s']:.0f}", f"{r['bandwidth_share']:.0%}",
            f"{r['predicted_bandwidth_share']:.0%}", f"{r['p99_over_p50']:.2f}",
            f"{r['prompt_tokens_per_s']:.0f}", f"{r['predicted_prompt_tokens_per_s']:.0f}",
            f"{r['peak_share']:.0%}", r["bar"],
        ]
        for r in data["tests"]
    ]  # fmt: skip
    for name, speed in data.get("hugging_face", {}).items():
        speed = f"{speed:.0f}" if isinstance(speed, float) else speed
        bar = "ours 1.5 x, eager 4 x"
        rows.append([f"Hugging Face, {name}", "", "", speed, *[""] * 6, bar])
    return rows


def table(data):
    """As a rich table."""
    from rich.table import Table

    t = Table(title=f"{data['shape']}, random weights, {data['device']}", title_justify="left")
    for name in HEAD:
        t.add_column(name, justify="left" if name in ("test", "bar") else "right")
    for row in cells(data):
        t.add_row(*row)
    if real := data.get("real"):
        text = "; ".join(f"{k}: {v}" for k, v in real.items() if "text" not in k)
        t.caption = f"Text of real weights: {text}"
    return t
