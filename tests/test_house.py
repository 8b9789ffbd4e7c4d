"""The architecture as tests: what belongs where, and that nothing imports upwards."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import pyllm.ops
from pyllm.ops.registry import OPS

ROOT = Path(__file__).parents[1]

# Each room may import from itself and from those before it.
ROOMS = ["quant", "ops", "nn", "loading", "models", "runtime", "cli"]
# Each folder of csrc/ may include from these.
INCLUDES = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "emulator": {"core", "emulator"},
    "cuda": {"core", "emulator", "cuda"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}

# pyllm/ops/<stem>.py, but for what the ops share.
STEMS = sorted(
    path.stem
    for path in (ROOT / "pyllm/ops").glob("*.py")
    if path.stem not in {"alloc", "device", "registry"} and not path.stem.startswith("_")
)


def imported_rooms(path):
    """The rooms of pyllm that a file imports from, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path}:{node.lineno}: leaves its room by dots; name it in full"
            if node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "pyllm" and room in ROOMS:
                yield room


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_imports_upwards(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    paths = list((ROOT / "pyllm" / room).glob("**/*.py"))
    assert paths
    for path in paths:
        for imported in imported_rooms(path):
            assert imported in allowed, f"{path.relative_to(ROOT)} imports from pyllm.{imported}"


@pytest.mark.parametrize("folder", INCLUDES)
def test_nothing_includes_upwards(folder):
    suffixes = {".h", ".cpp", ".def", ".cu", ".cuh"}
    paths = [p for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes]
    assert paths
    for path in paths:
        where = path.relative_to(ROOT)
        for name in re.findall(r'^#include ["<](.*)[">]', path.read_text(), re.MULTILINE):
            first = name.partition("/")[0]
            assert first not in INCLUDES or first in INCLUDES[folder], f"{where} includes {name}"
            of_python = first == "pybind11" or name == "Python.h"
            assert folder == "bindings" or not of_python, f"{where} includes {name}"


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_an_op(stem):
    for place in ["csrc/cpu/{}.cpp", "csrc/bindings/{}.cpp", "tests/test_{}.py"]:
        assert (ROOT / place.format(stem)).exists(), f"{place.format(stem)} is missing"


@pytest.mark.parametrize("name", pyllm.ops.__all__)
def test_public_ops(name):
    function = getattr(pyllm.ops, name)
    for section in ["Args:", "Returns:", "Raises:"]:
        assert section in inspect.getdoc(function), f"{name}: its docstring has no {section}"
    backend = inspect.signature(function).parameters["backend"]
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY
    assert backend.default is None


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_every_op_has_a_reference(op):
    assert "reference" in op.backends
