"""Training, torch.compile and torch.export of patched models."""

import copy
import warnings

import pytest
import torch
from compare import assert_close

import pyllm
from pyllm.nn import QuantLinear

transformers = pytest.importorskip("transformers", minversion="5")


def tiny_llama(dtype=torch.float32, layers=2, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def sentences(n=4, length=12):
    """Token ids that a model can learn: each token says what the next two are."""
    start = torch.randint(0, 50, (n, 1), generator=torch.Generator().manual_seed(0))
    return (start + 7 * torch.arange(length)) % 50


def train(model, steps, learning_rate=1e-3):
    """The loss at each step."""
    ids, losses = sentences(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_gradients():
    """Of every parameter, in one step."""
    model, ids = tiny_llama(), sentences()
    exact, patched = copy.deepcopy(model).double(), copy.deepcopy(model)
    pyllm.patch(patched)
    for m in (model, exact, patched):
        m.train()(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(model.named_parameters())
    exactly = dict(exact.named_parameters())
    for name, parameter in patched.named_parameters():
        assert_close(parameter.grad, exactly[name].grad, theirs[name].grad, what=name)


def test_fine_tuning():
    """The loss falls as it does without the patch, to the error that float32 makes of it."""
    patched = tiny_llama()
    pyllm.patch(patched)
    losses = train(patched, 120)
    exact, plain = train(tiny_llama(torch.float64), 120), train(tiny_llama(), 120)
    assert losses[-1] < 0.5 * losses[0]
    assert_close(losses, exact, plain)
    pyllm.unpatch(patched)
    assert torch.isfinite(train(patched, 2)).all()


def test_attention_dropout():
    """It is transformers' own: the same numbers, and a warning."""
    model = tiny_llama(attention_dropout=0.3, attn_implementation="eager").train()
    patched, ids = copy.deepcopy(model), sentences()
    pyllm.patch(patched)
    torch.manual_seed(3)
    expected = model(input_ids=ids).logits
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="attention with dropout is computed by transformers"):
        actual = patched(input_ids=ids).logits
    torch.testing.assert_close(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.eval()(input_ids=ids)


def test_gradient_checkpointing():
    patched, ids = tiny_llama(), sentences()
    pyllm.patch(patched)
    plain = copy.deepcopy(patched)
    patched.gradient_checkpointing_enable()
    for m in (plain, patched):
        m.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in patched.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("linear", ["int8", "int4"])
def test_lora(linear):
    """peft finds the quantized layers, and what it trains learns; the base stays as it is."""
    model = tiny_llama()
    pyllm.patch(model, linear=linear)
    base = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    model = with_lora(model)
    adapters = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert len(adapters) == 6
    assert all(type(m.base_layer) is QuantLinear for m in adapters)
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.get_base_model().state_dict())
    for name, tensor in base.items():
        other = after.get(name, after.get(".base_layer.".join(name.rsplit(".", 1))))
        assert torch.equal(tensor, other), name
    with torch.no_grad():
        model.eval()(input_ids=ids)


def test_lora_is_not_merged_into_quantized_weights():
    model = tiny_llama()
    pyllm.patch(model, linear="int4")
    with pytest.raises(RuntimeError):
        with_lora(model).merge_adapter()


@torch.no_grad()
@pytest.mark.parametrize("linear", [None, "int4"])
def test_compile(linear):
    """In one graph, for any length."""
    model = tiny_llama(layers=1).eval()
    pyllm.patch(model, linear=linear)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (12, 9, 20):
        ids = sentences(2, length)
        expected = model(input_ids=ids, use_cache=False).logits
        actual = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected)


def test_compiled_training():
    model, ids = tiny_llama(layers=1), sentences()
    pyllm.patch(model)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


@torch.no_grad()
@pytest.mark.parametrize("linear", [None, "int4"])
def test_export(linear):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    model = tiny_llama(layers=1).eval()
    pyllm.patch(model, linear=linear)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Logits(model), (sentences(2, 12),), dynamic_shapes={"ids": {1: length}}
    )
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    wanted = ["rms_norm", "flash_attention"] + (["quant_matmul"] if linear else [])
    for name in wanted:
        assert any(f"pyllm.{name}" in call for call in calls), name
    ids = sentences(2, 17)
    torch.testing.assert_close(program.module()(ids), model(input_ids=ids).logits)
