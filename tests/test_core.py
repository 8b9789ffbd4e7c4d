"""The thread pool, the plan, the checks and the build, seen through `pyllm._C`."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import dtype_name, rand, strided

from pyllm import _C
from pyllm.ops import gelu, layer_norm, matmul, relu, rms_norm, silu_mul

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["own", "PyTorch's"])
def set_threads(request):
    """Sets the number of threads. Calls use PyTorch's where these are as many; replays never do."""
    before = _C.num_threads(), torch.get_num_threads()

    def set_both(n):
        _C.set_num_threads(n)
        torch.set_num_threads(1 if request.param == "own" else n)

    yield set_both
    _C.set_num_threads(before[0])
    torch.set_num_threads(before[1])


class Step:
    """A few launches over static buffers, with inputs that may be changed in place."""

    def __init__(self, rows=37, width=200, repeats=1):
        self.repeats = repeats
        self.x, self.weight = rand(rows, width), rand(width, seed=1)
        self.gate, self.up = rand(rows, width, seed=2), rand(rows, width, seed=3)
        self.normed, self.gated, self.y = (torch.empty(rows, width) for _ in range(3))

    def __call__(self):
        for _ in range(self.repeats):
            rms_norm(self.x, self.weight, out=self.normed, backend="cpu")
            silu_mul(self.gate, self.normed, out=self.gated, backend="cpu")
            relu(self.gated[:0], out=self.y[:0], backend="cpu")  # nothing to do: no launch
            gelu(self.gated, out=self.y, backend="cpu")
        return self.y

    def expected(self):
        normed = rms_norm(self.x, self.weight, backend="cpu")
        return gelu(silu_mul(self.gate, normed, backend="cpu"), backend="cpu")

    def plan(self):
        plan = _C.Plan()
        plan.begin()
        try:
            self()
        finally:
            plan.end()
        return plan


def test_capturing_records_and_runs_nothing():
    step = Step()
    step.y.fill_(7)
    plan = step.plan()
    assert (step.y == 7).all()
    assert plan.names() == ["rms_norm", "silu", "gelu"]
    assert len(plan) == 3
    assert not _C.capturing()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 37, 500])
def test_replay_equals_eager_bit_for_bit(set_threads, threads, rows):
    step = Step(rows)
    plan = step.plan()
    set_threads(1)
    expected = []
    for seed in range(4):
        step.x.copy_(rand(*step.x.shape, seed=seed))
        expected.append(step.expected())
    set_threads(threads)
    assert _C.num_threads() == threads
    for _ in range(5):
        for seed in range(4):
            step.x.copy_(rand(*step.x.shape, seed=seed))
            plan.replay()
            assert torch.equal(step.y, expected[seed])
            assert torch.equal(step(), expected[seed])


def test_many_replays_while_threads_come_and_go(set_threads):
    """Each launch adds to what the one before wrote, so a launch too early or too late shows."""
    x, one, total = torch.zeros(64, 512), torch.ones(64, 512), torch.zeros(64, 512)
    normed = torch.empty_like(x)
    plan = _C.Plan()
    plan.begin()
    for source, target in [(x, total), (total, x)] * 20:
        _C.layer_norm(source, None, None, 1e-5, one, normed, target)
    plan.end()
    for i in range(100):
        set_threads(1 + i % 5)
        plan.replay()
        assert (x == 40 * (i + 1)).all()


def test_profile_times_every_launch():
    step = Step()
    plan = step.plan()
    ns = plan.profile(3)
    assert len(ns) == 3
    assert all(n > 0 for n in ns)
    assert torch.equal(step.y, step.expected())


def test_an_empty_plan_and_a_plan_recorded_again():
    plan = _C.Plan()
    plan.replay()
    assert plan.profile(2) == []
    step = Step()
    for _ in range(2):
        plan.begin()
        step()
        plan.end()
        assert len(plan) == 3


