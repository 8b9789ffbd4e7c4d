"""Finds a model's tensors in a checkpoint, checks their shapes, and packs them for the kernels."""

import copy

import torch

from pyllm.models.config import ModelError
from pyllm.nn import Embedding, FusedLinear, RMSNorm
from pyllm.ops.quant_matmul import place
from pyllm.quant import QuantTensor

_FLOATS = ("F32", "F16", "BF16")
_QUANTIZE = {None: None, "int8": 8, "int4": 4}


class Weights:
    """The tensors of a checkpoint by our own names, see the family's ``NAMES``.

    Each is packed as it is read, brought to its device, and the file's pages are let go at once:
    there is never a second copy of more than one tensor.

    Args:
        device: where to bring them.
        dtype: what the model computes in, a half. The embedding, and other matrices that are not
            quantized, are kept in it. None: in float32, with matrices as in the file.
    """

    def __init__(
        self, checkpoint, family, quantize=None, head_bits=None, progress=None, device="cpu",
        dtype=None,
    ):  # fmt: skip
        if quantize not in _QUANTIZE:
            raise ValueError(f"quantize: expected None, 'int8' or 'int4', got {quantize!r}")
        if head_bits not in (None, 4, 8):
            raise ValueError(f"head_bits: expected None, 4 or 8, got {head_bits!r}")
        self._checkpoint = checkpoint
        self._family = family
        self._quantize = quantize
        self._head_bits = head_bits
        self._device = torch.device(device)
        self._dtype = dtype
        self._layer = None
        self._progress = progress
        # One list for all layers' views of this: bytes done, bytes in all.
        self._bytes = [0, sum(t.nbytes for t in checkpoint.tensors.values())]

    def layer(self, i: int) -> "Weights":
        """The same with ``{i}`` filled in."""
        view = copy.copy(self)
        view._layer = i
        return view

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return self._stored_name(name) in self._checkpoint.tensors

    def vector(self, name: str, n: int) -> torch.Tensor | None:
        """A float32 ``[n]``, or None if it is optional and absent."""
        info = self._info(name, (n,))
        if info is None:
            return None
        if info.type not in _FLOATS:
            raise ModelError(f"{info.name}: expected {' or '.join(_FLOATS)}, got {info.type}")
        return self._checkpoint.float_tensor(info.name).float().clone().to(self._device)

    def rms_norm(self, name: str, n: int, eps: float) -> RMSNorm | None:
        """The layer with this weight, or None if it is optional and absent."""
        weight = self.vector(name, n)
        if weight is None:
            return None
        norm = RMSNorm(n, eps, device="meta")
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        return norm

    def matrix(self, name: str, *, n: int, k: int):
        """``[n, k]`` as a `QuantTensor` or a float tensor."""
        return self._pack([self._info(name, (n, k))], bits=8 if self._quantize else None)

    def embedding(self, matrix) -> Embedding:
        """The layer with this `matrix`."""
        if self._dtype is None:
            return Embedding(matrix)
        if isinstance(matrix, QuantTensor):
            matrix = matrix.to(self._device).dequantize()
        return Embedding(self._place(matrix), self._dtype)

    def linear(self, *names: str, k: int, n: list[int]) -> FusedLinear:
        """Linear layers ``[n_i, k]`` on one input, those of one format in one matrix."""
        weights, *options = self._fused(names, k, n)
        return FusedLinear([self._place(weight) for weight in weights], *options)

    def _fused(self, names, k, n):
        """The arguments of a `FusedLinear`, its weights still on the host."""
        infos = [self._info(name, (n_i, k)) for name, n_i in zip(names, n, strict=True)]
        groups: list[list[int]] = []
        for i, info in enumerate(infos):
            if (
                groups
                and infos[groups[-1][0]].type == info.type
                and k % 32 == 0
                and n[i - 1] % 16 == 0
            ):
                groups[-1].append(i)
            else:
                groups.append([i])
        bits = 8 if names == ("head",) and self._quantize else _QUANTIZE[self._quantize]
        weights = [self._pack([infos[i] for i in group], bits) for group in groups]
        biases = [self._bias([names[i] for i in group], [n[i] for i in group]) for group in groups]
        return weights, biases, [[n[i] for i in group] for group in groups]

    def head(self, embedding, *, k: int, n: int) -> FusedLinear:
        """The output head, or the embedding if the checkpoint has no head of its own.

        With `head_bits` it is rounded. The embedding stays what it was also where it is the same
        matrix: a row of it is all that a token reads, and a head of 4 bits adds 5 bits a weight to
        the 8.5 of Q8_0 or the 16 of a float.
        """
        weight, bias = embedding, None
        if self.has("head"):
            (weight,), (bias,), _ = self._fused(("head",), k, [n])
        bits = self._head_bits
        if bits is not None and getattr(weight, "bits", 16) > bits:
            if k % 32:
                raise ModelError(f"head_bits: expected a hidden size in groups of 32, got {k}")
            weight = QuantTensor.from_float(weight, bits=bits, refits=2)
        return FusedLinear([self._place(weight)], [bias], dtype=torch.float32)

    def _place(self, weight):
        """`weight` where it is to be, in the form that the kernels there read."""
        if isinstance(weight, QuantTensor):
            return place(weight, self._device)
        return weight.to(self._device, self._dtype or weight.dtype)

    def _bias(self, names, sizes):
        parts = [
            self.vector(f"{name}_bias", size) if f"{name}_bias" in self._family.NAMES else None
            for name, size in zip(names, sizes, strict=True)
        ]
        if all(part is None for part in parts):
            return None
        parts = [
            torch.zeros(size, device=self._device) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
        return torch.cat(parts)

    def _pack(self, infos, bits):
        checkpoint, kind = self._checkpoint, infos[0].type
        if kind in _FLOATS:
            parts = [checkpoint.float_tensor(info.name) for info in infos]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            if bits is not None and weight.shape[1] % 32 == 0:
                weight = QuantTensor.from_float(weight.float(), bits=bits, symmetric=bits == 8)
        else:
            try:
                raw = [(checkpoint.raw(info.name), info.shape[0]) for info in infos]
                weight = QuantTensor.from_gguf_rows(raw, kind, infos[0].shape[1])
            except ValueError as error:
                raise ModelError(f"{infos[0].name}: {error}") from error
        self._bytes[0] += sum(info.nbytes for info in infos)
        if self._progress:
            self._progress(*self._bytes)
        if isinstance(weight, QuantTensor) or len(infos) > 1 or self._dtype:
            for info in infos:
                checkpoint.release(info.name)
        return weight

    def _info(self, name, shape):
        stored = self._stored_name(name)
        info = self._checkpoint.tensors.get(stored)
        if info is None:
            if name in self._family.OPTIONAL:
                return None
            raise ModelError(f"the checkpoint has no tensor {stored}")
        if tuple(info.shape) != tuple(shape):
            raise ModelError(f"{stored}: expected shape {tuple(shape)}, got {tuple(info.shape)}")
        return info

    def _stored_name(self, name):
        hugging_face, gguf = self._family.NAMES[name]
        stored = gguf if self._checkpoint.format == "gguf" else hugging_face
        return stored.format(i=self._layer) if stored else None
