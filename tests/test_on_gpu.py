"""The run on a GPU machine, with steps that only pretend: its clock, what it does again, its words.

That every step runs is seen by the dry run, a step of CI.
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
from pyllm.bench.on_gpu import Run, Step

from pyllm.bench import on_gpu, record

WRITE = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a run into a folder, as if at some commit."""
    monkeypatch.setattr(record, "busy_cores", lambda: 0.0)
    monkeypatch.delenv("PYLLM_COMMIT", raising=False)

    def make(commit="abc", minutes=5.0, previous=None, wheels=None, out="out", dry=False):
        monkeypatch.setenv("PYLLM_COMMIT", commit)
        options = SimpleNamespace(
            out=tmp_path / out, minutes=minutes, previous=previous, wheels=wheels, commit=commit,
            dry_run=dry,
        )  # fmt: skip
        return Run(options)

    return make


def step(name, *code, share=1.0, **more):
    commands = [[sys.executable, "-S", "-c", *map(str, part)] for part in code]
    return Step(name, share, lambda run, seconds: commands, {}, **more)


BUILD = Step("build", None, lambda run, seconds: [], {})


def test_what_ended_at_the_same_commit_is_not_begun_again(made, tmp_path):
    mark = tmp_path / "mark"
    steps = [
        BUILD,
        step("good", (WRITE, mark, "g")),
        step("bad", (WRITE, mark, "b"), ("raise SystemExit(3)",)),
        step("lacks", ("",), needs="no-such-program"),
    ]
    run = made()
    on_gpu.perform(run, steps)
    assert {n: s["outcome"] for n, s in run.steps.items()} == {
        "build": "done", "good": "done", "bad": "failed (3)",
        "lacks": "absent: there is no no-such-program",
    }  # fmt: skip
    again = made()
    on_gpu.perform(again, steps)
    assert mark.read_text() == "gb"
    assert again.steps["bad"]["outcome"] == "failed (3)"
    assert "failed (3), before" in on_gpu.summary(again)
    elsewhere = made(previous=tmp_path / "out", out="elsewhere")
    on_gpu.perform(elsewhere, steps)
    assert mark.read_text() == "gb"
    on_gpu.perform(made(commit="abd"), steps)
    assert mark.read_text() == "gbgb"


def test_a_step_ends_with_its_share_and_what_it_wrote_stays(made, tmp_path, monkeypatch):
    """The first takes its half of the time, though it does not listen; the second has its own."""
    monkeypatch.setattr(on_gpu, "GRACE", 0.2)
    mark = tmp_path / "mark"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    slow = deaf + f"open({str(mark)!r}, 'a').write('slow '); time.sleep(60)"
    run = made(minutes=0.05)
    begin = time.monotonic()
    on_gpu.perform(run, [BUILD, step("slow", (slow,), (WRITE, mark, "no")),
                         step("next", (WRITE, mark, "next"))])  # fmt: skip
    assert time.monotonic() - begin < 20
    assert run.steps["slow"]["outcome"] == "out of time"
    assert (run.steps["slow"]["commands"], run.steps["slow"]["ended"]) == (2, 0)
    assert run.steps["next"]["outcome"] == "done"
    assert mark.read_text() == "slow next"
    assert "out of time: 0 of 2 ended" in on_gpu.summary(run)
    written = json.loads((tmp_path / "out" / on_gpu.STEPS_FILE).read_text())
    assert written["steps"] == run.steps
    assert written["environment"]["commit"] == "abc"


def test_without_a_build_nothing_else_is_begun(made):
    run = made()
    failing = Step(
        "build", None, step("", ("print('no compiler'); raise SystemExit(1)",)).commands, {}
    )
    on_gpu.perform(run, [failing, step("tests", ("",))])
    assert list(run.steps) == ["build"]
    assert "no compiler" in on_gpu.summary(run)


def test_the_log_stays_small(made, monkeypatch):
    monkeypatch.setattr(on_gpu, "LOG_BYTES", 1000)
    run = made()
    run.run(step("talks", ("print('x' * 5000 + 'end')",)), 60)
    text = (run.out / on_gpu.LOG).read_text()
    assert len(text) == 1000
    assert text.endswith("end\n")


def test_pure_wheels_are_on_the_path(made, tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("peer-1-py3-none-any.whl", "native-1-cp312-cp312-linux_x86_64.whl"):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(f"{name.partition('-')[0]}/__init__.py", "x = 1")
    run = made(wheels=folder)
    for name, status in (("peer", 0), ("native", 1)):
        command = [sys.executable, "-S", "-c", f"import {name}"]
        ended = subprocess.run(command, env=run.env, stderr=subprocess.PIPE)
        assert ended.returncode == status


def test_files_that_differ_from_the_commit_have_a_name_of_their_own():
    assert on_gpu.identity("abc") == "abc"
    name = on_gpu.identity("abc-dirty")
    assert name == on_gpu.identity("abc-dirty") != on_gpu.identity("unknown")
    assert name.startswith("abc-dirty-")


@pytest.mark.parametrize("dry", [False, True])
def test_the_steps(made, dry):
    """A process for each test file and op on a GPU; few files, of few bytes."""
    run = made(dry=dry)
    run.identify()
    steps = {s.name: s.commands(run, 60) for s in on_gpu.STEPS if s.name != "build"}
    names = ["tests", "memcheck", "kernels, cuda", "decode", "racecheck", "kernels, triton"]
    assert list(steps) == names
    if dry:
        assert all(len(commands) == 1 for commands in steps.values())
        assert not any("cuda" in commands[0] for commands in steps.values())
        return
    assert any("tests/test_flash_attention.py" in command for command in steps["tests"])
    assert len(steps["kernels, cuda"]) >= 5
    words = [str(word) for commands in steps.values() for c in commands for word in c]
    written = {os.path.basename(word) for word in words if word.startswith(f"{run.out}/")}
    assert written == {"gpu_tests.json", "kernels-bfloat16.json", "gpu_decode.json"}


def test_tests_that_have_run_are_not_run_again(made):
    run = made()
    run.identify()
    files = {"tests/test_norm.py": {"complete": True, "ops": {}},
             "tests/test_rms_norm.py": {"complete": False, "ops": {}}}  # fmt: skip
    record.write(run.out / on_gpu.TESTS, {"files": files}, run.where)
    names = [command[6] for command in on_gpu.test_files(run, 60)]
    assert "tests/test_rms_norm.py" in names
    assert "tests/test_norm.py" not in names


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_says_that_there_is_no_gpu(capsys):
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "there is no CUDA device; --dry-run does without" in capsys.readouterr().err
