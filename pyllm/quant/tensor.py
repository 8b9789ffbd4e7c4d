"""`QuantTensor`: weights of 4 or 8 bits in groups, packed once for the processor's instructions."""

from dataclasses import dataclass, replace

import torch

from pyllm import _C, memory
from pyllm.quant import packing
from pyllm.quant.rows import QuantRows

_ROUNDED_ROWS = 4096  # at a time; a multiple of packing.PANEL_ROWS
_GROUP_SIZES = (16, 32, 64, 128)  # and a multiple of 16 that is K


@dataclass(frozen=True, repr=False)
class QuantTensor:
    """A weight matrix ``[N, K]`` of ``d * (q - offset) + m``.

    ``q`` is unsigned, of `bits` bits; ``d`` and ``m`` are float16, one of each per row and group of
    `group_size` consecutive k. Without a minimum ``m`` is 0 and ``offset`` is half the range of q
    (8 or 128); with one, ``offset`` is 0.

    What is packed has groups of at most 32, which is what the CPU multiplies at once; larger groups
    repeat their scale and minimum there. Other forms (`QuantFragments`, `QuantRows`) do not.

    Attributes:
        packed: uint8, one-dimensional; the layout is in ``csrc/core/quant_matrix.h``.
        shape: ``(N, K)``.
        bits: 4 or 8.
        group_size: 16, 32, 64 or 128, a divisor of K; or K, a multiple of 16: one group a row.
        has_minimum: whether ``m`` is stored.
    """

    packed: torch.Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    has_minimum: bool

    @staticmethod
    def from_parts(q, scale, minimum=None, *, bits) -> "QuantTensor":
        """From quants ``uint8 [N, K]`` below 2^bits, scale and minimum ``float16 [N, G]``.

        The group size is K / G; see `QuantTensor` for what it may be.
        """
        if bits not in (4, 8):
            raise ValueError(f"QuantTensor: expected bits 4 or 8, got {bits}")
        if q.dtype != torch.uint8 or q.ndim != 2 or 0 in q.shape:
            raise ValueError(f"QuantTensor: expected q uint8[N, K], got {_describe(q)}")
        n, k = q.shape
        for name, part in (("scale", scale), ("minimum", minimum)):
            if part is None and name == "minimum":
                continue
            if part.dtype != torch.float16 or part.ndim != 2 or part.shape != scale.shape:
                raise ValueError(
                    f"QuantTensor: expected {name} float16[N, G], got {_describe(part)}"
                )
        group_size = k // max(scale.shape[1], 1)
        if scale.shape != (n, k // max(group_size, 1)) or not _is_group_size(group_size, k):
            sizes = ", ".join(map(str, _GROUP_SIZES))
            raise ValueError(
                f"QuantTensor: expected scale [{n}, {k} / group size], with groups of {sizes} or "
                f"K = {k} if that is a multiple of 16; got {_describe(scale)}"
            )
        if bits == 4 and q.max() > 15:
            raise ValueError(f"QuantTensor: expected 4-bit quants below 16, got {q.max().item()}")
        blocks = _pack(q, scale, minimum, bits)
        packed = memory.allocate(blocks.numel()).copy_(blocks)
        return QuantTensor(packed, (n, k), bits, group_size, minimum is not None)

    @staticmethod
    def from_float(w, *, bits=4, group_size=32, symmetric=False, refits=0) -> "QuantTensor":
        """Rounds ``w [N, K]`` to the nearest quant.

        Symmetric groups are scaled so that the value of largest magnitude is exactly the lowest
        quant (as Q4_0 and Q8_0 do with their halves of the range); others span their minimum to
        their maximum.

        Args:
            w: a float tensor, or a `QuantTensor` to round further. Only some rows at a time are
                turned into float32.
            group_size: see `QuantTensor`; None: one group a row.
            refits: how often scale and minimum are then fitted to the quants by least squares, and
                the values rounded anew; a group keeps what is closest. Twice leaves 6 % less error
                in an output head of 4 bits, and half of what rounding adds to its perplexity.

        Raises:
            ValueError: if `w` has other than two dimensions or values that are not finite (also
                after scaling to float16), or `group_size` does not divide K.
        """
        if bits not in (4, 8):
            raise ValueError(f"QuantTensor: expected bits 4 or 8, got {bits}")
        if refits and symmetric:
            raise ValueError("QuantTensor: expected no refits of symmetric groups")
        if not isinstance(w, QuantTensor) and (
            w.ndim != 2 or 0 in w.shape or not w.dtype.is_floating_point
        ):
            raise ValueError(f"QuantTensor: expected a float tensor [N, K], got {_describe(w)}")
        n, k = w.shape
        group_size = k if group_size is None else group_size
        if group_size != k and group_size not in _GROUP_SIZES:
            raise ValueError(
                "QuantTensor: expected group_size None (a group a row) or one of "
                f"{_GROUP_SIZES}, got {group_size}"
            )
        if not _is_group_size(group_size, k):
            multiple = 16 if group_size == k else group_size
            raise ValueError(f"QuantTensor: expected K to be a multiple of {multiple}, got K = {k}")
        packed_group = _packed_group_size(group_size)
        packed = memory.allocate(packing.packed_bytes(n, k, bits, packed_group, not symmetric))
        at = 0
        for begin in range(0, n, _ROUNDED_ROWS):
            rows = _float_rows(w, begin, min(begin + _ROUNDED_ROWS, n))
            blocks = _pack(*_round(rows, bits, group_size, symmetric, refits), bits)
            packed[at : at + blocks.numel()] = blocks
            at += blocks.numel()
        return QuantTensor(packed, (n, k), bits, group_size, not symmetric)

    @staticmethod
    def from_gguf(raw_bytes, ggml_type: str, shape) -> "QuantTensor":
        """Converts the bytes of a GGUF tensor; exact, but for scales of K-quants (float16).

        Args:
            raw_bytes: bytes, memoryview, numpy or torch array; read once, never copied whole.
            ggml_type: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K" or "Q6_K".
            shape: ``(N, K)``.

        Raises:
            ValueError: for an unknown type, or if the size of `raw_bytes` is not that of the shape.
        """
        n, k = shape
        return QuantTensor.from_gguf_rows([(raw_bytes, n)], ggml_type, k)

    @staticmethod
    def from_gguf_rows(sources, ggml_type: str, k: int) -> "QuantTensor":
        """The rows of several GGUF tensors of one type, below each other: ``[(raw, n), ...]``."""
        sources = [
            (raw.numpy() if isinstance(raw, torch.Tensor) else raw, int(n)) for raw, n in sources
        ]
        bits, group_size, has_minimum, n, nbytes = _C.packed_format(sources, ggml_type, k)
        packed = memory.allocate(nbytes)
        _C.pack_ggml(sources, ggml_type, k, packed)
        return QuantTensor(packed, (n, k), bits, group_size, has_minimum)

    @staticmethod
    def cat(tensors) -> "QuantTensor":
        """The rows of several weights of one format and K, below each other."""
        tensors = list(tensors)
        formats = {(t.bits, t.group_size, t.has_minimum, t.shape[1]) for t in tensors}
        if len(formats) != 1:
            raise ValueError(f"QuantTensor.cat: expected one format and K, got {tensors}")
        q, scale, minimum = zip(*(t.parts() for t in tensors), strict=True)
        minimum = torch.cat(minimum) if tensors[0].has_minimum else None
        return QuantTensor.from_parts(torch.cat(q), torch.cat(scale), minimum, bits=tensors[0].bits)

    @property
    def forms(self) -> dict:
        """The same weight packed for other backends, by their names, kept from first use on.

        It is kept with `packed`, so that whoever has these bytes has it, until they are written to.
        """
        packed = self.packed
        version = None if packed.is_inference() else packed._version
        kept = packed.__dict__.get("pyllm_forms")
        if kept is None or kept[0] != version:
            kept = packed.pyllm_forms = (version, {})
        return kept[1]

    @property
    def offset(self) -> int:
        """What is subtracted from a quant."""
        return 0 if self.has_minimum else 2 ** (self.bits - 1)

    @property
    def nbytes(self) -> int:
        """The bytes of the packed weight, rows that pad N to a multiple of 16 included."""
        return self.packed.numel()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def packed_group_size(self) -> int:
        """16 or 32: the groups of `packed`, and those in which the CPU rounds activations."""
        return _packed_group_size(self.group_size)

    def to(self, device) -> "QuantTensor":
        """The same weight on another device."""
        if self.packed.device == torch.device(device):
            return self
        return replace(self, packed=self.packed.to(device))

    def parts(self):
        """``(q uint8 [N, K], scale float16 [N, G], minimum float16 [N, G] or None)``."""
        q, *parts = packing.unpack(*self.kernel_arguments())
        step = self.group_size // self.packed_group_size
        return q, *(part if part is None else part[:, ::step] for part in parts)

    def rows(self) -> QuantRows:
        """The same weight as int8 with a float32 scale a row: what is multiplied by `QuantRows`.

        Raises:
            ValueError: unless it has 8 bits, no minimum and one group a row.
        """
        if self.bits != 8 or self.has_minimum or self.group_size != self.shape[1]:
            raise ValueError(f"expected 8 bits, symmetric, with one group a row; got {self}")
        q, scale, _ = self.parts()
        return QuantRows((q ^ 128).view(torch.int8), scale[:, 0].float())

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 ``[N, K]``."""
        q, scale, minimum = self.parts()
        w = q.unflatten(1, (-1, self.group_size)).float().sub_(self.offset)
        w *= scale.float().unsqueeze(2)
        if minimum is not None:
            w += minimum.float().unsqueeze(2)
        return w.flatten(1)

    def float_rows(self):
        """Pairs of the number of a row and float32 rows from it on, of all the rows in turn."""
        for begin in range(0, self.shape[0], _ROUNDED_ROWS):
            yield begin, _float_rows(self, begin, min(begin + _ROUNDED_ROWS, self.shape[0]))

    def kernel_arguments(self):
        """What bindings take: ``(packed, N, K, bits, packed_group_size, has_minimum)``."""
        return self.packed, *self.shape, self.bits, self.packed_group_size, self.has_minimum

    def __repr__(self):
        return f"QuantTensor({describe_format(self)})"


def describe_format(weight) -> str:
    """The shape and format of a `QuantTensor` or what is packed from it, for people."""
    n, k = weight.shape
    groups = "one group a row" if weight.group_size == k else f"groups of {weight.group_size}"
    return f"[{n}, {k}], {weight.bits} bits, {groups}{', minimum' if weight.has_minimum else ''}"


def _is_group_size(group_size, k) -> bool:
    if group_size == k:
        return k % 16 == 0
    return group_size in _GROUP_SIZES and k % group_size == 0


def _packed_group_size(group_size) -> int:
    return 16 if group_size % 32 else 32


def _pack(q, scale, minimum, bits):
    """`packing.pack`, for which larger groups repeat their scale and minimum."""
    group_size = q.shape[1] // scale.shape[1]
    times = group_size // _packed_group_size(group_size)
    parts = (
        part if part is None else part.repeat_interleave(times, 1) for part in (scale, minimum)
    )
    return packing.pack(q, *parts, bits)


def _float_rows(w, begin, end):
    """float32 rows of a float tensor or a `QuantTensor`; `begin` is a multiple of a panel's."""
    if not isinstance(w, QuantTensor):
        return w[begin:end].detach().float()
    panels = w.packed.view(-(-w.shape[0] // packing.PANEL_ROWS), -1)
    some = panels[begin // packing.PANEL_ROWS : -(-end // packing.PANEL_ROWS)].flatten()
    return replace(w, packed=some, shape=(end - begin, w.shape[1])).dequantize()


def _round(w, bits, group_size, symmetric, refits):
    """``(q uint8 [N, K], scale float16 [N, G], minimum float16 [N, G] or None)`` of float32."""
    groups = w.unflatten(1, (-1, group_size))
    top = 2**bits - 1
    if symmetric:
        peak = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        offset, minimum = 2 ** (bits - 1), None
        scale = (peak / -offset).half()
        shifted = groups
    else:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        offset, minimum = 0, low.half()
        scale = ((high - minimum.float()) / top).half()
        shifted = groups - minimum.float()
    parts = [scale] if minimum is None else [scale, minimum]
    if not all(part.isfinite().all() for part in parts):
        raise ValueError("QuantTensor: expected finite weights in the range of float16")
    # A group whose scale is zero is the constant m, whatever q.
    divisor = torch.where(scale == 0, 1, scale).float()
    q = ((shifted / divisor).round() + offset).clamp(0, top)
    for _ in range(refits):
        scale, minimum, q = _refit(groups, scale, minimum, q, top)
    return q.to(torch.uint8).flatten(1), scale[..., 0], None if minimum is None else minimum[..., 0]


def _refit(groups, scale, minimum, q, top):
    """The scale and minimum that fit quants best and the quants nearest to these, if closer."""

    def squared_error(scale, minimum, q):
        return (q * scale.float() + minimum.float() - groups).square_().sum(2, keepdim=True)

    q_mean, mean = q.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    centered = q - q_mean
    variance = centered.square().sum(2, keepdim=True)
    slope = (centered * groups).sum(2, keepdim=True) / torch.where(variance == 0, 1, variance)
    new_scale, new_minimum = slope.half(), (mean - slope * q_mean).half()
    divisor = torch.where(new_scale == 0, 1, new_scale).float()
    new_q = ((groups - new_minimum.float()) / divisor).round_().clamp_(0, top)
    fit, new_fit = (scale, minimum, q), (new_scale, new_minimum, new_q)
    closer = squared_error(*new_fit) < squared_error(*fit)
    return tuple(torch.where(closer, new, old) for new, old in zip(new_fit, fit, strict=True))


def _describe(x) -> str:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