def test_a_plan_that_dies_while_it_captures_ends_the_capture():
    plan = _C.Plan()
    plan.begin()
    del plan
    assert not _C.capturing()
    assert torch.equal(relu(rand(3, 5)), rand(3, 5).relu())


def test_capture_is_not_nested_and_belongs_to_its_thread():
    plan, other = _C.Plan(), _C.Plan()
    with pytest.raises(RuntimeError, match="not being captured"):
        plan.end()
    plan.begin()
    try:
        with pytest.raises(RuntimeError, match="already being captured"):
            other.begin()
        with pytest.raises(RuntimeError, match="not being captured"):
            other.end()
        seen = []
        thread = threading.Thread(target=lambda: seen.append((_C.capturing(), relu(rand(3, 5)))))
        thread.start()
        thread.join()
        assert not seen[0][0]
        assert torch.equal(seen[0][1], rand(3, 5).relu())
        assert len(plan) == 0
    finally:
        plan.end()


def test_calls_and_replays_from_several_threads_at_once(set_threads):
    set_threads(3)
    failures = []

    def work(seed):
        step = Step(50 + seed, 300)
        plan, expected = step.plan(), step.expected()
        for _ in range(30):
            step.y.fill_(float("nan"))
            plan.replay()
            if not torch.equal(step.y, expected) or not torch.equal(step(), expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_replay_releases_the_gil():
    """Another thread makes progress while a replay is running."""
    step = Step(300, 500, repeats=50)  # a plan does not keep its buffers alive
    plan = step.plan()
    stop, during = threading.Event(), []
    started = threading.Event()

    def replay():
        started.set()
        while not stop.is_set():
            plan.profile(5)  # one call into C++, without a return to Python
            during.append(None)

    thread = threading.Thread(target=replay)
    thread.start()
    started.wait()
    calls = len(during)
    progress = 0
    while len(during) == calls:
        progress += 1
        time.sleep(0)
    stop.set()
    thread.join()
    assert progress > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(set_threads):
    set_threads(3)
    step = Step(500)
    plan, expected = step.plan(), step.expected()
    plan.replay()

    def same(a, b):  # in pieces, on one thread: PyTorch's threads are not there in a child
        return all(map(torch.equal, a.split(50), b.split(50)))

    child = os.fork()
    if child == 0:
        status = 1
        try:
            plan.replay()
            right = same(step.y, expected) and same(step(), expected)
            status = 0 if right and _C.num_threads() == 3 else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(done[1]) == 0
    plan.replay()
    assert torch.equal(step.y, expected)


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_a_bad_number_of_threads(n):
    with pytest.raises(ValueError, match=f"expected 1 to 1024 threads, got {n}"):
        _C.set_num_threads(n)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_environment_chooses_threads_and_instruction_set():
    code = "from pyllm import _C; print(_C.num_threads(), _C.isa())"
    for isa in _C.available_isas():
        result = run_python(code, PYLLM_NUM_THREADS="3", PYLLM_CPU_ISA=isa)
        assert result.stdout.split() == ["3", isa], result.stderr
    result = run_python("from pyllm import _C; _C.isa()", PYLLM_CPU_ISA="mmx")
    assert re.search(r"ValueError: PYLLM_CPU_ISA: expected one of .* got 'mmx'", result.stderr)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("text", TypeError, "expected a torch.Tensor, got .*str"),
        (
            torch.zeros(2, 8, dtype=torch.complex64),
            TypeError,
            "a dtype that pyllm knows.*complex64",
        ),
        (torch.zeros(2, 8, device="meta"), TypeError, "expected a CPU tensor, got one on meta"),
        (torch.zeros(1, 1, 1, 2, 8), TypeError, "at most 4 dimensions, got 5"),
        (torch.tensor(1.0), ValueError, r"x: expected .*\[T H D\], got float32\[\]"),
        (
            torch.zeros(1, 1, 2, 8),
            ValueError,
            r"x: expected .*\[T H D\], got float32\[1, 1, 2, 8\]",
        ),
        (None, TypeError, "expected a torch.Tensor, got .*NoneType"),
    ],
    ids=str,
)
def test_checks_say_what_was_expected_and_what_came(x, error, message):
    with pytest.raises(error, match=message):
        _C.layer_norm(x, None, None, 1e-5, None, torch.zeros(2, 8), None)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, out: layer_norm(x, out=out, backend="cpu"),
        lambda x, out: rms_norm(x, torch.ones(8), out=out, backend="cpu"),
        lambda x, out: relu(x, out=out, backend="cpu"),
        lambda x, out: matmul(x, torch.eye(8), out=out, backend="cpu"),
    ],
    ids=["layer_norm", "rms_norm", "relu", "matmul"],
)
def test_leading_dimensions(call):
    """Any number of them, whatever their strides; a result that is copied would be lost."""
    for shape in [(8,), (3, 8), (4, 1, 8), (0, 3, 8), (2, 3, 8), (2, 3, 2, 8), (2, 1, 2, 3, 8)]:
        x = rand(*shape)
        expected = call(x.reshape(-1, 8), None).view(shape)
        assert torch.equal(call(x, None), expected)
        out = torch.empty(shape)
        assert call(x, out) is out
        assert torch.equal(out, expected)
        assert torch.equal(call(strided(x), None), expected)
        order = [*reversed(range(x.ndim - 1)), x.ndim - 1]
        turned = x.permute(order).contiguous().permute(order)
        assert torch.equal(call(turned, None), expected)
        if x.ndim > 3:
            with pytest.raises(ValueError, match="out: expected leading dimensions"):
                call(x, torch.empty_like(turned))


