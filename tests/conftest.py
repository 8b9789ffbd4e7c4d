import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

# Without a device the Triton kernels run in Triton's interpreter, which is chosen when triton is
# imported. Whoever wants the interpreter on a device sets it himself.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
ON_DEVICE = {"cuda"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda", "triton"}

# Workers beside each other have a core each; torch's threads, which spin, would take it from them.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# cases.py and compare.py are imported by their plain names, from bench/ too.
sys.path.insert(0, str(Path(__file__).parent))


# Markers of tests that run only with an option of the same name.
RARE = {"slow": "some", "long": "many"}
# Triton's interpreter takes seconds for what others do at once: of each test's cases on it every
# fourth runs, all of them with --long or on a GPU.
EVERY = 4


def pytest_addoption(parser):
    for name, minutes in RARE.items():
        help = f"also run the tests that take {minutes} minutes"
        parser.addoption(f"--{name}", action="store_true", help=help)
    help = "add to this file which ops passed their tests on this GPU, at this commit"
    parser.addoption("--record-gpu", metavar="FILE", type=Path, help=help)


def backend_of(item):
    """The parameter `backend` of a test, or None."""
    return getattr(item, "callspec", None) and item.callspec.params.get("backend")


def why_no_interpreter():
    from pyllm.ops import device

    return device.missing("triton", "cpu")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if backend_of(item) in ON_DEVICE:
            item.add_marker(pytest.mark.gpu)
    if "triton" not in ON_DEVICE:
        interpreted = [item for item in items if backend_of(item) == "triton"]
        for item in interpreted if (why := interpreted and why_no_interpreter()) else ():
            item.add_marker(pytest.mark.skip(reason=why))
        count = Counter()
        for item in items:
            if backend_of(item) == "triton":
                if count[item.originalname] % EVERY:
                    item.add_marker(pytest.mark.long)
                count[item.originalname] += 1
    for name, minutes in RARE.items():
        skip = pytest.mark.skip(reason=f"takes {minutes} minutes; run with --{name}")
        for item in items:
            if item.get_closest_marker(name) and not config.getoption(f"--{name}"):
                item.add_marker(skip)


# By file, then by op, with "triton" before it if it was that: how many tests on a device passed and
# failed.
gpu_results = {}


def pytest_runtest_logreport(report):
    if report.when == "call":
        ops = gpu_results.setdefault(report.nodeid.partition("::")[0], {})
        for op in {value for name, value in report.user_properties if name == "device op"}:
            ops.setdefault(op, [0, 0])[report.failed] += 1


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--record-gpu")
    files = {name: ops for name, ops in gpu_results.items() if ops}
    if not path or not files:
        return
    from pyllm.bench import record

    where = record.environment(None)
    data = record.before(path, where) or {"files": {}}
    complete = exitstatus != pytest.ExitCode.INTERRUPTED
    for name, ops in files.items():
        data["files"][name] = {"complete": complete, "ops": dict(sorted(ops.items()))}
    record.write(path, data, where)


@pytest.fixture(autouse=True)
def on_the_device(request, monkeypatch):
    """Tests of what needs a device run on one, and their tensors are made there."""
    backend = backend_of(request.node)
    if backend not in ON_DEVICE:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    from pyllm.ops import device
    from pyllm.ops.registry import Op

    if why := device.missing(backend, "cuda"):
        pytest.skip(why)
    choose = Op.choose

    def choose_and_record(self, *arguments):
        chosen = choose(self, *arguments)
        if chosen == backend:
            op = self.name if backend == "cuda" else f"{backend} {self.name}"
            request.node.user_properties.append(("device op", op))
        return chosen

    monkeypatch.setattr(Op, "choose", choose_and_record)
    with torch.device("cuda"):
        yield


def _real_model(name):
    from pyllm.loading import LoadError, resolve

    try:
        return resolve(name)
    except LoadError as error:
        pytest.skip(f"{name} could not be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2():
    """The path of the real default model, fetched into the user's cache on first use."""
    return _real_model("smollm2-135m")


@pytest.fixture(scope="session")
def minilm():
    """The directory of a real encoder of sentences, fetched into the user's cache on first use."""
    return _real_model("all-minilm-l6-v2")
