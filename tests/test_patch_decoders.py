"""Patched decoders of Hugging Face against the same models as they were."""

import copy
import re
import warnings

import pytest
import torch
from compare import assert_close

import pyllm

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {n: v for n, v in SIZES.items() if n != "num_key_value_heads"}
GEMMA = {
    **SIZES, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
WINDOW = {"sliding_window": 6, "layer_types": GEMMA["layer_types"]}

# family -> (configuration, its arguments)
FAMILIES = {
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 6}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, **WINDOW, "use_sliding_window": True, "head_dim": 24}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GEMMA),
    "phi3": ("Phi3", {**SIZES, "sliding_window": 50}),
    "gpt2": ("GPT2", {**HEADS, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", HEADS),
    "opt": ("OPT", {**HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64}),
}


def make(family, dtype=torch.float32, **changes):
    """A small model of random weights whose logits are well apart."""
    kind, sizes = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    return model.to(dtype).eval()


def prompts(*lengths):
    """Token ids ``[B, max]`` padded on the left, and their mask."""
    torch.manual_seed(0)
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, seen, n in zip(ids, mask, lengths, strict=True):
        row[-n:], seen[-n:] = torch.randint(3, SIZES["vocab_size"], (n,)), 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, inputs, **options):
    """Of the tokens that are no padding."""
    return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


def exact_logits(model, inputs):
    """In float64, each prompt alone: transformers makes NaN of padding in float64."""
    model, rows = copy.deepcopy(model).double(), []
    for ids, seen in zip(*inputs.values(), strict=True):
        padding = int(len(ids) - seen.sum())
        options = {}
        if model.config.model_type == "gpt2":  # counts its positions from the padding on
            options["position_ids"] = torch.arange(padding, len(ids))[None]
        rows.append(model(ids[None, padding:], **options).logits[0])
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, dtype):
    model, inputs = make(family, dtype), prompts(9, 13)
    expected = logits(model, inputs)
    exact = exact_logits(model, inputs)
    classes = {type(m).__name__ for m in model.modules()}
    report = pyllm.patch(model)
    assert report.left == ()
    kinds = {re.sub(r"torch\.|,.*", "", x.before) for x in report.replaced}
    assert kinds >= {n for n in classes if re.search("Norm|Attention|GELU|ReLU|Linear", n)}
    assert_close(logits(model, inputs), exact, expected)
    # without padding the mask is left to the kernel
    whole = prompts(11, 11)
    exact = exact_logits(make(family, dtype), whole)
    assert_close(logits(model, whole), exact, logits(make(family, dtype), whole))


