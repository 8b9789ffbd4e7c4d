"""A linear layer whose weight is quantized."""

import torch
from torch import nn

from pyllm import memory
from pyllm.ops import quant_matmul
from pyllm.quant import QuantTensor, packing


class QuantLinear(nn.Linear):
    """``x @ dequantize(weight)ᵀ + bias``, for inference and as the frozen base of adapters.

    A subclass of ``torch.nn.Linear``, so that what looks for linear layers finds it (peft puts LoRA
    over it). `weight` is not a parameter but a buffer, the packed bytes of a `QuantTensor`; the
    gradient goes to the input and the bias. The state dict has the format too, and loading
    another one raises.

    Args:
        in_features, out_features, bias: as of ``torch.nn.Linear``.
        bits, group_size, has_minimum: of the `QuantTensor`.

    Attributes:
        backend: of the op; None: as `pyllm.ops.registry` chooses.

    Raises:
        ValueError: for a format that `QuantTensor` does not know, or that does not divide
            `in_features`.
    """

    backend = None

    def __init__(
        self, in_features, out_features, bias=True, *, bits=4, group_size=32, has_minimum=True
    ):
        zeros = torch.zeros(out_features, in_features)
        quant = QuantTensor.from_float(
            zeros, bits=bits, group_size=group_size, symmetric=not has_minimum
        )
        self._init(quant, nn.Parameter(torch.zeros(out_features)) if bias else None)

    def _init(self, quant, bias):
        nn.Module.__init__(self)
        self.out_features, self.in_features = quant.shape
        self.bits, self.group_size = quant.bits, quant.group_size
        self.has_minimum = quant.has_minimum
        # As int8, by which T5 and its relatives know that x is not to be cast to it.
        self.register_buffer("weight", quant.packed.view(torch.int8))
        self.register_parameter("bias", bias)

    @staticmethod
    def from_quant_tensor(weight: QuantTensor, bias=None) -> "QuantLinear":
        """A layer over a `QuantTensor` ``[N, K]``, which it shares, and a bias ``[N]`` or None."""
        if not isinstance(weight, QuantTensor):
            raise TypeError(f"QuantLinear: expected a QuantTensor, got {type(weight).__name__}")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(
                f"QuantLinear: bias: expected [{weight.shape[0]}], got {list(bias.shape)}"
            )
        layer = QuantLinear.__new__(QuantLinear)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        layer._init(weight, bias)
        return layer

    @staticmethod
    def from_linear(linear, bits=4, group_size=32) -> "QuantLinear":
        """Rounds the weight of `linear`; the bias is shared.

        8 bits are rounded symmetrically, 4 bits with a minimum a group, fitted by least squares.

        Args:
            linear: ``torch.nn.Linear``, or the Conv1D of transformers, whose weight lies the other
                way round.
            group_size: see `QuantTensor`.

        Raises:
            ValueError: see `QuantTensor.from_float`.
        """
        weight = linear.weight.detach()
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        options = {"symmetric": True} if bits == 8 else {"refits": 2}
        quant = QuantTensor.from_float(weight, bits=bits, group_size=group_size, **options)
        layer = QuantLinear.from_quant_tensor(quant, linear.bias)
        return layer.train(linear.training)

    @property
    def quant(self) -> QuantTensor:
        """The weight as a `QuantTensor`; it shares the buffer."""
        weight = self._buffers["weight"]
        of, kept = self.__dict__.get("_quant", (None, None))
        if of is not weight:
            shape, packed = (self.out_features, self.in_features), weight.view(torch.uint8)
            kept = QuantTensor(packed, shape, self.bits, self.group_size, self.has_minimum)
            self.__dict__["_quant"] = weight, kept
        return kept

    def forward(self, x):
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        return quant_matmul(x, self.quant, bias, backend=self.backend)

    def get_extra_state(self):
        return torch.tensor([self.bits, self.group_size, self.has_minimum], dtype=torch.int32)

    def set_extra_state(self, state):
        own = self.get_extra_state().tolist()
        if state.tolist() != own:
            raise ValueError(
                "QuantLinear: expected a weight of (bits, group_size, has_minimum) "
                f"{tuple(own)}, got {tuple(state.tolist())}"
            )

    def _load_from_state_dict(self, *arguments, **options):
        # The forms that were packed for other backends are of the weight before.
        self.__dict__.pop("_quant", None)
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_quant"}

    def extra_repr(self):
        minimum = ", minimum" if self.has_minimum else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}{minimum}"
        )


def fuse(linears) -> QuantTensor | None:
    """The weights of several layers below each other, if they are of one format.

    The layers' buffers become views of it: they lie in memory once. None if the formats differ or a
    layer but the last has rows that its packed form pads.
    """
    formats = {(m.in_features, m.bits, m.group_size, m.has_minimum) for m in linears}
    if len(formats) > 1 or any(m.out_features % packing.PANEL_ROWS for m in linears[:-1]):
        return None
    parts = [m.weight.view(torch.uint8) for m in linears]
    sizes = [part.numel() for part in parts]
    ends = [part.data_ptr() + size for part, size in zip(parts, sizes, strict=True)]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) == 1 and ends[:-1] == [part.data_ptr() for part in parts[1:]]:
        packed = parts[0].as_strided((sum(sizes),), (1,))
    else:
        packed = memory.allocate(sum(sizes)).copy_(torch.cat(parts))
        for linear, view in zip(linears, packed.split(sizes), strict=True):
            linear.weight = view.view(torch.int8)
    k, bits, group_size, has_minimum = formats.pop()
    n = sum(m.out_features for m in linears)
    return QuantTensor(packed, (n, k), bits, group_size, has_minimum)
