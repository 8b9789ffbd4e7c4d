"""Models against Hugging Face's implementation: on small random ones of every kind, and on SmolLM2.

Small models in float32 are held to the rule of compare.py: the exact answer is Hugging Face's in
float64, PyTorch's own error that of Hugging Face in float32. Where weights are quantized our
kernels round activations to 8 bits, and PyTorch's own error is that of the same model on the
reference backend with its activations so rounded; the reference backend itself is held to float32.
"""

import gguf
import pytest
import torch
from compare import EPS, assert_close
from pyllm.bench.huggingface import hf_from_gguf
from pyllm.bench.perplexity import TEXT
from tiny_models import tiny_gguf, tiny_hf

from pyllm import LLM, QuantTensor
from pyllm.models import ModelError
from pyllm.ops import quant_matmul, quantize_activation

IDS = [5, 9, 60, 33, 70, 21, 9, 9, 14, 80, 3, 41, 17, 25, 36, 49, 64, 8]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DIRECTORIES = {
    "llama": {},
    "llama-tied": {"tied": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"rope_scaling": LLAMA3},
    "llama-linear-rope": {"rope_scaling": LINEAR},
    "llama-yarn-rope": {"rope_scaling": YARN},
    "llama-wide-heads": {"head_dim": 48},
    "llama-sharded": {"max_shard_size": "20KB"},
    "mistral": {},
    "mistral-window": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
GGUF = [
    *(("llama", quant) for quant in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    *(("llama", quant) for quant in ("Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")),
    ("qwen2", "Q4_1"),
    ("qwen3", "Q8_0"),
]


def load(path, **options):
    return LLM(path, max_context=256, **{"dtype": "float32", **options})


def hf_logits(model, ids, dtype):
    with torch.no_grad():
        return model.to(dtype)(torch.tensor([ids])).logits[0]


def our_dequantize(data, ggml_type):
    """gguf's function, with the weights as our kernels see them."""
    if ggml_type.name == "F32":
        return data
    raw = data.reshape(data.shape[0], -1)
    block, nbytes = gguf.GGML_QUANT_SIZES[ggml_type]
    shape = (data.shape[0], raw.shape[1] // nbytes * block)
    return QuantTensor.from_gguf(raw.reshape(-1), ggml_type.name, shape).dequantize().numpy()


def rounding_quant_matmul(x, weight, bias, out=None):
    """quant_matmul in plain PyTorch, on activations rounded to 8 bits."""
    x = quantize_activation(x, weight.group_size, backend="reference")
    return quant_matmul(x, weight, bias, out=out, backend="reference")


def cosine(a, b):
    """Of the logits at each place, the mean."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


@pytest.mark.parametrize("name", DIRECTORIES)
def test_hugging_face_directories(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tiny_hf(tmp_path, name.split("-")[0], **DIRECTORIES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ours = load(path)
    single = hf_logits(theirs, IDS, torch.float32)
    exact = hf_logits(theirs, IDS, torch.float64)
    assert_close(ours.logits(IDS), exact, single)
    reply = theirs.float().generate(
        torch.tensor([IDS]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )[0, len(IDS) :].tolist()  # fmt: skip
    assert ours.generate(IDS, max_new_tokens=24, ignore_eos=True).token_ids == reply


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_directories(dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tiny_hf(tmp_path, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    single = hf_logits(theirs, IDS, getattr(torch, dtype))
    assert_close(load(path).logits(IDS), hf_logits(theirs, IDS, torch.float64), single)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_on_load(bits, tmp_path):
    """The matrices become those that `QuantTensor.from_float` gives."""
    path = tiny_hf(tmp_path)
    plain, rounded = load(path), load(path, quantize=f"int{bits}")
    for a, b in zip(plain.model.blocks, rounded.model.blocks, strict=True):
        weight = a.mlp.down.weights[0]
        expected = QuantTensor.from_float(weight.float(), bits=bits, symmetric=bits == 8)
        assert torch.equal(b.mlp.down.weights[0].dequantize(), expected.dequantize())
    assert rounded.model.head.weights[0].bits == 8
    assert len(rounded.generate(IDS, max_new_tokens=8, ignore_eos=True).token_ids) == 8


@pytest.mark.parametrize(("arch", "quant"), GGUF)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf(arch, quant, tied, tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf", arch, quant, tied=tied)
    if quant.endswith("_K"):
        # A scale is the product of two numbers, which we keep as float16: test_quant_tensor.py
        # holds that to its bound, and here the same weights are wanted on both sides.
        monkeypatch.setattr("gguf.quants.dequantize", our_dequantize)
    theirs = hf_from_gguf(path)
    single = hf_logits(theirs, IDS, torch.float32)
    exact = hf_logits(theirs, IDS, torch.float64)
    ours = load(path)
    logits = ours.logits(IDS)
    assert torch.equal(load(path, max_batch=1, max_tokens=1).logits(IDS), logits)
    monkeypatch.setenv("PYLLM_BACKEND", "reference")
    # A logit is a sum of K terms, and another order of summing moves it by about sqrt(K) ulp.
    floor = EPS[torch.float32] * ours.model.config.hidden_size**0.5 * exact.abs().max().item()
    assert_close(ours.logits(IDS), exact, single, floor=floor)
    monkeypatch.setattr("pyllm.nn.linear.quant_matmul", rounding_quant_matmul)
    assert_close(logits, exact, ours.logits(IDS), floor=floor)


def test_rope_factors_of_a_gguf(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", quant="F32", rope_scaling=LLAMA3)
    theirs = hf_from_gguf(path, LLAMA3)
    single = hf_logits(theirs, IDS, torch.float32)
    assert_close(load(path).logits(IDS), hf_logits(theirs, IDS, torch.float64), single)


def test_unknown_architecture(tmp_path):
    path = tiny_hf(tmp_path)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"llama"', '"mamba"'))
    with pytest.raises(ModelError, match=r"expected one of llama, mistral, .* got 'mamba'"):
        LLM(path)


def test_missing_and_misshapen_tensors(tmp_path):
    path = tiny_hf(tmp_path)
    config = (path / "config.json").read_text()
    for change, message in (
        (('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "no tensor model.layers.2"),
        (('"intermediate_size": 128', '"intermediate_size": 96'), r"expected shape \(96, 64\)"),
        (('"num_key_value_heads": 2', '"num_key_value_heads": 3'), "multiple of n_kv_heads"),
        (('"hidden_act": "silu"', '"hidden_act": "gelu"'), "hidden_act: expected silu"),
    ):
        assert change[0] in config
        (path / "config.json").write_text(config.replace(*change))
        with pytest.raises(ModelError, match=message):
            LLM(path)


# --- the real model ---

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at",
    "In 1969, Neil Armstrong became the first person to",
    "To make bread you need flour,",
]


@pytest.fixture(scope="module")
def real(smollm2):
    return LLM(smollm2, max_context=1024), hf_from_gguf(smollm2)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:20])
def test_greedy_text_is_hugging_faces(real, prompt):
    """The same 32 tokens, or they part where two logits lie closer than rounding moves them."""
    ours, theirs = real
    ids = ours.tokenizer.encode(prompt)
    mine = ours.generate(ids, max_new_tokens=32, ignore_eos=True).token_ids
    with torch.no_grad():
        logits = theirs(torch.tensor([[*ids, *mine]])).logits[0, len(ids) - 1 : -1]
    for token, row in zip(mine, logits, strict=True):
        best = row.argmax().item()
        if token != best:
            # By how much 8-bit activations move logits: measured here, on these very logits.
            moved = (ours.logits([*ids, *mine])[len(ids) - 1 : -1] - logits).abs().max().item()
            assert row[best] - row[token] <= 2 * moved
            return  # what follows continues another text
    assert mine == logits.argmax(-1).tolist()


def test_perplexity_and_logits_of_a_text(real):
    """Within one percent of float32, on the opening of Alice's Adventures in Wonderland (1865)."""
    ours, theirs = real
    text = TEXT.read_text()
    ids = ours.tokenizer.encode(text)
    assert len(ids) > 500
    mine = ours.logits(ids)
    with torch.no_grad():
        exact = theirs(torch.tensor([ids])).logits[0]

    def perplexity(logits):
        targets = torch.tensor(ids[1:])
        return torch.nn.functional.cross_entropy(logits[:-1].double(), targets).exp().item()

    assert abs(perplexity(mine) / perplexity(exact) - 1) < 0.01
    assert cosine(mine, exact) > 0.999


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("quant", "bits"), [("Q8_0", 4), ("F16", 4), ("F32", 8), ("Q6_K", 4)])
def test_head_bits_round_the_head_and_nothing_else(tied, quant, bits, tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", quant=quant, tied=tied)
    plain, rounded = load(path), load(path, head_bits=bits)
    table, head = (m.weights[0] for m in (plain.model.head, rounded.model.head))
    if isinstance(table, QuantTensor):
        table = table.dequantize()
    expected = QuantTensor.from_float(table.float(), bits=bits, refits=2)
    assert torch.equal(head.packed, expected.packed)
    plain.model.head.weights[0] = head
    plain.model.head.quantize = head.group_size
    assert torch.equal(rounded.logits(IDS), plain.logits(IDS))


def test_head_bits_are_an_upper_limit(tmp_path):
    """A head that has no more of them stays as it is."""
    path = tiny_gguf(tmp_path / "m.gguf", quant="Q4_0")
    assert torch.equal(load(path, head_bits=4).logits(IDS), load(path).logits(IDS))
    with pytest.raises(ValueError, match="head_bits: expected None, 4 or 8, got 3"):
        load(path, head_bits=3)