GENERATE = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    model, inputs = make(family), prompts(5, 9)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = {n: model.generate(**inputs, **options, **way) for n, way in GENERATE.items()}
    pyllm.patch(model)
    for name, way in GENERATE.items():
        assert torch.equal(model.generate(**inputs, **options, **way), expected[name]), name


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_chunks(family):
    """A prompt in pieces: new queries over what is in the cache."""
    model, ids = make(family), prompts(12)["input_ids"]

    def run():
        cache = transformers.DynamicCache(config=model.config)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(5, 1)], 1)

    expected, exact = run(), copy.deepcopy(model).double()(ids).logits
    pyllm.patch(model)
    assert_close(run(), exact, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights(family):
    """They come from transformers, which is said."""
    model, inputs = make(family, attn_implementation="eager"), prompts(5, 9)
    expected = model(**inputs, output_attentions=True)
    pyllm.patch(model)
    with pytest.warns(UserWarning, match="attention weights is computed by transformers"):
        actual = model(**inputs, output_attentions=True)
    seen = inputs["attention_mask"].bool()
    for a, e in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a.mT[..., 4:], e.mT[..., 4:])
    torch.testing.assert_close(actual.logits[seen], expected.logits[seen])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch(family):
    model, inputs = make(family), prompts(5, 9)
    expected, config = model(**inputs).logits, model.config
    before = [(type(m), m.__dict__.get("config"), set(m.__dict__)) for m in model.modules()]
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    shared = type(model)(config)
    for linear in (None, "int8"):
        pyllm.patch(model, linear=linear)
        assert config._attn_implementation != "pyllm"
        assert shared.config is config
        assert not torch.equal(model(**inputs).logits, expected)
        pyllm.unpatch(model)
        after = [(type(m), m.__dict__.get("config"), set(m.__dict__)) for m in model.modules()]
        for (a_type, a_config, a_names), (b_type, b_config, b_names) in zip(
            after, before, strict=True
        ):
            assert a_type is b_type
            assert a_config is b_config
            assert a_names == b_names
        assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == tensors
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("linear", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized(family, linear):
    """Against the weights as they were rounded; a layer in one piece against its own forward."""
    model, inputs = make(family), prompts(9, 13)
    pyllm.patch(model, linear=linear)
    whole = logits(model, inputs)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    layered = logits(model, inputs)  # somebody looks at the parts
    handle.remove()
    weights = {n: m.quant.dequantize() for n, m in model.named_modules() if hasattr(m, "quant")}
    pyllm.unpatch(model)
    pyllm.patch(model, linear=linear, backend="reference")
    reference = logits(model, inputs)
    pyllm.unpatch(model)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        # a weight of its own: it may be that of the embedding
        turned = weight if isinstance(layer, torch.nn.Linear) else weight.t()
        layer.weight = torch.nn.Parameter(turned)
    exact = exact_logits(model, inputs)
    assert_close(reference, exact, logits(model, inputs))
    assert_close(whole, exact, layered)


@torch.no_grad()
def test_parts_are_looked_up():
    """What happens to a model after the patch counts."""
    model, inputs = make("llama"), prompts(5, 9)
    expected = logits(model, inputs)
    pyllm.patch(model)
    close = logits(model, inputs)
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    logits(model, inputs)
    assert seen == [1]
    handle.remove()
    layer = model.model.layers[1]
    original, layer.mlp = layer.mlp, torch.nn.Identity()
    assert not torch.allclose(logits(model, inputs), expected, atol=0.1)
    layer.mlp = original
    assert torch.equal(logits(model, inputs), close)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(model, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("linear", [None, "int8"])
def test_saving(linear, tmp_path):
    """A state dict goes from one patched model into another, and a copy is a model of its own."""
    model, other, inputs = make("qwen2"), make("qwen2"), prompts(5, 9)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    for m in (model, other):
        pyllm.patch(m, linear=linear)
    y = logits(model, inputs)
    assert not torch.equal(logits(other, inputs), y)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, inputs), y)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(logits(twin, inputs), y)
    if linear is None:
        twin.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        pyllm.unpatch(twin)
        assert torch.equal(logits(loaded, inputs), logits(twin, inputs))


def test_large_heads():
    model = make("llama", head_dim=260)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"layers.0.self_attn: expected heads of at most 256, got"):
        pyllm.patch(model)
    assert [type(m) for m in model.modules()] == classes
    pyllm.patch(model, attention=False)


def test_untested_families_are_left():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    report = pyllm.patch(transformers.BloomForCausalLM(config))
    assert {r.after for r in report.replaced} == {"pyllm.LayerNorm", "pyllm.Linear"}


@torch.no_grad()
def test_by_name():
    """``attn_implementation="pyllm"`` without a patch."""
    import pyllm.nn.huggingface  # noqa: F401

    inputs, expected = prompts(5, 9), make("llama")
    exact = exact_logits(expected, inputs)
    model = make("llama", attn_implementation="pyllm")
    assert_close(logits(model, inputs), exact, logits(expected, inputs))


@torch.no_grad()
def test_real_weights(smollm2):
    """SmolLM2 says the same, greedily and with beams."""
    from pyllm.bench.huggingface import hf_from_gguf

    model = hf_from_gguf(smollm2)
    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, (1, 16))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0}
    ways = {"greedy": {"do_sample": False}, "beams": {"do_sample": False, "num_beams": 2}}
    expected = {n: model.generate(ids, **options, **way) for n, way in ways.items()}
    pyllm.patch(model)
    for name, way in ways.items():
        assert torch.equal(model.generate(ids, **options, **way), expected[name]), name
