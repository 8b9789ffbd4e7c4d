"""Kernel benchmarks on tiny shapes: what they check and write, never how fast anything was."""

import copy
import csv
import itertools
import json
import math

import pytest
import torch
from test_bench import bench

from pyllm.bench import (
    baselines,
    case,
    kernels,
    limits,
    modules,
    overhead,
    record,
    results,
    shapes,
    timing,
)

TINY = {"tiny": shapes.SHAPES["tiny"]}


def times(*rounds):
    return timing.Times(list(rounds))


def test_every_op(tmp_path):
    """Every case is verified and timed, and what is written can be read again."""
    out = tmp_path / "figures.json"
    arguments = ["--shapes", "tiny", "--rounds", 2, "--threads", 1, "--baseline", "torch"]
    shown = bench("kernels", *arguments, "--markdown", "--out", out)
    data = json.loads(out.read_text())
    setting = case.Setting("cpu", torch.float32, small=True)
    for op in kernels.OPS:
        rows = [row for row in data["rows"] if row["op"] == op]
        assert len(rows) == len(kernels.cases_of(op, "tiny", shapes.SHAPES["tiny"], setting)) > 0
        for row in rows:
            assert row["backend"] == "cpu"
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["gb_per_s"] == pytest.approx(row["nbytes"] / row["seconds"] / 1e9)
            floor = row["nbytes"] / data["limits"]["read_gb_per_s"] / 1e9
            assert row["share"] >= floor / row["seconds"] * (1 - 1e-9)
            assert row["baselines"]["torch"]["ratio"] > 0
            assert f"| {op} | {row['shape']} | cpu |" in shown
    with open(out.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == ["pyllm", "torch"] * len(data["rows"])
    assert float(lines[0]["seconds"]) == data["rows"][0]["seconds"]


@pytest.mark.parametrize("op", ["rms_norm", "sample"])
def test_wrong_results_are_not_timed(op, monkeypatch):
    """A float that is off by more than the rule allows, or another token."""
    right = kernels.registry.OPS[op].backends["cpu"]

    def wrong(*arguments):
        result = right(*arguments)
        if op == "rms_norm":
            return (result[0] if isinstance(result, tuple) else result).add_(1e-3)
        arguments[-2].add_(1)

    monkeypatch.setitem(kernels.registry.OPS[op].backends, "cpu", wrong)
    data = kernels.measure([op], TINY, baseline="none", rounds=1)
    assert not data["rows"]
    assert all("AssertionError: tiny" in case["error"] for case in data["failed"])
    assert len(data["failed"]) == 4
    assert any(f"FAILED: {op} tiny" in line for line in kernels.remarks(data))


def test_what_was_done_is_not_done_again():
    """Neither what was timed nor what failed; the rest is added, also by another backend."""
    saved = []
    first = kernels.measure(["rms_norm"], TINY, baseline="none", rounds=1, match="1 x 64")
    first["failed"].append({**first["rows"].pop(), "error": "wrong"})
    assert [len(first[part]) for part in ("rows", "failed")] == [1, 1]
    both = kernels.measure(
        ["rms_norm"], TINY, baseline="none", rounds=1, before=copy.deepcopy(first),
        save=lambda data: saved.append(len(data["rows"])),
    )  # fmt: skip
    assert both["rows"][0] == first["rows"][0]
    assert both["failed"] == first["failed"]
    assert saved == [2, 3]
    again = kernels.measure(
        ["rms_norm"], TINY, backend="reference", baseline="none", rounds=1, before=both
    )
    assert [row["backend"] for row in again["rows"]] == ["cpu"] * 3 + ["reference"] * 4


def test_only_verified():
    data = kernels.measure(["rms_norm"], TINY, rounds=0)
    assert not data["rows"]
    assert len(data["verified"]) == 4


def test_what_a_backend_lacks_is_absent():
    data = kernels.measure(["sample"], TINY, backend="cuda", rounds=1)
    assert not data["rows"]
    assert "sample on cuda" in data["absent"]


def test_a_baseline_that_fails_is_absent(monkeypatch):
    def broken(arguments, options):
        raise RuntimeError("no kernel image")

    other = baselines.Baseline("other", {"rms_norm": broken})
    monkeypatch.setattr(baselines, "BASELINES", [*baselines.BASELINES, other])
    data = kernels.measure(["rms_norm"], TINY, baseline="other", rounds=1)
    assert len(data["rows"]) == 4
    assert data["absent"] == {"other of rms_norm": "RuntimeError: no kernel image"}


def test_results_are_resumed_at_the_same_commit_only(tmp_path, monkeypatch):
    path, where = tmp_path / "kernels.json", {"commit": "abc", "gpu": None, "threads": 2}
    assert record.before(path, where) is None
    record.write(path, {"rows": [1]}, where)
    assert record.before(path, where) == {"rows": [1]}
    for other in ({"commit": "abd"}, {"gpu": {"name": "X"}}, {"threads": 3}):
        assert record.before(path, where | other) is None
    dirty = where | {"commit": "abc-dirty"}
    record.write(path, {"rows": [1]}, dirty)
    assert record.before(path, dirty) is None
    monkeypatch.setenv("PYLLM_COMMIT", "told")
    assert record.commit() == "told"


def test_of_long_prompts_a_part_is_verified():
    setting = case.Setting("cpu", torch.float32)
    found = kernels.cases_of(
        "flash_attention", "m", shapes.parse("64x96x65x5x8x128")["64x96x65x5x8x128"], setting
    )
    long = next(c for c in found if c.size == 1024)
    q = long.make()["q"]
    assert long.part({"q": q})["q"].shape == (1, 1024, 1, 8)
    short = next(c for c in found if c.size == 128)
    assert short.part_of_result(q) is q


def test_bytes_and_operations():
    """Of a matmul of 3 tokens in Q4_0: 4.5 bits a weight, and what goes in and out."""
    setting = case.Setting("cpu", torch.float32)
    found = kernels.cases_of(
        "quant_matmul", "m", shapes.parse("64x96x4x2x32x128")["64x96x4x2x32x128"], setting
    )
    down = next(c for c in found if "down Q4_0 16 x 96 x 64" in c.shape)
    assert down.nbytes == 64 * 96 * 4.5 / 8 + 4 * 16 * (96 + 64)
    assert down.operations == 2 * 16 * 96 * 64
    roof = {"read_gb_per_s": 10.0, "int8_gops": 100.0}
    assert kernels.floor_seconds(down, roof) == pytest.approx(down.operations / 100e9)
    assert kernels.floor_seconds(down, {"read_gb_per_s": 10.0}) == down.nbytes / 10e9


def test_ratios_that_mean_nothing_are_not_shown():
    steady = timing.ratio(times(1, 1.1, 1), times(2, 2.2, 2.1))
    assert steady["ratio"] == pytest.approx(2.0)
    assert steady["meaningful"]
    noisy = timing.ratio(times(1, 1, 1, 1), times(2, 1, 4, 3))
    assert not noisy["meaningful"]
    assert kernels._ratio(noisy) == "noisy"
    assert not timing.ratio(times(1), times(2))["meaningful"]  # one round shows no spread


def test_contenders_take_turns():
    calls = []
    contenders = {name: [lambda name=name: calls.append(name)] for name in "ab"}
    found = timing.measure(contenders, device="cpu", rounds=4)
    assert all(len(t.rounds) == 4 for t in found.values())
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches >= 6


def test_data_is_larger_than_the_cache():
    arguments = {"x": torch.empty(1 << 20)}
    n = kernels._n_sets(arguments, case.Setting("cpu", torch.float32))
    assert n == min(kernels.MOST_SETS, 1 + 4 * kernels.last_cache("cpu") // (4 << 20))


@pytest.mark.parametrize("op", sorted(baselines.TORCH))
def test_baselines_compute_the_same(op):
    """What is timed beside us does the same work: it gives the same result."""
    torch.manual_seed(0)
    setting = case.Setting("cpu", torch.float32, small=True)
    for c in kernels.cases_of(op, "tiny", shapes.SHAPES["tiny"], setting):
        if op == "sample" and not c.options["greedy"]:
            continue  # it draws other numbers
        arguments = c.make()
        ours = case.tensors(c.call(arguments, "reference"))
        for other in baselines.BASELINES:
            if other.missing("cpu") or op not in other.ops or other.name == "torch.compile":
                continue
            if other.name in ("torch int4", "torch int8"):
                continue  # weights of their own
            call = other.ops[op](arguments, c.options)
            if call is None:
                continue  # it cannot do this case
            theirs = case.tensors(call())
            if other.name == "torch padded":  # which is not timed cutting its padding off
                rows = zip(theirs[0].transpose(1, 2), c.options["lengths"], strict=True)
                theirs = [torch.cat([y[:n] for y, n in rows])]
            for a, b in zip(theirs, ours, strict=True):
                assert torch.allclose(a.double(), b.double(), atol=1e-3), (other.name, c.shape)


def test_torch_quantized_matmuls_run():
    x, small = torch.randn(3, 64, dtype=torch.bfloat16), {"tokens": 3}
    for name, bits in (("torch int4", 4), ("torch int8", 8)):
        adapter = next(b for b in baselines.BASELINES if b.name == name)
        weight = pyllm_weight(bits)
        call = adapter.ops["quant_matmul"]({"x": x, "weight": weight}, small)
        assert call().shape == (3, 96)
        assert adapter.ops["quant_matmul"]({"x": x.float(), "weight": weight}, small) is None


def pyllm_weight(bits):
    from pyllm.quant import QuantTensor

    return QuantTensor.from_float(torch.randn(96, 64), bits=bits, symmetric=True)


def test_mistakes():
    for arguments, message in (
        ({"ops": ["conv"]}, "--op: expected flash_attention"),
        ({"dtype": "int3"}, "--dtype: expected float32"),
        ({"baseline": "tensorflow"}, "--baseline: expected none, torch"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.measure(**arguments)
    with pytest.raises(ValueError, match="--shapes: expected smollm2"):
        shapes.parse("gpt-9")


def test_list():
    shown = bench("list")
    for name in (*kernels.OPS, *shapes.SHAPES, *(b.name for b in baselines.BASELINES)):
        assert name in shown
    assert "absent: for cuda only" in shown or torch.cuda.is_available()


def test_cells_are_readable():
    assert kernels._us(1.2345e-5) == "12.3"
    assert kernels._us(0.25) == "250000"
    assert math.isclose(timing._drift([1, 1, 2, 2]), 2.0)


def test_overhead(tmp_path):
    out = tmp_path / "overhead.json"
    shown = bench("overhead", "--threads", 1, "--rounds", 2, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["op"] for row in rows] == list(overhead.cases())
    for row in rows:
        assert 0 < row["kernel_us"] < row["call_us"]
        assert row["overhead_us"] == pytest.approx(row["call_us"] - row["kernel_us"])
        assert row["op"].partition(",")[0] in shown


def test_modules(monkeypatch):
    monkeypatch.setattr(modules, "SIZES", [(1, 64), (5, 17)])
    data = modules.measure(threads=1, rounds=2)
    assert len(data["rows"]) == 2 * 2 * 2 * len(modules.DTYPES)
    for row in data["rows"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert "| RMSNorm, residual | 5 x 17 |" in "\n".join(results.PARTS["modules"](data))


def test_modules_are_called_alike():
    for residual in (False, True):
        for name in modules.NORMS:
            ours, theirs = modules.calls(name, 3, 17, torch.float32, residual)
            y = ours()[0] if residual else ours()
            torch.testing.assert_close(y, theirs())


def test_limits(tmp_path):
    out = tmp_path / "limits.json"
    shown = bench("limits", "--threads", 1, "--out", out)
    found = json.loads(out.read_text())["limits"]
    assert set(found) == {"read_gb_per_s", *limits.ARITHMETIC.values()}
    assert found["read_gb_per_s"] > 0
    assert all(name in shown for name in found)
