"""`matmul`, `quant_matmul` and `embedding`, and their derivatives."""

import torch

from pyllm.ops._norm import wide
from pyllm.ops.library.define import (
    backward_implementation,
    define,
    implementation,
    into,
    named,
)
from pyllm.quant import QuantActivation, QuantFragments, QuantTensor

# What a quantized weight is in a schema, after the tensor `packed`.
_FORMAT = "SymInt n, SymInt k, SymInt bits, SymInt group_size, bool has_minimum, bool fragments"


def matmul(x, weight, bias, out, backend):
    """As the public function's arguments are."""
    return into("matmul", out, _matmul(x, weight, bias, named(backend)), x, weight, bias)


def quant_matmul(x, weight, bias, out, backend):
    """As the public function's arguments are, without `QuantRows`."""
    quantized = isinstance(x, QuantActivation)
    if not quantized and not isinstance(x, torch.Tensor):
        raise ValueError(
            f"quant_matmul: x: expected a tensor or a QuantActivation where PyTorch traces or "
            f"differentiates, got {type(x).__name__}"
        )
    tensor, group_size = (x.data, x.group_size) if quantized else (x, None)
    y = _quant_matmul(tensor, *_parts(weight), bias, group_size, named(backend))
    return into("quant_matmul", out, y, tensor, bias)


def quantize_activation(x, group_size, backend):
    """As the public function's arguments are."""
    data = _quantize(x, group_size, named(backend))
    return QuantActivation(data, x.shape[-1], group_size)


def embedding(token_ids, weight, out, backend):
    """As the public function's arguments are."""
    if isinstance(weight, QuantTensor):
        y = _quant_embedding(token_ids, *_parts(weight), named(backend))
    else:
        y = _embedding(token_ids, weight, named(backend))
    return into("embedding", out, y, *([] if isinstance(weight, QuantTensor) else [weight]))


def _parts(weight):
    format = (weight.bits, weight.group_size, weight.has_minimum)
    return weight.packed, *weight.shape, *format, isinstance(weight, QuantFragments)


def _weight(packed, n, k, bits, group_size, has_minimum, fragments):
    kind = QuantFragments if fragments else QuantTensor
    return kind(packed, (n, k), bits, group_size, has_minimum)


def _run_matmul(x, weight, bias, backend):
    return implementation("matmul", x, backend)(x, weight, bias, None)


def _fake_matmul(x, weight, bias, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_matmul(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_matmul(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    exact = torch.promote_types(x.dtype, weight.dtype)
    if ctx.needs_input_grad[0]:
        dx = (dy.to(exact) @ weight.to(exact)).to(x.dtype)
    if ctx.needs_input_grad[1]:
        rows = dy.reshape(-1, dy.shape[-1]).to(exact)
        dweight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(exact)).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        dbias = _sum_of_rows(dy, ctx.bias_dtype)
    return dx, dweight, dbias, None


def _sum_of_rows(dy, dtype):
    return wide(dy).reshape(-1, dy.shape[-1]).sum(0).to(dtype)


def _lower(dtype, x, weight, *rest):
    """As torch.matmul under autocast: in `dtype`. The bias is added in float32."""
    return _cast(x, dtype), _cast(weight, dtype), *rest


def _lower_first(dtype, x, *rest):
    return _cast(x, dtype), *rest


def _cast(x, dtype):
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


_matmul = define(
    "matmul(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor",
    _run_matmul, _fake_matmul, setup=_setup_matmul, backward=_backward_matmul, rows=("x",),
    autocast=_lower,
)  # fmt: skip


def _run_quant(x, packed, n, k, bits, group_size, has_minimum, fragments, bias, x_groups, backend):
    weight = _weight(packed, n, k, bits, group_size, has_minimum, fragments)
    x = x if x_groups is None else QuantActivation(x, k, x_groups)
    first = x if x_groups is None else x.data
    return implementation("quant_matmul", first, backend)(x, weight, bias, None)


def _fake_quant(x, packed, n, k, bits, group_size, has_minimum, fragments, bias, x_groups, backend):
    dtype = x.dtype if x_groups is None else torch.float32
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _setup_quant(ctx, inputs, output):
    _, packed, *ctx.format, bias, _, ctx.backend = inputs
    ctx.save_for_backward(packed)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_quant(ctx, dy):
    (packed,) = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _quant_gradient(dy, packed, *ctx.format, ctx.backend)
    if ctx.needs_input_grad[8]:
        dbias = _sum_of_rows(dy, ctx.bias_dtype)
    return dx, *[None] * 7, dbias, None, None


def _run_quant_gradient(dy, packed, *arguments):
    *format, backend = arguments
    function = backward_implementation("quant_matmul_backward", dy, backend)
    return function(dy, _weight(packed, *format))


def _fake_quant_gradient(dy, packed, n, k, *_):
    return dy.new_empty((*dy.shape[:-1], k))


_quant_gradient = define(
    f"quant_matmul_backward(Tensor dy, Tensor packed, {_FORMAT}, str? backend) -> Tensor",
    _run_quant_gradient, _fake_quant_gradient, rows=("dy",),
)  # fmt: skip
_quant_matmul = define(
    f"quant_matmul(Tensor x, Tensor packed, {_FORMAT}, Tensor? bias, SymInt? x_groups, "
    "str? backend) -> Tensor",
    _run_quant, _fake_quant, setup=_setup_quant, backward=_backward_quant, rows=("x",),
    autocast=_lower_first,
)  # fmt: skip


def _run_quantize(x, group_size, backend):
    data = implementation("quantize_activation", x, backend)(x, group_size).data
    k = x.shape[-1]
    data[:, k + 12 * (k // group_size) :] = 0  # nobody reads it, and the same input gives the same
    return data


def _fake_quantize(x, group_size, backend):
    k = x.shape[-1]
    shape = (x.numel() // k, QuantActivation.row_bytes(k, group_size))
    return x.new_empty(shape, dtype=torch.uint8)


_quantize = define(
    "quantize_activation(Tensor x, int group_size, str? backend) -> Tensor",
    _run_quantize, _fake_quantize,
)  # fmt: skip


def _run_embedding(token_ids, weight, backend):
    return implementation("embedding", token_ids, backend)(token_ids, weight, None)


def _fake_embedding(token_ids, weight, backend):
    return weight.new_empty((*token_ids.shape, weight.shape[1]))


def _setup_embedding(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.rows = inputs[1].shape[0]


def _backward_embedding(ctx, dy):
    (token_ids,) = ctx.saved_tensors
    dweight = torch.ops.aten.embedding_dense_backward(dy, token_ids, ctx.rows, -1, False)
    return None, dweight, None


_embedding = define(
    "embedding(Tensor token_ids, Tensor weight, str? backend) -> Tensor",
    _run_embedding, _fake_embedding, setup=_setup_embedding, backward=_backward_embedding,
)  # fmt: skip


def _run_quant_embedding(token_ids, packed, *arguments):
    *format, backend = arguments
    function = implementation("embedding", token_ids, backend)
    return function(token_ids, _weight(packed, *format), None)


def _fake_quant_embedding(token_ids, packed, n, k, *_):
    return packed.new_empty((*token_ids.shape, k), dtype=torch.float32)


_quant_embedding = define(
    f"quant_embedding(Tensor token_ids, Tensor packed, {_FORMAT}, str? backend) -> Tensor",
    _run_quant_embedding, _fake_quant_embedding,
)  # fmt: skip
