"""Decoder layers of transformers in as few calls as there are kernels.

With one new token a layer's kernels take less time than the calls around them. At inference on the
CPU the whole layer is therefore computed here: q, k and v, and gate and up, by one product each
where they are quantized, with the norm before rounding its result for it and the residual added in
the next one. In training, under torch.compile, with hooks on a part of the layer, or with parts
that are not those that were patched, the layer's own forward calls its modules as ever.
"""

import threading
from operator import is_

import torch
from torch import nn
from torch.nn.modules import module as _hooks

from pyllm.nn.activation import gated
from pyllm.nn.attend import NAME, attend
from pyllm.nn.linear import Linear, multiply
from pyllm.nn.quant_linear import QuantLinear, fuse
from pyllm.nn.swap import Swapped, Unfit, original_class
from pyllm.ops import quant_matmul, rope_cache
from pyllm.ops.registry import dispatches

_IMPLEMENTATION = "_attn_implementation_internal"
# Arguments of a layer that change nothing here.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions"}


class DecoderLayer(Swapped):
    """Of Llama and its relatives, with norms around both blocks (Gemma) or before them."""

    @classmethod
    def settings(cls, module):
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            if not isinstance(getattr(module, name, None), nn.Module):
                raise Unfit(f"expected a module {name}")
        return {"pyllm_parts": None}

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        **kwargs,
    ):
        parts = self._parts(hidden_states, position_embeddings, kwargs)
        if parts is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch, length, width = hidden_states.shape
        x = hidden_states.reshape(-1, width)
        y = parts.before_attention.forward(x, quantize=parts.qkv.group_size)
        y = parts.attend(
            y, (batch, length), x, attention_mask, position_embeddings, past_key_values
        )
        y = parts.output(y, x)
        if parts.after_attention is not None:
            y = parts.after_attention.forward(y)
        y, x = parts.before_mlp.forward(y, residual=x, quantize=parts.gate_up.group_size)
        gate, up = parts.gate_up(y, x)
        y = gated(parts.kind, gate, up, quantize=parts.down.group_size, backend=self.backend)
        y = parts.down(y, x)
        if parts.after_mlp is not None:
            y = parts.after_mlp.forward(y)
        return y.add_(x).view(batch, length, width)

    def _parts(self, x, position_embeddings, kwargs):
        """What the layer is made of, or None where its own forward has to serve."""
        if (
            torch.is_grad_enabled()
            or dispatches(x)
            or self.training
            or position_embeddings is None
            or not x.is_cpu
            or x.numel() == 0
            or not kwargs.keys() <= _HARMLESS
            or kwargs.get("output_attentions")
        ):
            return None
        parts = self.pyllm_parts
        if parts is None or not parts.current():
            parts = self.pyllm_parts = Parts(self)
        return parts if parts.fit and not parts.hooked() else None

    def __getstate__(self):
        return {**self.__dict__, "pyllm_parts": None}


