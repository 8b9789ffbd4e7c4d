"""Comparing results, and instruction counts: no test here looks at how long anything took."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyllm import _C, ops
from pyllm.bench import compare, instructions, kernels, record, regress, replay, shapes, timing
from pyllm.cli import main

ROOT = Path(__file__).parents[1]
TINY = {"tiny": shapes.SHAPES["tiny"]}


@pytest.fixture(scope="module")
def measured():
    """A real result, its ratios replaced: every case is twice as fast as each of two baselines."""
    data = kernels.measure(["rms_norm", "sample"], TINY, baseline="torch", rounds=2)
    assert len(data["rows"]) > 2
    for row in data["rows"]:
        row["seconds"], row["low"], row["high"] = 1e-5, 0.9e-5, 1.1e-5
        other = row["baselines"]["torch"] | ratio(2.0)
        row["baselines"] = {"torch": other, "liger": dict(other)}
    return data | {"environment": record.environment(_C.num_threads())}


def ratio(value, spread=0.02, meaningful=True):
    low, high = value * (1 - spread), value * (1 + spread)
    return {"ratio": value, "ratio_low": low, "ratio_high": high, "meaningful": meaningful}


def test_spreads_are_those_of_the_ratios():
    """In every result of kernels that is committed, as it was written."""
    paths = list((ROOT / "bench/results").glob("*/kernels*.json"))
    assert paths
    for path in paths:
        for by_baseline in compare.read(path).ratios.values():
            for r in by_baseline.values():
                assert r.low <= r.median <= r.high
                assert r.meaningful == (2 * r.spread <= timing.MEANINGLESS)


def write(path, data, change=lambda data: None):
    """A copy with a change, as a file; returns it as read."""
    data = copy.deepcopy(data)
    change(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return compare.read(path)


def slower(value, baselines=("torch", "liger"), case=0, **options):
    """Sets the ratios of a case."""

    def change(data):
        for name in baselines:
            data["rows"][case]["baselines"][name] |= ratio(value, **options)

    return change


@pytest.fixture
def run(capsys):
    """Runs a command: exit code, standard output, standard error."""

    def run(*arguments):
        code = main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_changes(measured, tmp_path):
    a = write(tmp_path / "a.json", measured)
    b = write(tmp_path / "b.json", measured, slower(3.0))
    first, second, *rest = compare.changes(a, b)
    assert first["case"] == f"{measured['rows'][0]['op']}, {measured['rows'][0]['shape']}"
    assert [first["baseline"], second["baseline"]] == ["torch", "liger"]
    assert first["change"] == second["change"] == 1.5
    assert first["certain"]
    assert {row["change"] for row in rest} == {1.0}
    assert not any(row["certain"] for row in rest)
    assert compare.changes(b, a)[0]["change"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("options", [{"spread": 0.5}, {"meaningful": False}])
def test_noise_is_no_change(measured, tmp_path, options):
    a = write(tmp_path / "a.json", measured)
    b = write(tmp_path / "b.json", measured, slower(3.0, **options))
    assert not compare.changes(a, b)[0]["certain"]


def test_only_in_one(measured, tmp_path):
    def fewer(data):
        del data["rows"][0]
        del data["rows"][0]["baselines"]["liger"]

    a, b = write(tmp_path / "a.json", measured), write(tmp_path / "b.json", measured, fewer)
    gone, kept = (f"{row['op']}, {row['shape']}" for row in measured["rows"][:2])
    lines = [f"only in {a.name}: {gone}", f"only in {a.name}: baseline liger in {kept}"]
    assert compare.only(a, b) == compare.only(b, a) == lines
    assert len(compare.changes(a, b)) == 2 * len(measured["rows"]) - 3


def test_environments(measured, tmp_path):
    def other(data):
        where = data["environment"]
        where["commit"], where["versions"]["torch"] = "0123456789ab", "1.0"
        where["machine"]["processor"] = "abacus"
        where["contended"], where["busy_cores"] = True, 1.5

    quiet = {"contended": False}
    a = write(tmp_path / "a.json", measured, lambda data: data["environment"].update(quiet))
    b = write(tmp_path / "b.json", measured, other)
    where = measured["environment"]
    assert compare.differences(a, a) == []
    assert compare.differences(a, b) == [
        f"processor: {where['machine']['processor']} and abacus",
        f"commit: {where['commit']} and 0123456789ab",
        f"torch: {where['versions']['torch']} and 1.0",
        f"contended: {b.name}: others kept 1.5 cores busy before",
    ]
    with pytest.raises(ValueError, match="--absolute: expected results of one device"):
        compare.changes(a, b, absolute=True)


def test_absolute(measured, tmp_path, run):
    def half(data):
        data["rows"][0] |= {"seconds": 0.5e-5, "low": 0.45e-5, "high": 0.55e-5}

    a, b = write(tmp_path / "a.json", measured), write(tmp_path / "b.json", measured, half)
    first, *rest = compare.changes(a, b, absolute=True)
    assert first["change"] == pytest.approx(2)
    assert first["baseline"] is None
    assert len(rest) == len(measured["rows"]) - 1
    code, shown, _ = run("compare", a.name, b.name, "--absolute", "--markdown")
    assert code == 0
    assert shown.count("2.00 x") == 1


def test_compare_command(measured, tmp_path, run):
    a = write(tmp_path / "a.json", measured)
    b = write(tmp_path / "b.json", measured, slower(1.0, ["torch"]))
    for options in ([], ["--markdown"]):
        code, shown, _ = run("compare", a.name, b.name, *options)
        assert code == 0
        assert shown.count("slower") == 1
        assert "0.50 x" in shown
    line = next(line for line in shown.split("\n") if "slower" in line)
    assert line.split(" | ")[1:] == ["torch", "2.00", "1.00", "0.50 x", "slower |"]


def test_compare_end_to_end(run):
    """Results that are committed: two instruction sets of one machine."""
    paths = sorted((ROOT / "bench/results").glob("*avx*/end_to_end-smollm2-135m.json"))
    a, b = map(compare.read, paths)
    data = json.loads(paths[1].read_text())
    rows = compare.changes(a, b)
    found = {(row["test"], row["engine"]): row["ratio"] for row in data["rows"]}
    assert {row["case"] for row in rows} == {test for test, _ in found}
    for row in rows:
        assert row["b"].median == pytest.approx(found[row["case"], row["baseline"]])
    assert "instruction set: avx2 and avx512" in compare.differences(a, b)
    assert "instruction set: avx2 and avx512" in run("compare", *paths)[1]


def test_mistakes(measured, tmp_path, run):
    a = write(tmp_path / "a.json", measured)
    other = write(tmp_path / "b.json", measured, lambda data: data.update(dtype="float16"))
    limits = next((ROOT / "bench/results").glob("*/limits.json"))
    model = next((ROOT / "bench/results").glob("*/end_to_end-smollm2-135m.json"))
    for arguments, message in (
        (["compare", a.name, other.name], "expected two results of the same"),
        (["compare", a.name, limits], "expected a result of"),
        (["regress"], "or --instructions"),
        (["regress", "--update"], "--update: expected --instructions"),
        (["regress", model], "expected a result of `pyllm bench kernels`"),
    ):
        code, _, told = run(*arguments)
        assert code == 2
        assert message in told


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (slower(1.8), "regressed"),
        (slower(1.95, spread=0.001), "ok"),  # less than what any two runs differ by
        (slower(1.8, spread=0.15), "ok"),  # within the recorded spread
        (slower(1.8, ["torch"]), "ok"),  # that baseline became faster
        (slower(1.0, meaningful=False), "not judged: torch is noisy, liger is noisy"),
        (lambda data: data["environment"]["versions"].update(torch="1.0"), "ok"),
        (slower(2.5), "ok"),
    ],
)
def test_judge(measured, tmp_path, change, state):
    old = write(tmp_path / "old.json", measured)
    first, *rest = regress.judge(write(tmp_path / "new.json", measured, change), old)
    assert first["state"] == state
    assert {row["state"] for row in rest} == {"ok"}


def test_another_baseline_is_not_judged(measured, tmp_path):
    def other_torch(data):
        slower(1.0, ["torch"])(data)
        data["environment"]["versions"]["torch"] = "1.0"
        for row in data["rows"]:
            del row["baselines"]["liger"]

    old = write(tmp_path / "old.json", measured)
    rows = regress.judge(write(tmp_path / "new.json", measured, other_torch), old)
    assert {row["state"] for row in rows} == {"not judged: another torch"}


def elsewhere(data):
    data["environment"]["machine"]["processor"] = "abacus"


def test_regress_command(measured, tmp_path, run):
    committed = tmp_path / "results"
    write(committed / "here/kernels-norm.json", measured)
    write(committed / "float16/kernels.json", measured, lambda data: data.update(dtype="float16"))
    write(committed / "there/kernels.json", measured, elsewhere)
    same = write(tmp_path / "same.json", measured)
    worse = write(tmp_path / "worse.json", measured, slower(1.0))
    assert [Path(r.name).parent.name for r in regress.committed(same, committed)] == ["here"]
    code, shown, _ = run("regress", same.name, "--results", committed)
    assert code == 0
    n = len(measured["rows"])
    assert f"{n} of {n} cases judged, 0 regressed" in shown
    code, shown, _ = run("regress", same.name, worse.name, "--results", committed)
    assert code == 1
    assert shown.count("0 regressed") == shown.count("1 regressed") == 1
    assert "-50.0%" in shown
    code, shown, _ = run("regress", worse.name, "--results", tmp_path / "none")
    assert code == 0
    assert "no committed result of" in shown


COMMITTED = json.loads(instructions.TABLE.read_text())


def test_the_table_of_counts_has_every_case():
    names = [f"{op}, {shape}" for op, shape in instructions.CASES]
    for isa in instructions.ISAS:
        assert sorted(COMMITTED["counts"][isa]) == sorted(names)
        assert all(n > 0 for n in COMMITTED["counts"][isa].values())


def test_every_kernel_is_counted():
    table = (ROOT / "csrc/cpu/kernels.def").read_text()
    assert sorted(instructions.KERNELS) == sorted(
        re.findall(r"^PYLLM_CPU_KERNEL\((\w+)", table, re.M)
    )


def test_counts_are_judged():
    before = {"avx2": {"a": 1000, "b": 1000, "c": 1000, "d": 1000}}
    now = {"avx2": {"a": 1030, "b": 1031, "c": 969, "e": 5}}
    states = {case: state for _, case, _, _, state in instructions.changes(before, now)}
    assert states == {"a": "", "b": "grew", "c": "fell", "e": "new"}


def test_counts_of_another_compiler_are_skipped(monkeypatch, run):
    monkeypatch.setattr(instructions, "missing", lambda: None)
    assert instructions.skipped({"compiler": instructions.compiler()}) is None
    why = instructions.skipped({"compiler": "x86_64, GCC 1"})
    assert why == f"committed for x86_64, GCC 1, this is {instructions.compiler()}"
    monkeypatch.setattr(instructions, "missing", lambda: "no valgrind")
    code, shown, _ = run("regress", "--instructions")
    assert code == 0
    assert "SKIPPED: instruction counts: no valgrind" in shown
    code, _, told = run("regress", "--instructions", "--update")
    assert code == 2
    assert "--update: no valgrind" in told


@pytest.mark.parametrize(("factor", "code"), [(1, 0), (1.04, 1)])
def test_instructions_command(monkeypatch, run, factor, code):
    monkeypatch.setattr(instructions, "skipped", lambda committed: None)
    counts = {
        isa: {case: round(n * factor) for case, n in cases.items()}
        for isa, cases in COMMITTED["counts"].items()
    }
    monkeypatch.setattr(instructions, "measure", lambda: counts)
    got, shown, _ = run("regress", "--instructions")
    assert got == code
    assert ("regress --instructions --update" in shown) == bool(code)


def test_what_is_counted_is_the_kernel(tmp_path):
    """Replayed, without torch, a recorded call writes what it wrote when it was recorded; and
    every case records calls, all of which can be replayed."""
    seen, call = [], ops.rms_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "rms_norm", lambda *a, **k: seen.append(call(*a, **k)) or seen[-1])
        recorded = instructions.record(instructions.CASES)
    y, total = seen[-1]
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import replay; "
        "tensors = [a for a in replay.main(*sys.argv[1:]) if isinstance(a, replay.Tensor)]; "
        "assert 'numpy' not in sys.modules; "
        "sys.stdout.buffer.write(b''.join(replay.content(t) for t in tensors))"
    )
    for name, calls in recorded.items():
        assert calls, name
        path = instructions.write_calls(tmp_path / "calls", calls)
        command = [sys.executable, "-I", "-S", "-c", code, Path(replay.__file__).parent]
        done = subprocess.run([*command, _C.__file__, path], capture_output=True)
        assert done.returncode == 0, done.stderr
        if name.startswith("rms_norm"):
            assert y.numpy().tobytes() in done.stdout
            assert total.numpy().tobytes() in done.stdout


@pytest.mark.skipif(instructions.missing() is not None, reason=str(instructions.missing()))
def test_counts_repeat_exactly():
    case = next(c for c in instructions.CASES if c[0] == "rope_cache")
    isa = instructions.isas()[0]
    name = ", ".join(case)
    counted = [instructions.measure([case], [isa])[isa][name] for _ in range(2)]
    assert counted[0] == counted[1]
    assert counted[0] > torch.Size([9, 64]).numel() / 8  # at least each value of q, in vectors
    if COMMITTED["compiler"] == instructions.compiler():
        assert counted[0] <= COMMITTED["counts"][isa][name] * (1 + instructions.GROWTH)
