"""Quantized linear layers as modules."""

import copy
import io

import pytest
import torch
from compare import assert_close
from torch import nn

from pyllm.nn import QuantLinear
from pyllm.ops import quant_matmul
from pyllm.quant import QuantTensor


def linear(n=40, k=64, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_is_the_op(bits, bias, dtype):
    original = linear(bias=bias, dtype=dtype)
    layer, x = QuantLinear.from_linear(original, bits=bits), torch.randn(2, 3, 64, dtype=dtype)
    expected = quant_matmul(x, layer.quant, None if not bias else original.bias.float())
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == dtype
    assert layer.bias is original.bias
    # Weights that are on the grid are kept, so that what is left is the rounding of x.
    layer.backend = "reference"
    original.weight.copy_(layer.quant.dequantize())
    again = QuantLinear.from_linear(original, bits=bits)
    again.backend = "reference"
    exact = copy.deepcopy(original).double()(x.double())
    assert_close(again(x), exact, original(x))


def test_is_a_linear_layer():
    layer = QuantLinear.from_linear(linear())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 40)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "in_features=64, out_features=40, bias=True, bits=4, group_size=32, minimum" in str(
        layer
    )


@torch.no_grad()
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 16), (8, 32), (8, 64)])
def test_state_dict(bits, group_size):
    layer, x = QuantLinear.from_linear(linear(), bits, group_size), torch.randn(3, 64)
    fresh = QuantLinear(64, 40, bits=bits, group_size=group_size, has_minimum=bits == 4)
    assert not torch.equal(fresh(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = QuantLinear(64, 40, bits=bits, group_size=group_size, has_minimum=bits == 8)
    with pytest.raises((ValueError, RuntimeError), match=r"expected a weight of|size mismatch"):
        other.load_state_dict(layer.state_dict())


def test_formats_of_one_size_are_told_apart():
    """Groups of 16 without a minimum take as many bytes as groups of 32 with one."""
    layer = QuantLinear(64, 16, group_size=16, has_minimum=False)
    other = QuantLinear(64, 16, group_size=32, has_minimum=True)
    assert layer.weight.shape == other.weight.shape
    with pytest.raises(ValueError, match=r"expected a weight of .* \(4, 32, 1\), got \(4, 16, 0\)"):
        other.load_state_dict(layer.state_dict())


@torch.no_grad()
def test_from_quant_tensor():
    weight, bias = QuantTensor.from_float(torch.randn(7, 32)), torch.randn(7)
    layer, x = QuantLinear.from_quant_tensor(weight, bias), torch.randn(3, 32)
    assert torch.equal(layer(x), quant_matmul(x, weight, bias))
    assert layer.quant.packed.data_ptr() == weight.packed.data_ptr()


@torch.no_grad()
def test_conv1d():
    """The linear layer of GPT-2, whose weight lies the other way round."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(40, 64)
    torch.manual_seed(0)
    conv1d.weight.normal_()
    plain = nn.Linear(64, 40)
    plain.weight.copy_(conv1d.weight.t())
    plain.bias.copy_(conv1d.bias)
    x = torch.randn(3, 64)
    assert torch.equal(QuantLinear.from_linear(conv1d)(x), QuantLinear.from_linear(plain)(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_fuse(bias):
    """Layers of one input as one matrix: nothing is stored twice, each gives what it gave."""
    from pyllm.nn.quant_linear import fuse

    layers = [QuantLinear.from_linear(linear(n, bias=bias)) for n in (32, 16, 7)]
    x = torch.randn(3, 64)
    expected = [layer(x) for layer in layers]
    fused = fuse(layers)
    assert fused.shape == (55, 64)
    joined = torch.cat([layer.bias for layer in layers]) if bias else None
    assert torch.equal(quant_matmul(x, fused, joined), torch.cat(expected, 1))
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert fuse(layers).packed.data_ptr() == fused.packed.data_ptr()
    assert fuse([*layers, layers[0]]) is None  # 7 rows are padded
    assert fuse([layers[0], QuantLinear.from_linear(linear(), bits=8)]) is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected bits 4 or 8, got 3"):
        QuantLinear(64, 40, bits=3)
    with pytest.raises(ValueError, match="expected K to be a multiple of 32, got K = 40"):
        QuantLinear.from_linear(linear(k=40))
    with pytest.raises(TypeError, match="expected a QuantTensor, got Tensor"):
        QuantLinear.from_quant_tensor(torch.randn(3, 32))
    with pytest.raises(ValueError, match=r"bias: expected \[40\], got \[3\]"):
        QuantLinear.from_quant_tensor(QuantTensor.from_float(torch.randn(40, 32)), torch.ones(3))
