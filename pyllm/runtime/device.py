"""Where the engine computes: the processor, or a GPU that works while Python goes on.

Both have the same few methods, so that the engine reads the same for either.
"""

import os
import re

import numpy as np
import torch

from pyllm import memory
from pyllm.ops import alloc
from pyllm.ops import device as ops_device
from pyllm.ops.registry import OPS
from pyllm.runtime.graph import Arena, CudaGraph, capture

# Sizes that steps of one token a sequence are padded to: each takes a graph of its own.
BUCKETS = (1, 2, 4)  # and the multiples of 8


def bucket(n: int) -> int:
    """The size that a step of `n` sequences is padded to."""
    return next((size for size in BUCKETS if size >= n), -(-n // 8) * 8)


def buckets(most: int) -> list[int]:
    """All sizes that steps of up to `most` sequences are padded to."""
    return sorted({bucket(n) for n in range(1, most + 1)})


def find_device(name: str | None) -> "Processor | Gpu":
    """What ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` stands for.

    Args:
        name: None takes ``PYLLM_DEVICE``, or else the processor.

    Raises:
        ValueError: if there is no such device, or PyTorch cannot reach it; the message says why.
    """
    asked = str(name or os.environ.get("PYLLM_DEVICE") or "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", asked):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:1', got {asked!r}")
    if asked == "cpu":
        return Processor()
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"device: {asked!r} needs a PyTorch built for GPUs; this one, {torch.__version__}, is "
            "built for the processor only"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(
            f"device: {asked!r} was asked for, but PyTorch finds no GPU: `nvidia-smi` says whether "
            "the driver is installed and sees one, and CUDA_VISIBLE_DEVICES may hide it"
        )
    number = int(asked[5:] or torch.cuda.current_device())
    if number >= count:
        raise ValueError(f"device: expected 'cuda:0' to 'cuda:{count - 1}', got {asked!r}")
    return Gpu(torch.device("cuda", number))


# Of what is free once the weights are loaded; steps need the rest.
SHARE_OF_MEMORY = 0.85
# Ops whose reference looks at values on the host, which no graph can hold.
_REFERENCE_READS_VALUES = ("paged_attention", "rope_cache", "sample")


class Processor:
    """Computes at once: kernels read the very buffers that Python fills.

    Attributes:
        in_flight: steps that may be under way at once, each with input buffers of its own.
        captures_all: whether steps that will hardly come again are captured too.
        max_tokens: of a step, by default.
        halves: whether the model computes in float16 or bfloat16, rather than in float32.
    """

    in_flight = 1
    captures_all = True
    max_tokens = 512
    halves = False
    torch_device = torch.device("cpu")

    def __init__(self):
        self.arena = Arena()
        self._checked = False

    def host(self, nbytes: int) -> torch.Tensor:
        """Zeroed memory that Python fills or reads: uint8 ``[nbytes]``."""
        # NumPy leaves it to the system to find memory once it is touched.
        memory = np.zeros(nbytes + 64, dtype=np.uint8)
        return torch.from_numpy(memory[-memory.ctypes.data % 64 :][:nbytes])

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory for keys and values: uint8 ``[nbytes]``, of finite numbers."""
        return memory.allocate(nbytes)

    def mirror(self, host: torch.Tensor) -> torch.Tensor:
        """What kernels read and write in place of `host`."""
        return host

    def upload(self, mirror: torch.Tensor, host: torch.Tensor) -> None:
        """Copies to the device, after what was begun there before."""

    def download(self, host: torch.Tensor, mirror: torch.Tensor):
        """Copies from the device; returns what to call before `host` is read."""
        return _nothing

    def synchronize(self) -> None:
        """Waits for all that was begun, by others too."""

    def free_bytes(self) -> float:
        """What keys and values may take."""
        return float("inf")  # the system hands memory out when it is touched

    def padded(self, n_sequences: int) -> int:
        """How many sequences a step with one token each is run with."""
        return n_sequences

    def sizes(self, most: int) -> list[int]:
        """The numbers of sequences, up to `most`, whose steps are worth capturing ahead."""
        return []  # capturing takes as long as running

    def captures(self, backend: str | None) -> bool:
        """Whether steps on `backend` can be captured."""
        return backend in (None, "cpu")

    def run(self, step) -> None:
        """Begins ``step()``."""
        with alloc.use(self.arena):
            step()

    def capture(self, step):
        """A graph of ``step()``, see `pyllm.runtime.graph`."""
        # The code of all steps is one: the first capture checks it.
        graph = capture(step, self.arena, check=not self._checked)
        self._checked = True
        return graph


class Gpu:
    """Computes on a stream of its own, in order, while Python prepares the next step.

    Args:
        device: with its index.
    """

    in_flight = 2
    captures_all = False
    max_tokens = 2048
    halves = True

    def __init__(self, device: torch.device):
        self.torch_device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def host(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, nbytes):
        # A kernel may multiply what it finds by a weight of zero.
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch_device)

    def mirror(self, host):
        return torch.zeros_like(host, device=self.torch_device)

    def upload(self, mirror, host):
        self.run(lambda: mirror.copy_(host, non_blocking=True))

    def download(self, host, mirror):
        event = torch.cuda.Event()

        def copy():
            host.copy_(mirror, non_blocking=True)
            event.record()

        self.run(copy)
        return event.synchronize

    def synchronize(self):
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self):
        return SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.torch_device)[0]

    def padded(self, n_sequences):
        return bucket(n_sequences)

    def sizes(self, most):
        return buckets(most)

    def captures(self, backend):
        kind = self.torch_device.type
        return all(OPS[op].choose(kind, backend) != "reference" for op in _REFERENCE_READS_VALUES)

    def run(self, step):
        with torch.cuda.stream(self._stream):
            step()

    def capture(self, step):
        with torch.cuda.stream(self._stream), ops_device.own_graph():
            return CudaGraph(step, self._pool)


def _nothing():
    pass
