"""What a kernel's benchmark is: the arguments of an op, and what a call of it must move and do."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pyllm.quant import QuantActivation, QuantTensor


@dataclass(frozen=True)
class Setting:
    """Where and on what a benchmark runs.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of activations and of weights that are not quantized.
        small: whether sizes should stay small: of a dry run, or because an emulator runs it.
    """

    device: str
    dtype: torch.dtype
    small: bool = False

    def rand(self, *shape, dtype=None, scale=1.0):
        """Normal random numbers; never zeros, which cost less power."""
        x = torch.randn(*shape, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def integers(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: its name in `pyllm.ops.registry.OPS`.
        shape: what the table says.
        make: makes new arguments: the benchmark calls with several sets in turn, so that none finds
            its data in a cache.
        call: ``call(arguments, backend)``, the op.
        nbytes: what a call has to move from and to memory.
        operations: what it has to do, a multiplication and an addition being two.
        arithmetic: the limit that operations are measured against, a key of `limits.measure`.
        size: what the plot against time has on its axis, if the cases form a series.
        meant: ``meant(arguments, backend)``, what the result is of, where a kernel rounds its
            arguments first.
        floor: the error that is always allowed, where the result is a difference of larger numbers.
        part: what of the arguments is verified, where the reference of all would not fit memory.
        part_of_result: what `part` of the arguments decides of a result.
        options: what baselines have to know beside the arguments.
    """

    op: str
    shape: str
    make: Callable[[], dict]
    call: Callable[[dict, str | None], object]
    nbytes: int
    operations: int = 0
    arithmetic: str = "float32_gflops"
    size: int | None = None
    meant: Callable[[dict, str], dict] = lambda arguments, backend: arguments
    floor: Callable[[dict], float | None] = lambda arguments: None
    part: Callable[[dict], dict] = lambda arguments: arguments
    part_of_result: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    options: dict = field(default_factory=dict)


def wide(arguments: dict) -> dict:
    """The same arguments, floats in float64."""

    def widened(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    return {name: widened(value) for name, value in arguments.items()}


def nbytes(*values) -> int:
    """Of tensors and quantized weights together; None counts nothing."""
    total = 0
    for value in values:
        if isinstance(value, QuantTensor):
            total += value.nbytes
        elif isinstance(value, QuantActivation):
            total += value.data.nbytes
        elif value is not None:
            total += value.nbytes
    return total


def tensors(result) -> list[torch.Tensor]:
    """The tensors that an op returned."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [part for part in parts if part is not None]