class Parts:
    """The modules of a layer, as they were found at a call."""

    def __init__(self, layer):
        # Where each module below the layer is found, and each packed weight: a dictionary, a name
        # in it, and what is there. As three lists, which are compared without a loop in Python.
        self.owners, self.names, self.found = [], [], []
        for owner in layer.modules():
            for name, module in owner._modules.items():
                self._note(owner._modules, name, module)
        self.hooks = [_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks]
        for module in self.found:
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.fit = self._find(layer)

    def _note(self, owner, name, part):
        self.owners.append(owner)
        self.names.append(name)
        self.found.append(part)

    def current(self) -> bool:
        """Whether these still are the parts of the layer."""
        return all(map(is_, map(dict.get, self.owners, self.names), self.found))

    def hooked(self) -> bool:
        """Whether something wants to see the calls of the modules."""
        return any(self.hooks)

    def _find(self, layer):
        attention, mlp, self.backend = layer.self_attn, layer.mlp, layer.backend
        self.attention, self.kind = attention, getattr(mlp, "pyllm_kind", None)
        # Gemma's names differ: there is a norm after each block, too.
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        self.before_attention, self.before_mlp = layer.input_layernorm, getattr(layer, before_mlp)
        self.after_attention = layer.post_attention_layernorm if sandwich else None
        self.after_mlp = layer.post_feedforward_layernorm if sandwich else None
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        norms = (
            self.before_attention, self.after_attention, self.before_mlp, self.after_mlp,
            self.q_norm, self.k_norm,
        )  # fmt: skip
        linears = (
            _first(attention, ["qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
            _first(attention, ["o_proj"]),
            _first(mlp, ["gate_up_proj"], ["gate_proj", "up_proj"]),
            _first(mlp, ["down_proj"]),
        )
        config = getattr(attention, "config", None)
        if (
            self.kind is None
            or getattr(config, _IMPLEMENTATION, None) != NAME
            or not all(norm is None or hasattr(norm, "pyllm_eps") for norm in norms)
            or not all(type(linear) in (QuantLinear, Linear) for part in linears for linear in part)
        ):
            return False
        self._note(config.__dict__, _IMPLEMENTATION, NAME)
        self.head_dim = attention.head_dim
        query, kv = config.num_attention_heads, config.num_key_value_heads
        self.heads, self.layer = (query, kv, kv), attention.layer_idx
        self.causal, self.scale = attention.is_causal, attention.scaling
        self.window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        gemma2 = original_class(attention).__name__ == "Gemma2Attention"
        self.softcap = attention.attn_logit_softcapping if gemma2 else None
        sizes = [n * self.head_dim for n in self.heads], None, [mlp.down_proj.in_features] * 2, None
        self.qkv, self.output, self.gate_up, self.down = map(
            Projection, linears, sizes, [self.backend] * 4
        )
        for linear in (linear for part in linears for linear in part):
            if isinstance(linear, QuantLinear):
                self._note(linear._buffers, "weight", linear.weight)
        return True

    def attend(self, y, shape, x, mask, position_embeddings, past_key_values):
        """The heads' results ``[T, H * D]`` of the normalized tokens `y`."""
        rows, dim = len(x), self.head_dim
        q, k, v = (part.view(rows, -1, dim) for part in self.qkv(y, x))
        if self.q_norm is not None:
            q = self.q_norm.forward(q)
        if self.k_norm is not None:
            k = self.k_norm.forward(k)
        cos_sin, positions, starts, page = _rotation(position_embeddings, shape)
        # To the op one sequence and a cache of one page, in which it leaves k and v.
        keys, values = torch.empty((2, 1, rows, self.heads[1], dim), dtype=x.dtype).unbind()
        q = rope_cache(
            q, k, v, cos_sin, positions, keys, values, cu_seqlens_q=starts, page_table=page,
            backend=self.backend,
        )  # fmt: skip
        q = q.view(*shape, -1, dim)
        if shape[0] > 1:
            keys, values = keys.view(*shape, -1, dim), values.view(*shape, -1, dim)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer)
        return attend(
            q, keys, values, mask, causal=self.causal, scale=self.scale, window=self.window,
            softcap=self.softcap, backend=self.backend,
        ).view(rows, -1)  # fmt: skip


class Projection:
    """Linear layers of one input, whose outputs have `sizes`; None: of a single one."""

    def __init__(self, linears, sizes, backend):
        self.linears, self.sizes, self.backend = linears, sizes, backend
        self.quants = [m.quant if isinstance(m, QuantLinear) else None for m in linears]
        self.biased = linears[0].bias is not None
        groups = {quant and quant.packed_group_size for quant in self.quants}
        # The groups that the op before may round its result in, for all of these.
        self.group_size = groups.pop() if len(groups) == 1 else None
        alike = self.group_size and len({m.bias is None for m in linears}) == 1
        # All in one product; None: one after the other.
        self.whole = self.quants[0] if len(linears) == 1 else fuse(linears) if alike else None

    def __call__(self, y, x):
        """The products, in the dtype of `x`."""
        if self.whole is None:
            return self._each(y, x)
        bias = None
        if self.biased:
            biases = [m._parameters["bias"] for m in self.linears]
            bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        product = _quant_product(y, self.whole, bias, x, self.backend)
        return product if self.sizes is None else torch.split_with_sizes(product, self.sizes, 1)

    def _each(self, y, x):
        products = [
            multiply(y, linear.weight, linear.bias, self.backend)
            if quant is None
            else _quant_product(y, quant, linear.bias, x, self.backend)
            for linear, quant in zip(self.linears, self.quants, strict=True)
        ]
        if len(products) > 1:
            return products
        return products[0] if self.sizes is None else products[0].split(self.sizes, 1)


def _quant_product(y, weight, bias, x, backend):
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    out = None
    if x.dtype != torch.float32 and not isinstance(y, torch.Tensor):
        out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype)
    return quant_matmul(y, weight, bias, out=out, backend=backend)


def _first(owner, *alternatives):
    """The modules of the first alternative that `owner` has."""
    for names in alternatives:
        if all(hasattr(owner, name) for name in names):
            return [getattr(owner, name) for name in names]
    return [None]


_local = threading.local()


def _rotation(embeddings, shape):
    """What `rope_cache` takes, worked out by the first layer of a step for all.

    Two are kept, because there are models with two kinds of layers.
    """
    kept = getattr(_local, "rotations", ())
    for of, of_shape, rotation in kept:
        if of is embeddings and of_shape == shape:
            return rotation
    rows = shape[0] * shape[1]
    halves = [x[..., : x.shape[-1] // 2] for x in embeddings]
    table = torch.cat(halves, -1).float().expand(*shape, -1).reshape(rows, -1)
    ends = torch.tensor([0, rows], dtype=torch.int32)
    page = torch.zeros(1, 1, dtype=torch.int32)
    rotation = table, torch.arange(rows, dtype=torch.int32), ends, page
    _local.rotations = ((embeddings, shape, rotation), *kept[:1])
    return rotation
