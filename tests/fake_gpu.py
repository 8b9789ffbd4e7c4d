"""The processor in the place of a GPU: late, and as strict as CUDA is while a graph is captured.

`FakeGpu` is the real `Gpu` over a stand-in for ``torch.cuda``. What is begun waits in a queue until
somebody waits for it, so that a buffer that is filled or read too early shows in the results. A
graph records PyTorch's operators and the launches of kernels, and a replay runs just these, with no
Python of the step. Refused while capturing: reading values on the host, operators whose results
have a size that depends on values, tensors from lists and arrays (copies from pageable memory),
waiting, and reading memory that the warm-up before had not read.
"""

import importlib.util
import random
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyllm import _C
from pyllm.ops import device as ops_device
from pyllm.ops import registry
from pyllm.runtime.device import Gpu

_HOST_READS = {
    "item", "tolist", "numpy", "cpu", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
_FROM_HOST = {"tensor", "as_tensor", "from_numpy", "frombuffer", "pin_memory"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}


class CaptureRefused(RuntimeError):
    """What CUDA would not let a capture do."""


class Recorder:
    """Notes what a step does between `begin` and `end`, and can run it again."""

    def __init__(self, plans):
        self.records = []  # functions without arguments
        self.made = {}  # storages that were made meanwhile, by identity; kept alive, as by a pool
        self.outside = {}  # others that were read or written
        self._plans = plans
        self._plan = None
        self._modes = [_Functions(), _Operators(self)]

    def begin(self):
        for mode in self._modes:
            mode.__enter__()
        self._open_plan()

    def end(self):
        self._close_plan()
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)

    def operator(self, function, arguments, options, result):
        inputs = self._note((arguments, options))
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        fresh = [t for t in outputs if _storage(t) not in inputs]
        for tensor in fresh:
            self.made.setdefault(_storage(tensor), tensor.untyped_storage())
        name = function._schema.name
        if name.startswith(("aten::empty", "aten::new_empty")):
            return
        if not fresh and not function._schema.is_mutable:
            return  # a view

        def again():
            new = function(*arguments, **options)
            new = [t for t in tree_leaves(new) if isinstance(t, torch.Tensor)]
            for old, tensor in zip(outputs, new, strict=True):
                if _storage(old) not in inputs:
                    old.copy_(tensor)

        self._add(again)

    def launch(self, function, arguments, options):
        self._note((arguments, options))
        self._add(lambda: function(*arguments, **options))

    def replay(self):
        for record in self.records:
            record()

    def _note(self, tree):
        storages = set()
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storages.add(_storage(leaf))
                if _storage(leaf) not in self.made:
                    self.outside[_storage(leaf)] = tuple(leaf.shape), leaf.dtype
        return storages

    def _add(self, record):
        self._close_plan()
        self.records.append(record)
        self._open_plan()

    # The CPU's own kernels record themselves into a plan.
    def _open_plan(self):
        if self._plans:
            self._plan = _C.Plan()
            self._plan.begin()

    def _close_plan(self):
        if self._plan:
            self._plan.end()
            if self._plan.names():
                self.records.append(self._plan.replay)
            self._plan = None


def _storage(tensor):
    return tensor.untyped_storage()._cdata


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in _HOST_READS:
            raise CaptureRefused(f"{name} reads a value on the host, which waits for the device")
        if name in _FROM_HOST:
            raise CaptureRefused(f"{name} copies from memory that is not pinned")
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "is_nonzero"):
            raise CaptureRefused(f"{name} reads a value on the host, which waits for the device")
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        counts = name == "repeat_interleave" and options.get("output_size") is None
        if name in _SIZED_BY_VALUES or by_mask or counts:
            raise CaptureRefused(f"{name}: the size of its result depends on values")
        # Not while our own plan records: nothing of PyTorch's is in it.
        result = function(*args, **options)
        self._recorder.operator(function, args, options, result)
        return result


class _Event:
    recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        self._world.refuse_while_capturing("an event's synchronize")
        self._world.drain(lambda: self.recorded)
        assert self.recorded


class _Graph:
    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert not self._world.queue, "a capture begins before what was begun is done"
        assert pool == self._world.pool
        self.recorder = self._world.recorder = Recorder(self._world.plans)
        self.recorder.begin()

    def capture_end(self):
        self.recorder.end()
        self._world.recorder = None
        self._world.captures += 1
        new = set(self.recorder.outside) - set(self._world.warm.outside)
        if new:
            shapes = [self.recorder.outside[storage] for storage in new]
            raise CaptureRefused(f"memory that the warm-up had not touched: {shapes}")

    def replay(self):
        self._world.replays += 1
        self.recorder.replay()


