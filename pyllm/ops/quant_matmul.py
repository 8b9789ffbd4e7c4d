"""Multiplication by quantized weights, and the int8 activations that it works on."""

import functools

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops.alloc import empty, empty_quantized, empty_rows
from pyllm.ops.matmul import as_rows, flat, is_flat
from pyllm.ops.registry import Op
from pyllm.quant import QuantActivation, QuantFragments, QuantRows, QuantTensor

_OP = Op("quant_matmul")
_BACKWARD = Op("quant_matmul_backward")
_QUANTIZE = Op("quantize_activation")
_PACK = Op("pack_fragments")
_MAX_TILES = 1 << 16  # of 128 rows
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quant_matmul(x, weight: QuantTensor, bias=None, *, out=None, backend=None):
    """``x @ dequantize(weight)ᵀ + bias``.

    The CPU kernel rounds each row of `x` to int8 in groups of the weight's `packed_group_size`
    (`quantize_activation`) unless it comes quantized already, which several matmuls of one input
    can share. The CUDA kernel rounds nothing but its result. A row's result does not depend on the
    other rows.

    Where `x` is `QuantRows`, as `rms_norm` and `layer_norm` can return it, both are multiplied as
    they are, int8 by int8 or float8 by float8, and the sums are scaled once (W8A8).

    Args:
        x: ``[..., K]`` float32 (not CUDA), bfloat16 or float16, a `QuantActivation` ``[T, K]`` in
            the groups that the weight is packed in (CPU), or `QuantRows` ``[..., K]`` (not CPU).
        weight: `QuantTensor` ``[N, K]``, or for CUDA also `QuantFragments`; with QuantRows these
            too, of x's dtype, or a QuantTensor that has `rows()`. A QuantTensor is repacked when
            a device first uses it, and keeps that form.
        bias: float32 ``[N]``.
        out: where to write the result, ``[..., N]``; x's dtype or float32,
            where `x` is quantized any float dtype.

    Returns:
        ``[..., N]`` of x's dtype, float32 where `x` is quantized.

    Raises:
        ValueError: for shapes, dtypes or formats that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    rows = isinstance(x, QuantRows)
    if rows and isinstance(weight, QuantTensor):
        weight = _rows_of(weight)
    if not isinstance(weight, QuantRows if rows else (QuantTensor, QuantFragments)):
        expected = "QuantRows or a QuantTensor" if rows else "a QuantTensor"
        raise TypeError(f"quant_matmul: weight: expected {expected}, got {type(weight).__name__}")
    if rows and x.q.dtype != weight.q.dtype:
        raise ValueError(f"quant_matmul: weight: expected {x.q.dtype} as x, got {weight.q.dtype}")
    tensor = x.q if rows else x.data if isinstance(x, QuantActivation) else x
    return _OP.serve(library.quant_matmul, backend, tensor, bias)(x, weight, bias, out)


def _rows_of(weight):
    """The `QuantRows` of a QuantTensor, kept from first use on."""
    if "rows" not in weight.forms:
        try:
            weight.forms["rows"] = weight.rows()
        except ValueError as error:
            raise ValueError(f"quant_matmul: weight: for QuantRows {error}") from None
    return weight.forms["rows"]


def quantize_activation(x, group_size=32, *, backend=None) -> QuantActivation:
    """Rounds ``x [..., K]`` to int8: ``d = max|x| / 127`` per row and group, ties to even.

    Groups in which no value exceeds 1e-30 become zero. A group with NaN or inf gets a NaN scale, so
    that it makes every result NaN.

    Args:
        x: ``[..., K]`` float; the leading dimensions are flattened.
        group_size: 16 or 32, a divisor of K.

    Returns:
        A `QuantActivation`, for `quant_matmul`.

    Raises:
        ValueError: if `group_size` is not 16 or 32, or does not divide K.
        BackendError: if `backend` cannot serve.
    """
    return _QUANTIZE.serve(library.quantize_activation, backend, x)(x, group_size)


def pack_fragments(weight: QuantTensor, *, backend=None) -> QuantFragments:
    """Packs `weight` for the CUDA kernels; the same bytes whichever backend does it.

    Args:
        weight: `QuantTensor` ``[N, K]``, on the CPU or on a CUDA device.

    Returns:
        `QuantFragments` on the same device, for `quant_matmul`.

    Raises:
        BackendError: if `backend` cannot serve.
    """
    return _PACK.implementation(weight.packed, backend)(weight)


def place(weight: QuantTensor, device) -> QuantTensor | QuantFragments:
    """`weight` on `device`, in the one form that `quant_matmul` reads there.

    Args:
        device: a torch.device.
    """
    weight = weight.to(device)
    return pack_fragments(weight) if _OP.choose(device.type) == "cuda" else weight


@_OP.register("reference")
def _reference(x, weight, bias, out):
    if isinstance(x, QuantRows):
        y = x.q.double() @ weight.q.double().t()  # exact
        y = y * x.scale.double().unsqueeze(-1) * weight.scale.double()
        if bias is not None:
            y = y + bias.double()
        return y.float() if out is None else out.copy_(y)
    weight = weight.panels() if isinstance(weight, QuantFragments) else weight
    x = x.dequantize() if isinstance(x, QuantActivation) else x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.dequantize().to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype) if out is None else out.copy_(y)


@_BACKWARD.register("reference")
def _backward_reference(dy, weight):
    """The gradient of x, as if nothing had rounded it; of the weight some rows at a time."""
    weight = weight.panels() if isinstance(weight, QuantFragments) else weight
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros((*dy.shape[:-1], weight.shape[1]), dtype=wide)
    for begin, rows in weight.float_rows():
        dx += dy[..., begin : begin + len(rows)].to(wide) @ rows.to(wide)
    return dx.to(dy.dtype)


@_OP.register("cpu")
def _cpu(x, weight, bias, out):
    if isinstance(x, QuantRows):
        raise ValueError("quant_matmul: backend 'cpu' takes no QuantRows; 'reference' does")
    if isinstance(weight, QuantFragments):
        raise ValueError(f"quant_matmul: expected a QuantTensor, got {weight}: call its panels()")
    n = weight.shape[0]
    if isinstance(x, QuantActivation):
        if x.group_size != weight.packed_group_size or x.k != weight.shape[1]:
            raise ValueError(
                f"quant_matmul: x: expected [T, {weight.shape[1]}] in groups of "
                f"{weight.packed_group_size}, got [T, {x.k}] in groups of {x.group_size}"
            )
        if out is None:
            out = empty((x.data.shape[0], n), torch.float32)
        _C.quant_matmul(x.data, *weight.kernel_arguments(), bias, flat(out, writes=True))
        return out
    if out is None and is_flat(x):
        return _C.quantize_matmul(x, *weight.kernel_arguments(), bias, None)
    out = empty_rows(x, n) if out is None else out
    _C.quantize_matmul(flat(x), *weight.kernel_arguments(), bias, flat(out, writes=True))
    return out


def _device(backend):
    def run(x, weight, bias, out):
        if isinstance(x, QuantRows):
            return _multiply_rows(backend, x, weight, bias, out)
        if isinstance(x, QuantActivation):
            raise ValueError(f"quant_matmul: backend {backend!r} takes no QuantActivation")
        device.check_same("quant_matmul", x, weight=weight, bias=bias, out=out)
        if isinstance(weight, QuantTensor):
            if backend not in weight.forms:
                weight.forms[backend] = pack_fragments(weight, backend=backend)
            weight = weight.forms[backend]
        n, k = weight.shape
        if out is None:
            out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
        rows, library = _aligned_rows(x), device.library(backend)
        multiprocessors, stream = device.multiprocessors(x.device), device.stream(x)
        scratch = library.quant_matmul_scratch(len(rows), n, k, weight.group_size, multiprocessors)
        library.quant_matmul(
            rows,
            *weight.fragment_arguments(),
            bias,
            as_rows(out),
            multiprocessors,
            torch.empty(scratch, dtype=torch.float32, device=x.device),
            _counters(x.device, stream),
            stream,
        )
        return out

    return run


def _multiply_rows(backend, x, weight, bias, out):
    """int8 by int8, on a device."""
    parts = {"x.scale": x.scale, "weight": weight.q, "weight.scale": weight.scale}
    device.check_same("quant_matmul", x.q, **parts, bias=bias, out=out)
    (n, k), where = weight.q.shape, x.q.device
    if out is None:
        out = torch.empty((*x.q.shape[:-1], n), dtype=torch.float32, device=where)
    rows, library = _aligned_rows(x.q), device.library(backend)
    multiprocessors, stream = device.multiprocessors(where), device.stream(x.q)
    scratch = library.quant_rows_matmul_scratch(len(rows), n, k, multiprocessors)
    library.quant_rows_matmul(
        rows,
        x.scale.reshape(-1),
        weight.q,
        weight.scale,
        bias,
        as_rows(out),
        multiprocessors,
        torch.empty(scratch, dtype=torch.int32, device=where),
        _counters(where, stream),
        stream,
    )
    return out


def _aligned_rows(x):
    """`x [..., K]` as ``[T, K]``, copied if its rows are not aligned to 16 bytes."""
    rows = as_rows(x)
    step = rows.stride(0) * rows.element_size()
    if rows.stride(1) == 1 and (rows.data_ptr() % 16 or step % 16):
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows


for _backend in ("cuda", "emulator"):
    _OP.register(_backend)(_device(_backend))


@_OP.register("triton")
def _triton(x, weight, bias, out):
    if not isinstance(weight, QuantRows | QuantTensor) or isinstance(x, QuantActivation):
        raise ValueError(
            f"quant_matmul: backend 'triton' takes no {type(x).__name__} with "
            f"{type(weight).__name__}; a QuantTensor, with rows too"
        )
    rows = isinstance(x, QuantRows)
    tensor = x.q if rows else x
    device.check_same("quant_matmul", tensor, weight=weight, bias=bias, out=out)
    if out is None:
        dtype = torch.float32 if rows else x.dtype
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)
    flat, y = as_rows(tensor), as_rows(out)
    inputs = tuple(QuantRows.LIMITS) if rows else FLOATS
    outputs = FLOATS if rows else (x.dtype, torch.float32)
    n, k = weight.shape
    _C.check("quant_matmul", [
        (flat, "x", f"T {k}", inputs), (y, "out", f"T {n}", outputs),
        (bias, "bias", f"{n}", torch.float32),
        *([(weight.q, "weight", f"{n} {k}", flat.dtype)] if rows else []),
    ])  # fmt: skip
    kernels = device.triton_kernels("quant_matmul")
    counters = _counters(x.device, device.stream(tensor))
    last = bias, y, counters, device.multiprocessors(x.device)
    if rows:
        x_scale = x.scale.reshape(-1).contiguous()
        kernels.row_matmul(flat, x_scale, weight.q, weight.scale.contiguous(), *last)
    else:
        if "triton" not in weight.forms:
            weight.forms["triton"] = kernels.Chunks.of(weight)
        kernels.quant_matmul(flat, weight.forms["triton"], weight.bits, n, *last)
    return out


def _counters(where, stream):
    """int32 zeros, one a tile, that the kernel leaves as zeros: a set for each stream."""
    if where.type == "cuda" and device.in_foreign_graph():
        # Memory of the graph, cleared at each replay, which takes a launch.
        return torch.zeros(_MAX_TILES, dtype=torch.int32, device=where)
    return _stream_counters(where, stream)


@functools.cache
def _stream_counters(where, stream):
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=where)


@_PACK.register("cpu")
def _pack_cpu(weight):
    return _packed(weight, _C.pack_fragments)


def _pack_device(backend):
    def run(weight):
        stream = device.stream(weight.packed)
        pack = device.library(backend).pack_fragments
        return _packed(weight, lambda *arguments: pack(*arguments, stream))

    return run


for _backend in ("cuda", "emulator"):
    _PACK.register(_backend)(_pack_device(_backend))


@_PACK.register("reference")
def _pack_reference(weight):
    return QuantFragments.from_parts(*weight.parts(), bits=weight.bits)


def _packed(weight, pack):
    fragments = QuantFragments.empty_like(weight)
    pack(*weight.kernel_arguments(), weight.group_size, fragments.packed)
    return fragments


@_QUANTIZE.register("reference")
def _quantize_reference(x, group_size):
    groups = as_rows(x).float().unflatten(1, (-1, group_size))
    top = groups.abs().amax(2, keepdim=True)
    tiny = ~(top > 1e-30)
    finite = groups.isfinite().all(2, keepdim=True)
    # Not 127 / top, for which torch multiplies by the rounded reciprocal of top.
    inverse = torch.where(tiny | ~finite, 0, torch.full_like(top, 127).div(top))
    q = (groups.nan_to_num(0, 0, 0) * inverse).round()
    d = torch.where(tiny, 0, top / 127).masked_fill(~finite, float("nan"))[..., 0]
    total = q.sum(2)
    k = x.shape[-1]
    data = torch.zeros(q.shape[0], QuantActivation.row_bytes(k, group_size), dtype=torch.uint8)
    words = torch.cat([d, d * total, (-8 * total).int().view(torch.float32)], dim=1)
    row = torch.cat([q.to(torch.int8).flatten(1).view(torch.uint8), words.view(torch.uint8)], dim=1)
    data[:, : row.shape[1]] = row
    return QuantActivation(data, k, group_size)


@_QUANTIZE.register("cpu")
def _quantize_cpu(x, group_size):
    rows = as_rows(x)
    quantized = empty_quantized(rows, group_size)
    _C.quantize_activation(rows, quantized.data, group_size)
    return quantized
