"""A GGUF file's model in Hugging Face transformers: a peer here, and the oracle of the tests."""

import numpy as np
import torch

# GGUF tensor -> Hugging Face parameter
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    """The Hugging Face name of a GGUF tensor of a llama-like model; None for rope_freqs."""
    if name == "rope_freqs.weight":
        return None
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def hf_from_gguf(path, rope_scaling=None):
    """The transformers model in float32 with the dequantized weights of a GGUF file.

    Args:
        rope_scaling: Hugging Face's dict, where the file scales (it cannot be read back).
    """
    import gguf
    import transformers

    reader = gguf.GGUFReader(str(path))
    # The fields by hand: contents() of the token list would take seconds.
    get = {k: f.contents() for k, f in reader.fields.items() if len(f.data) == 1}
    arch = get["general.architecture"]
    get = {k.removeprefix(f"{arch}."): v for k, v in get.items()}
    heads = get["attention.head_count"]
    tensors = {t.name: t for t in reader.tensors}
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=get["embedding_length"],
        intermediate_size=get["feed_forward_length"],
        num_hidden_layers=get["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=get["attention.head_count_kv"],
        head_dim=get.get("attention.key_length", get["embedding_length"] // heads),
        max_position_embeddings=get["context_length"],
        rms_norm_eps=get["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in tensors,
        **rope_arguments(get["rope.freq_base"], rope_scaling),
    )
    state = {}
    for name, tensor in tensors.items():
        target = hf_name(name)
        if target is None:
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if arch == "llama" and ".attn_q." in name:
            weight = deinterleave(weight, heads)
        if arch == "llama" and ".attn_k." in name:
            weight = deinterleave(weight, get["attention.head_count_kv"])
        state[target] = torch.from_numpy(weight.copy())
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    model.load_state_dict(state)
    return model


def rope_arguments(theta, scaling):
    """The rope arguments of a config, in the form of transformers 4 or 5."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
        return {"rope_parameters": parameters}
    return {"rope_theta": theta, "rope_scaling": scaling}


def deinterleave(weight, heads):
    """Rows of a q or k projection from GGUF's llama order (pairs) to Hugging Face's (halves)."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