def test_sources_include_no_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 10
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert not [str(p) for p in sources if pattern.search(p.read_text())]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
def test_the_extension_links_no_torch_library():
    if not shutil.which("readelf"):
        pytest.skip("readelf was not found")
    dynamic = subprocess.check_output(["readelf", "-d", _C.__file__], text=True)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert any("libstdc++" in n or "libc++" in n for n in needed)
    assert not [n for n in needed if re.search("torch|c10|omp", n)]


HALVES = [torch.bfloat16, torch.float16]


def all_values(dtype):
    """Every value of a 16-bit type but NaN, as [512, 128]."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    return values.masked_fill(values.isnan(), 0).view(512, 128)


def stored_sum(x, y, width):
    """x + y as a kernel rounds it on storing, by way of the residual of rms_norm."""
    x, y = x.reshape(-1, width), y.reshape(-1, width)
    weight = torch.ones(width)
    return rms_norm(x, weight, residual=y, backend="cpu")[1]


# 128 fills vectors; 7 takes the path for the rest of a row.
@pytest.mark.parametrize("width", [128, 7])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_every_half_survives_load_and_store(dtype, width):
    values = all_values(dtype).flatten()[: 65536 // width * width]
    minus_zero = torch.full_like(values, -0.0)
    kept = stored_sum(values, minus_zero, width)
    assert torch.equal(kept.flatten().view(torch.int16), values.view(torch.int16))
    nan = torch.full((1, width), float("nan"), dtype=dtype)
    assert stored_sum(nan, nan, width).isnan().all()


@pytest.mark.parametrize("width", [128, 7])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_rounding_is_that_of_torch(dtype, width):
    """Every value plus others of all sizes: ties, subnormals and overflow among the sums."""
    values = all_values(dtype).flatten()[: 65536 // width * width]
    finite = torch.finfo(dtype)
    others = [values.flip(0), values.roll(1), values.roll(12345), values]
    others += [torch.full_like(values, v) for v in (1.0, finite.tiny, finite.max, -0.3)]
    for other in others:
        expected = (values.float() + other.float()).to(dtype)
        actual = stored_sum(values, other, width).flatten()
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))
