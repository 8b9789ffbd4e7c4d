"""Patched encoders and encoder-decoders of Hugging Face against the same models as they were."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

import pyllm
from pyllm.nn import encoders

transformers = pytest.importorskip("transformers", minversion="5")

VOCAB = 97
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = {
    **TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 80, "max_position_embeddings": 64,
}  # fmt: skip
DISTILBERT = {
    **TOKENS, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    **TOKENS, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    **TOKENS, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
VIT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "image_size": 20, "patch_size": 4,
}  # fmt: skip

# family -> (class of the model, configuration, its arguments, modules replaced)
FAMILIES = {
    "bert": ("BertForMaskedLM", "Bert", BERT, 16),
    "roberta": ("RobertaForMaskedLM", "Roberta", BERT, 15),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRoberta", BERT, 15),
    "camembert": ("CamembertForMaskedLM", "Camembert", BERT, 15),
    "electra": ("ElectraForMaskedLM", "Electra", {**BERT, "embedding_size": 32}, 16),
    "distilbert": ("DistilBertForMaskedLM", "DistilBert", DISTILBERT, 14),
    "t5": ("T5ForConditionalGeneration", "T5", T5, 22),
    "t5 gated": (
        "T5ForConditionalGeneration", "T5", {**T5, "feed_forward_proj": "gated-gelu"}, 26,
    ),
    "bart": ("BartForConditionalGeneration", "Bart", BART, 22),
    "marian": ("MarianMTModel", "Marian", {**BART, "scale_embedding": True}, 20),
    "whisper": ("WhisperForConditionalGeneration", "Whisper", WHISPER, 22),
    "vit": ("ViTForImageClassification", "ViT", VIT, 9),
}  # fmt: skip
BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
RAGGED = (*BERTS, "distilbert")
SEQ2SEQ = ("t5", "t5 gated", "bart", "marian", "whisper")


def make(family, dtype=torch.float32, spread=1.0, **changes):
    """A small model of random weights.

    With a larger `spread` what it writes is less of the same, and roundings grow on their way.
    """
    name, kind, sizes, _ = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, name)(config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * spread * parameter.shape[-1] ** -0.5
        if name.endswith("weight") and parameter.ndim == 1:  # a norm's
            parameter.data += 1
    return model.to(dtype).eval()


def texts(lengths=(5, 13, 1, 9), side="right"):
    """Token ids ``[B, max]`` padded on a side, and their mask."""
    torch.manual_seed(0)
    ids, mask = torch.ones(2, len(lengths), max(lengths), dtype=torch.long)
    mask.zero_()
    for row, seen, n in zip(ids, mask, lengths, strict=True):
        where = slice(n) if side == "right" else slice(len(row) - n, None)
        row[where], seen[where] = torch.randint(3, VOCAB, (n,)), 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(family, dtype=torch.float32, **options):
    torch.manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 20, 20, dtype=dtype)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 40, dtype=dtype)}
    return texts(**options)


def logits(model, inputs):
    """Of the positions that are no padding."""
    inputs = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    if not model.config.is_encoder_decoder:
        y = model(**inputs).logits
        return y[inputs["attention_mask"].bool()] if "attention_mask" in inputs else y
    start = texts((7, 4, 6, 1), side="right")
    rows = next(iter(inputs.values())).shape[0]
    y = model(
        **inputs, decoder_input_ids=start["input_ids"][:rows],
        decoder_attention_mask=start["attention_mask"][:rows],
    ).logits  # fmt: skip
    return y[start["attention_mask"][:rows].bool()]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, dtype, side):
    lengths = (7, 7) if side == "none" else (5, 13, 1, 9)
    model, inputs = make(family, dtype), inputs_of(family, dtype, lengths=lengths, side=side)
    expected = logits(model, inputs)
    exact = logits(copy.deepcopy(model).double(), inputs)
    report = pyllm.patch(model)
    replaced = [x for x in report.replaced if x.after != "pyllm.Linear"]
    assert (len(replaced), report.left) == (FAMILIES[family][-1], ())
    assert_close(logits(model, inputs), exact, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generate(family):
    model, inputs = make(family, spread=1.5), inputs_of(family)
    # No token twice: a random model would write one that says nothing about the ones before it.
    options = {
        "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1,
    }  # fmt: skip
    ways = {
        "greedy": {}, "beam": {"num_beams": 3}, "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
    }  # fmt: skip
    expected = {n: model.generate(**inputs, **options, **way) for n, way in ways.items()}
    assert all(len(set(row)) > 10 for row in expected["greedy"].tolist())
    pyllm.patch(model)
    for name, way in ways.items():
        assert torch.equal(model.generate(**inputs, **options, **way), expected[name]), name


def seen_by_layers(model, inputs):
    """The shapes that the feed-forward parts of the layers get, and the last hidden states."""
    shapes, handles = [], []
    name = "lin1" if "DistilBert" in type(model).__name__ else "intermediate.dense"
    for path, module in model.base_model.named_modules():
        if path.endswith(name):
            forward = module.forward
            module.forward = lambda x, f=forward: shapes.append(tuple(x.shape)) or f(x)
            handles.append(module)
    try:
        return shapes, model.base_model(**inputs).last_hidden_state
    finally:
        for module in handles:
            del module.forward


@torch.no_grad()
@pytest.mark.parametrize("limit", [4, 14, 1000])
@pytest.mark.parametrize("family", RAGGED)
def test_padding_is_left_out(family, limit, monkeypatch):
    monkeypatch.setattr(encoders, "GROUP", limit)
    model, inputs = make(family), texts((5, 13, 1, 9))
    expected = model.base_model(**inputs).last_hidden_state
    exact = copy.deepcopy(model).double().base_model(**inputs).last_hidden_state
    pyllm.patch(model)
    shapes, y = seen_by_layers(model, inputs)
    groups = {4: [5, 13, 1, 9], 14: [5, 14, 9], 1000: [28]}[limit]
    assert shapes == [(1, n, 48) for n in groups for _ in range(2)]
    real = inputs["attention_mask"].bool()
    assert_close(y[real], exact[real], expected[real])
    assert not y[~real].any()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(0, 5, 0, 3, 0), (0, 0)])
def test_texts_of_nothing(lengths, monkeypatch):
    monkeypatch.setattr(encoders, "GROUP", 4)
    model, inputs = make("bert"), texts(lengths) if any(lengths) else texts((1, 1))
    if not any(lengths):
        inputs["attention_mask"].zero_()
    expected = model.base_model(**inputs).last_hidden_state
    pyllm.patch(model)
    y = model.base_model(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    assert y.isfinite().all()
    torch.testing.assert_close(y[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("family", RAGGED)
def test_a_text_does_not_depend_on_its_padding(family):
    """But for what the linear layers of PyTorch make of another number of rows."""
    model = make(family)
    pyllm.patch(model)
    inputs = texts((5, 13, 1, 9))
    y = model.base_model(**inputs).last_hidden_state
    for row, n in enumerate((5, 13, 1, 9)):
        alone = {name: x[row : row + 1, :n] for name, x in inputs.items()}
        torch.testing.assert_close(model.base_model(**alone).last_hidden_state[0], y[row, :n])


@torch.no_grad()
@pytest.mark.parametrize("family", RAGGED)
def test_masks_that_are_more_than_padding(family):
    """Of every query its own, one that weighs, and one for all texts: computed as they are."""
    torch.manual_seed(2)
    model, ids = make(family), texts((9, 9))["input_ids"]
    own = torch.zeros(2, 1, 9, 9).masked_fill_(torch.rand(2, 1, 9, 9) < 0.3, float("-inf"))
    own.diagonal(dim1=2, dim2=3).zero_()
    weighs = torch.randn(2, 1, 1, 9)
    of_all = torch.zeros(1, 1, 1, 9).index_fill_(3, torch.tensor([2, 7]), float("-inf"))
    exact_model = copy.deepcopy(model).double()
    for mask in (own, weighs, of_all):
        expected = model(ids, attention_mask=mask).logits
        exact = exact_model(ids, attention_mask=mask.double()).logits
        pyllm.patch(model)
        assert_close(model(ids, attention_mask=mask).logits, exact, expected)
        pyllm.unpatch(model)


@torch.no_grad()
@pytest.mark.parametrize("family", RAGGED)
def test_hidden_states_and_hooks_see_the_batch(family):
    model, inputs = make(family), texts((5, 13, 1, 9))
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, output_hidden_states=True).hidden_states
    pyllm.patch(model)
    actual = model(**inputs, output_hidden_states=True).hidden_states
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[real], e[real])
    assert seen_by_layers(model, inputs)[0][0] == (1, 28, 48)  # the next call is ragged again
    shapes = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layer.1"))
    handle = layer.register_forward_hook(lambda m, args, y: shapes.append(tuple(args[0].shape)))
    model(**inputs)
    assert shapes == [(4, 13, 48)]
    handle.remove()
    assert seen_by_layers(model, inputs)[0][0] == (1, 28, 48)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights(family):
    """They come from transformers, which is said."""
    model, inputs = make(family, attn_implementation="eager"), inputs_of(family)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = texts((6,) * len(next(iter(inputs.values()))))["input_ids"]
    expected = model(**inputs, output_attentions=True)
    pyllm.patch(model)
    with pytest.warns(UserWarning, match="attention weights is computed by transformers"):
        actual = model(**inputs, output_attentions=True)
    names = [n for n in expected if n.endswith("attentions")]
    assert names
    for name in names:
        for a, e in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch(family):
    model, inputs = make(family), inputs_of(family)
    expected, config = logits(model, inputs), model.config

    def state():
        modules = [(type(m), m.__dict__.get("config"), set(m.__dict__)) for m in model.modules()]
        return modules, {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}

    before = state()
    for linear in (None, "int8"):
        pyllm.patch(model, linear=linear)
        assert config._attn_implementation != "pyllm"
        assert not torch.equal(logits(model, inputs), expected)
        pyllm.unpatch(model)
        (modules, tensors), (modules_before, tensors_before) = state(), before
        for (a, a_config, a_names), (b, b_config, b_names) in zip(
            modules, modules_before, strict=True
        ):
            assert (a, a_names) == (b, b_names)
            assert a_config is b_config
        assert tensors == tensors_before
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    """In training, with dropout off, and without padding, of a model that is not in training."""
    inputs = texts((5, 13, 1, 9))
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make("bert", **options).train(training)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step():
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    loss, gradients = step()
    pyllm.patch(model)
    patched_loss, patched = step()
    torch.testing.assert_close(patched_loss, loss)
    assert patched.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(patched[name], gradients[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_compile(family):
    """Without a break, and with the padding in its place: shapes do not depend on a mask."""
    model, inputs = make(family), inputs_of(family)
    if family == "t5":
        inputs["decoder_input_ids"] = texts((6,) * 4)["input_ids"]
    expected = model(**inputs).logits
    exact = (
        copy.deepcopy(model)
        .double()(**{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
        .logits
    )
    pyllm.patch(model)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    real = inputs["attention_mask"].bool() if family == "bert" else ...
    assert_close(y[real], exact[real], expected[real])


HAPPY = [
    "That is a happy person", "That is a happy dog", "That is a very happy person",
    "Today is a sunny day",
]  # fmt: skip
PUBLISHED = [0.6946, 0.9429, 0.2569]


@torch.no_grad()
def test_minilm(minilm):
    """The cosines that its authors publish, alone and in a batch with a long text."""
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def embed(texts):
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        seen = inputs["attention_mask"][..., None]
        return F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1)

    before = embed(HAPPY)
    pyllm.patch(model)
    for others in ([], [" ".join(HAPPY * 4)]):
        y = embed(HAPPY + others)[: len(HAPPY)]
        torch.testing.assert_close(y[0] @ y[1:].T, torch.tensor(PUBLISHED), atol=1e-3, rtol=0)
        torch.testing.assert_close(y, before, atol=1e-6, rtol=0)
