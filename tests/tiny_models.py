"""Small random checkpoints in the formats that we read, written by other people's libraries.

`tiny_gguf` writes with the gguf package, `tiny_hf` with transformers.
"""

import json
from pathlib import Path

import numpy as np
from pyllm.bench.huggingface import rope_arguments

# Byte offsets of the fp16 scale and (positive) minimum in a K-quant's block, and the scale that
# makes weights of size 1: the gguf package reads these types but does not write them.
K_QUANTS = {
    "Q2_K": (80, 82, 1 / 12),
    "Q3_K": (108, None, 1 / 30),
    "Q4_K": (0, 2, 1 / 250),
    "Q5_K": (0, 2, 1 / 500),
    "Q6_K": (208, None, 1 / 1200),
}
K_MEANS = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}  # of a quant: minimum / scale for a zero mean

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 320


def byte_level_vocabulary(size=VOCAB):
    """Tokens and merges of a byte-level BPE: special tokens, the bytes, then joined letters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokens, merges = [*SPECIAL, *alphabet], []
    pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te"]
    pairs += [f"\u0120{letter}" for letter in "abcdefghilmnoprstuw"]
    for left, right in pairs:
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    assert len(tokens) <= size
    return [*tokens, *(f"<unused{i}>" for i in range(size - len(tokens)))], merges


def quantized(weight, quant, rng):
    """float32 [out, in] as an array of the type's bytes (or floats); random where the gguf
    package cannot quantize."""
    import gguf

    if quant in K_QUANTS:
        kind = gguf.GGMLQuantizationType[quant]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (weight.size // block, nbytes), dtype=np.uint8)
        scale_at, minimum_at, unit = K_QUANTS[quant]
        scale = (weight.std() * unit * rng.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, scale_at : scale_at + 2] = scale.view(np.uint8).reshape(-1, 2)
        if minimum_at is not None:
            minimum = (scale * K_MEANS[quant]).astype(np.float16)
            blocks[:, minimum_at : minimum_at + 2] = minimum.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(*weight.shape[:-1], -1), kind
    kind = gguf.GGMLQuantizationType[quant]
    return gguf.quants.quantize(weight, kind), kind


def interleave(weight, heads):
    """Rows of a q or k projection from Hugging Face's order (halves) to GGUF's llama (pairs)."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def llama3_frequency_factors(scaling, head_dim, theta):
    """The tensor rope_freqs for Llama 3's rope scaling: what each frequency is divided by."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    factors = np.where(wavelengths < original / high, 1.0, factors)
    factors = np.where(wavelengths > original / low, scaling["factor"], factors)
    return factors.astype(np.float32)


def tiny_gguf(
    path,
    arch="llama",
    quant="Q4_1",
    *,
    embedding_quant=None,
    hidden=None,
    ffn=None,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=None,
    tied=True,
    context=512,
    theta=10000.0,
    rope_scaling=None,
    tokenizer="gpt2",
    seed=0,
):
    """Writes a random GGUF model and returns its path.

    Args:
        arch: "llama" (interleaved rope, so permuted q and k), "qwen2" (biases on q, k, v) or
            "qwen3" (norms on the heads of q and k).
        quant: type of the matrices; `embedding_quant` (the same by default) of the embedding.
        hidden, ffn: widths; multiples of 256 for the K-quants.
        rope_scaling: Hugging Face's dict, rope_type "linear" or "llama3".
        tokenizer: "gpt2", "llama" or None.
    """
    import gguf

    rng = np.random.default_rng(seed)
    hidden = hidden or (256 if quant in K_QUANTS or embedding_quant in K_QUANTS else 64)
    ffn, head_dim = ffn or 2 * hidden, head_dim or hidden // heads
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(VOCAB)
    if head_dim != hidden // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    _write_tokenizer(writer, tokenizer)

    def norm(name, size):
        writer.add_tensor(name, rng.uniform(0.5, 1.5, size).astype(np.float32))

    def matrix(name, rows, columns, kind=quant, permuted_heads=None):
        weight = rng.standard_normal((rows, columns), dtype=np.float32) * 1.5 / columns**0.5
        if permuted_heads and arch == "llama":
            weight = interleave(weight, permuted_heads)
        data, raw = quantized(weight, kind, rng)
        writer.add_tensor(name, data, raw_dtype=raw)

    if rope_scaling and rope_scaling["rope_type"] == "llama3":
        writer.add_tensor(
            "rope_freqs.weight", llama3_frequency_factors(rope_scaling, head_dim, theta)
        )
    elif rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling["rope_type"]))
        writer.add_rope_scaling_factor(rope_scaling["factor"])
    matrix("token_embd.weight", VOCAB, hidden, embedding_quant or quant)
    for i in range(layers):
        block = f"blk.{i}"
        norm(f"{block}.attn_norm.weight", hidden)
        projections = {"q": (heads, heads), "k": (kv_heads, kv_heads), "v": (kv_heads, None)}
        for which, (count, permuted) in projections.items():
            name = f"{block}.attn_{which}"
            matrix(f"{name}.weight", count * head_dim, hidden, permuted_heads=permuted)
            if arch == "qwen2":
                bias = rng.standard_normal(count * head_dim, dtype=np.float32)
                writer.add_tensor(f"{name}.bias", bias)
            if arch == "qwen3" and which != "v":
                norm(f"{name}_norm.weight", head_dim)
        matrix(f"{block}.attn_output.weight", hidden, heads * head_dim)
        norm(f"{block}.ffn_norm.weight", hidden)
        matrix(f"{block}.ffn_gate.weight", ffn, hidden)
        matrix(f"{block}.ffn_up.weight", ffn, hidden)
        matrix(f"{block}.ffn_down.weight", hidden, ffn)
    norm("output_norm.weight", hidden)
    if not tied:
        matrix("output.weight", VOCAB, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _write_tokenizer(writer, kind):
    if kind is None:
        return
    writer.add_tokenizer_model(kind)
    writer.add_chat_template(CHAT_TEMPLATE)
    if kind == "gpt2":
        tokens, merges = byte_level_vocabulary()
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        unused = [t.startswith("<unused") for t in tokens]
        writer.add_token_types(
            [3 if t in SPECIAL else 5 if u else 1 for t, u in zip(tokens, unused, strict=True)]
        )
        writer.add_token_merges(merges)
        writer.add_add_bos_token(False)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        return
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3, *[6] * 256]
    pieces = [
        "\u2581t",
        "he",
        "\u2581the",
        "in",
        "er",
        "\u2581a",
        "on",
        "\u2581in",
        "ing",
        "\u2581",
    ]
    pieces += [*"etaoinsrhldcumfpgwybvk", "\u00e9", "\u2581w", "or", "ld", "ll", "lo"]
    pieces += [f"<unused{i}>" for i in range(VOCAB - len(tokens) - len(pieces))]
    writer.add_token_list([*tokens, *pieces])
    writer.add_token_types([*types, *(5 if p.startswith("<un") else 1 for p in pieces)])
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(len(pieces))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tiny_hf(
    path,
    kind="llama",
    *,
    hidden=64,
    ffn=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=None,
    tied=False,
    context=512,
    theta=10000.0,
    rope_scaling=None,
    dtype="float32",
    max_shard_size="5GB",
    seed=0,
    **config,
):
    """Writes a random Hugging Face directory with a tokenizer and returns its path.

    Args:
        kind: "llama", "mistral", "qwen2" or "qwen3".
        max_shard_size: small ("20KB") for several shards and an index.
        config: further arguments of the config class (sliding_window=..., attention_bias=...).
    """
    import torch
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=1.5 / hidden**0.5,
        **rope_arguments(theta, rope_scaling),
        **config,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    with torch.no_grad():  # norms and biases begin at one and zero, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(getattr(torch, dtype))
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(path, max_shard_size=max_shard_size)
    _save_tokenizer(Path(path))
    return Path(path)


def _save_tokenizer(path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = byte_level_vocabulary()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[1],
                "eos_token": {"content": SPECIAL[2], "__type": "AddedToken"},
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