class World:
    """The stand-in for ``torch.cuda``.

    Args:
        late: whether what was begun waits as long as it may; or the seed of when it runs.
        plans: whether the CPU's own kernels are to be recorded, which other backends cannot be
            mixed with.

    Attributes:
        captures, replays: how many.
        overlaps: how many steps were begun before the one before was waited for.
    """

    def __init__(self, late=True, plans=True):
        self.late, self.plans = late, plans
        self._random = None if late is True else random.Random(late)
        self.queue = []
        self.pool = object()
        self.recorder = self.warm = None
        self.captures = self.replays = self.overlaps = 0

    def install(self, monkeypatch):
        @contextmanager
        def stream(_):
            yield

        stand_ins = {
            "synchronize": lambda *_: self.synchronize(),
            "Stream": lambda _: self,
            "stream": stream,
            "Event": type("Event", (_Event,), {"_world": self}),
            "graph_pool_handle": lambda: self.pool,
            "CUDAGraph": type("CUDAGraph", (_Graph,), {"_world": self}),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        # For the mode that watches captures, which no GPU has, no op goes to the dispatcher.
        monkeypatch.setattr(registry, "needs_dispatcher", lambda *tensors: False)
        monkeypatch.setattr(registry, "route", lambda backend, *tensors: None)
        library = ops_device.library
        monkeypatch.setattr(ops_device, "library", lambda name: _Library(self, library(name)))
        if importlib.util.find_spec("triton"):
            from triton.runtime.interpreter import InterpretedFunction

            run = InterpretedFunction.run
            monkeypatch.setattr(
                InterpretedFunction, "run",
                lambda kernel, *arguments, **options: self.launch(
                    run, kernel, *arguments, **options
                ),
            )  # fmt: skip
        return self

    def launch(self, function, *arguments, **options):
        """Runs a kernel's launcher, or records that it is to run."""
        if self.recorder:
            self.recorder.launch(function, arguments, options)
        else:
            if self.warm:
                self.warm.launch(function, arguments, options)
            with _disable_current_modes():
                function(*arguments, **options)

    def begin(self, function):
        self.queue.append(function)
        if self._random:
            left = self._random.randrange(len(self.queue) + 1)
            self.drain(lambda: len(self.queue) <= left)

    def drain(self, enough=lambda: False):
        while self.queue and not enough():
            self.queue.pop(0)()

    def synchronize(self):
        self.refuse_while_capturing("synchronize")
        self.drain()

    def refuse_while_capturing(self, what):
        if self.recorder:
            raise CaptureRefused(f"{what} waits for the device")


class _Library:
    """Launchers of the emulator, whose calls are recorded."""

    def __init__(self, world, library):
        self._world, self._library = world, library

    def __getattr__(self, name):
        function = getattr(self._library, name)
        if name.endswith(("_scratch", "_partials")):
            return function
        return lambda *arguments: self._world.launch(function, *arguments)


class FakeGpu(Gpu):
    """See the module's docstring.

    Args:
        halves: as of a `Gpu`; False for kernels of the processor, which compute in float32.
        memory: what ``free_bytes`` says.
    """

    def __init__(self, world, halves=False, memory=1e9):
        self.world = world
        self.halves, self.memory = halves, memory
        self._pinned = set()
        super().__init__(torch.device("cpu"))

    def host(self, nbytes):
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self._pinned.add(_storage(memory))
        return memory

    def free_bytes(self):
        return self.memory

    def upload(self, mirror, host):
        self._check_copy(mirror, host)
        super().upload(mirror, host)

    def download(self, host, mirror):
        self._check_copy(mirror, host)
        return super().download(host, mirror)

    def _check_copy(self, mirror, host):
        assert _storage(host) in self._pinned, "copies from pageable memory wait"
        assert _storage(mirror) not in self._pinned
        assert host.dtype == mirror.dtype
        for side in (host, mirror):
            assert side.is_contiguous()

    def run(self, step):
        self.world.begin(lambda: Gpu.run(self, step))

    def capture(self, step):
        self.world.drain()
        calls = []

        def watched():
            calls.append(1)
            if len(calls) > 1:
                return step()
            warm = Recorder(plans=False)
            self.world.warm = warm
            operators = _Operators(warm)
            try:
                with operators:
                    return step()
            finally:
                self.world.warm = warm if len(calls) == 1 else None

        try:
            return super().capture(watched)
        finally:
            self.world.warm = None
