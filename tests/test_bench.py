"""The benchmarks' commands on a tiny model: what they write, never how fast it was."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gguf

from pyllm import LLM
from pyllm.bench import gpu_decode

pytest.importorskip("gguf")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_gguf(
        tmp_path_factory.mktemp("bench") / "tiny.gguf", embedding_quant="Q8_0", context=2048
    )


def bench(*arguments, command=("-m", "pyllm", "bench")):
    run = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_repository_has_the_command_too():
    """``python -m bench`` there is ``pyllm bench``."""
    assert bench("--help", command=("-m", "bench")) == bench("--help")


def test_mistakes_are_told():
    """One line and exit code 2, as of every command."""
    for arguments, message in ((["nothing"], "nothing"), (["profile", "no-model"], "no-model")):
        command = [sys.executable, "-m", "pyllm", "bench", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 2
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_perplexity(model, tmp_path):
    """Of both heads; of the file's own as computed here from its logits."""
    from pyllm.bench.perplexity import losses

    out, text = tmp_path / "figures.json", tmp_path / "text.txt"
    text.write_text("the other one and the other reading, in the end, " * 8)
    shown = bench("perplexity", model, "--text", text, "--rounds", 1, "--threads", 1, "--out", out)
    data = json.loads(out.read_text())
    own, rounded = data["rows"]
    llm = LLM(model)
    ids = llm.tokenizer.encode(text.read_text())
    logprobs = llm.logits(ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert own["perplexity"] == pytest.approx(logprobs.mean().neg().exp().item(), rel=1e-5)
    assert data["tokens"] == len(ids) - 1
    assert data["cost"] == pytest.approx(rounded["perplexity"] / own["perplexity"] - 1, abs=1e-9)
    assert f"{data['cost']:+.2%}" in shown
    pieces = torch.cat([losses(llm, ids[i : i + 50]) for i in range(0, len(ids), 50)])
    assert torch.equal(losses(llm, ids, piece=50), pieces)
    with pytest.raises(ValueError, match="text: expected at least two tokens, got 1"):
        losses(llm, ids[:1])


def test_end_to_end(model, tmp_path):
    out = tmp_path / "figures.json"
    text = bench(
        "end_to_end", "--model", model, "--rounds", 1, "--threads", 1, "--engine", "pyllm",
        "--out", out,
    )  # fmt: skip
    data = json.loads(out.read_text())
    assert [row["test"] for row in data["rows"]] == ["pp512", "tg128", "tg128@512", "8x tg64@512"]
    for row in data["rows"]:
        assert len(row["tokens_per_second"]) == 1
        assert 0 < row["median"] < math.inf
        assert row["test"] in text
    where = data["environment"]
    assert where["threads"] == 1
    assert where["commit"]
    assert "torch" in where["versions"]
    assert isinstance(where["contended"], bool)


def test_profile_counts_every_kernel_and_the_bytes_of_the_weights(model, tmp_path):
    from pyllm.bench.profile import matmuls

    out = tmp_path / "figures.json"
    bench("--profile", model, "--depth", 8, "--batch", 2, "--threads", 1, "--out", out)
    data = json.loads(out.read_text())
    ops = {op["op"]: op for op in data["ops"]}
    assert ops["rope_cache"]["count"] == 2
    weights = list(matmuls(LLM(model).model))
    assert sum(op["bytes"] for op in data["ops"]) == sum(w.nbytes for w in weights)
    assert sum(op["count"] for op in data["ops"] if "matmul" in op["op"]) == len(weights)


def test_prompt_lookup(model):
    from pyllm.bench import prompt_lookup

    data = prompt_lookup.measure(model, threads=1, rounds=1, n=12)
    rows = {row["task"]: row for row in data["rows"]}
    assert list(rows) == list(prompt_lookup.TASKS)
    assert [rows[task]["answers"] for task in ("edit", "story")] == [prompt_lookup.N_TEXTS, 1]
    assert all(row["accepted"] <= row["drafted"] for row in data["rows"])
    assert "edit" in [row[0] for row in prompt_lookup.cells(data)]
    prompt_lookup.table(data)


def test_drop_in(monkeypatch):
    import torch

    from pyllm.bench import drop_in, results

    class Tiny:
        what, unit, n = "tiny", "rows/s", 4

        def __init__(self):
            self.model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.LayerNorm(32)).eval()
            self.x = torch.randn(4, 32)

        def run(self, model):
            return model(self.x)

        def check(self, way, result, before):
            if "int" not in way:
                torch.testing.assert_close(result, before)

    monkeypatch.setattr(drop_in, "CASES", {"smollm2": Tiny})
    monkeypatch.setattr(drop_in, "missing", list)
    data = drop_in.measure(threads=1, rounds=2)
    assert [row["way"] for row in data["rows"]] == list(drop_in.WAYS["smollm2"])
    assert data["rows"][0]["ratio"] == 1
    assert all(row["low"] <= row["median"] <= row["high"] for row in data["rows"])
    drop_in.table(data)
    assert "| tiny | patched, int8 |" in "\n".join(results.PARTS["drop_in"](data))
    with pytest.raises(ValueError, match="case: expected smollm2, got another"):
        drop_in.measure(threads=1, cases=["another"])
    assert drop_in.sentences(3) == drop_in.sentences(3)
    monkeypatch.setattr(drop_in, "missing", lambda: ["gguf"])
    with pytest.raises(ModuleNotFoundError, match="install gguf to measure drop_in"):
        drop_in.measure(threads=1)


def test_startup_and_interference(model):
    from pyllm.bench import interference, startup

    data = startup.measure(model, threads=1, rounds=1, fill=64)
    assert [row["what"] for row in data["rows"]][:2] == ["import torch", "pyllm"]
    assert data["memory"][0]["engine"] == "pyllm"
    assert data["memory"][0]["peak_mb"] > data["memory"][0]["file_mb"]
    startup.tables(data)
    data = interference.measure(model, threads=1, rounds=1, n=4, depth=4)
    conditions = [row["condition"] for row in data["rows"] if row["engine"] == "pyllm"]
    assert conditions == ["quiet", "busy"]
    interference.table(data)


def test_an_engine_that_is_not_installed_is_absent_and_an_unknown_one_refused():
    from pyllm.bench import engines

    found, missing = engines.interpreters()
    assert found["pyllm"] == sys.executable
    assert sorted([*found, *missing]) == sorted(engines.ENGINES)
    with pytest.raises(ValueError, match=r"engine: expected pyllm, .*, got 'unknown'"):
        engines.interpreters(["unknown"])


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0"])
def test_random_models_load_and_keep_the_size_of_their_input(tmp_path, quant):
    from pyllm.bench import models

    shape = {
        "hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "vocab": 400,
    }  # fmt: skip
    path = tmp_path / "random.gguf"
    source = tiny_gguf(tmp_path / "tiny.gguf")
    models.write_random(path, quant, vocabulary_of=source, shape=shape)
    llm = LLM(path)
    assert llm.model.config.vocab_size == 400
    logits = llm.logits([5, 6, 7])
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 5


CANNED = {
    "environment": {
        "machine": {"processor": "A processor"}, "threads": 2, "date": "2000-01-01T00:00:00",
        "commit": "abc", "versions": {"torch": "2"}, "contended": True,
    },
    "model": "tiny", "threads": 2, "rounds": 2, "absent": {"another": "not installed"},
    "limits": {"read_gb_per_s": 20.0, "int8_gops": 500.0},
    "rows": [
        {
            "test": "tg32@16", "depth": 16, "engine": engine, "tokens_per_second": [1.0, 2.0],
            "median": 1.5, "low": 1.0, "high": 2.0, "ratio": 1.0, "gb_per_s": 5.0,
        }
        for engine in ("pyllm", "llama.cpp")
    ],
}  # fmt: skip


def test_plots_and_the_page_of_results(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "device"
    folder.mkdir()
    ops = [{"op": "quant_matmul 8 x 8", "count": 2, "microseconds": 3.0, "bytes": 64}]
    profile = CANNED | {"depth": 8, "batch": 1, "microseconds": 3.0, "ops": ops}
    times = {"seconds": 2e-6, "low": 1e-6, "high": 3e-6}
    peer = times | {"ratio": 1.5, "meaningful": True}
    row = times | {
        "op": "rms_norm", "backend": "cpu", "nbytes": 64, "operations": 32, "cold": True,
        "arithmetic": "float32_gflops", "gflops": 0.016, "gb_per_s": 0.03, "share": 0.5,
        "drift": 1.0, "busy_cores": 0.0, "baselines": {"torch": peer},
    }  # fmt: skip
    rows = [row | {"size": n, "shape": f"tiny, {n} x 8"} for n in (1, 4)]
    kernels = CANNED | {
        "rows": rows, "device": "cpu", "dtype": "float32", "absent": {}, "emulated": False,
        "limits": {"read_gb_per_s": 1.0, "float32_gflops": 10.0},
    }  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps(kernels))
    for kind, data in {"end_to_end": CANNED, "context": CANNED, "profile": profile}.items():
        (folder / f"{kind}-tiny.json").write_text(json.dumps(data))
    bench("plot", tmp_path)
    drawn = [f"{kind}-tiny" for kind in ("end_to_end", "context", "profile")]
    for name in (*drawn, "kernels-roofline", "kernels-times"):
        light, dark = ((folder / f"{name}{theme}.svg").read_text() for theme in ("", "-dark"))
        assert "<svg" in light
        assert "#ffffff" in light
        assert "#0d1117" in dark
    page = (tmp_path / "README.md").read_text()
    assert "Not measured on this machine yet: profile-smollm2-135m-depth16, " in page
    assert "| tg32@16 | llama.cpp | 1.5 | 1.0 to 2.0 | 1.00 x | 25% of bandwidth |" in page
    assert "Not measured: another (not installed)." in page
    assert "Other processes were busy" in page
    assert "| rms_norm | cpu | 2 | 50% | 1.50 |" in page
    assert "| quant_matmul | timed at abc | never run, emulator only |" in page


def test_the_page_says_what_ran_on_which_gpu():
    """Verified by tests and benchmarks, timed, failed; never run. An emulator's run is none."""
    from pyllm.bench import status

    gpu = {"commit": "abc", "gpu": {"name": "X"}}
    case = {"op": "rms_norm", "shape": "tiny", "backend": "cuda", "asked": "cuda"}
    kernels = {
        "rows": [case], "verified": [case, case], "emulated": False, "environment": gpu,
        "failed": [case | {"op": "quant_matmul", "backend": None, "error": "wrong"}],
    }  # fmt: skip
    ops = {"rms_norm": [10, 0], "triton rms_norm": [4, 1]}
    tests = {"files": {"test_norm.py": {"complete": True, "ops": ops}}, "environment": gpu}
    emulated = kernels | {"emulated": True, "environment": gpu | {"gpu": None}}
    files = {"card": {"kernels-float16": kernels, "gpu_tests": tests}}
    page = "\n".join(status.matrix(files | {"none": {"kernels": emulated}}))
    assert "| op | cpu on none | cuda on a GPU | triton on a GPU |" in page
    assert (
        "| rms_norm | not timed | card: verified (12) at abc; timed at abc |"
        " card: **1 of 5 failed** at abc |"
    ) in page
    assert "| quant_matmul | not timed | card: **1 of 1 failed** at abc |" in page
    assert "| layer_norm | not timed | never run, emulator only | never run, interp" in page
    assert status.headline(emulated) == []


def test_the_page_beside_the_kernels_is_rewritten_between_its_marks(tmp_path):
    from pyllm.bench import results

    folder = tmp_path / "device"
    folder.mkdir()
    ops = [{"op": "rms_norm", "count": 2, "microseconds": 3.0, "bytes": 0}]
    profile = CANNED | {"batch": 1, "microseconds": 3.0, "ops": ops}
    for depth in (16, 512):
        file = folder / f"profile-smollm2-135m-depth{depth}.json"
        file.write_text(json.dumps(profile | {"depth": depth}))
    page = tmp_path / "page.md"
    page.write_text(f"above\n{results.BEGIN}old\n{results.END}below\n")
    for _ in range(2):
        text = results.write_decode_step(tmp_path, page).read_text()
        assert text.startswith("above\n")
        assert text.endswith("below\n")
        assert "old" not in text
        assert text.count("| rms_norm | 2 | 3.0 | 100.0% |  |") == 2
    results.write_decode_step(tmp_path / "nothing", page)
    assert "None has been recorded yet." in page.read_text()


def test_the_headline_of_the_readme_is_made_from_results(tmp_path):
    from pyllm.bench import results

    folder = tmp_path / "device"
    folder.mkdir()
    rows = [
        {"test": "pp512", "engine": "pyllm", "median": 1512.4},
        {"test": "pp512", "engine": "slow", "median": 3.0},
        {"test": "tg128", "engine": "pyllm", "median": 286.2},
    ]
    data = CANNED | {"rounds": 3, "rows": rows}
    (folder / "end_to_end-smollm2-135m.json").write_text(json.dumps(data))
    page = tmp_path / "page.md"
    page.write_text(f"above\n{results.BEGIN}old\n{results.END}below\n")
    text = results.write_headline(tmp_path, page).read_text()
    assert (
        "| test | pyllm | slow |\n| --- | --- | --- |\n| pp512 | 1512 | 3 |\n| tg128 | 286 |  |"
        in text
    )
    assert "old" not in text


def test_the_suite_leaves_out_what_is_done_and_refuses_unknown_parts(model, tmp_path, monkeypatch):
    from pyllm.bench import models, record, suite

    runs = []

    def measure(path, *, threads, progress):
        runs.append(path)
        return {}

    timed = []
    monkeypatch.setattr(suite.kernels, "measure", lambda **kw: timed.append(kw) or {"rows": []})
    monkeypatch.setattr(suite.drop_in, "measure", lambda **kw: {"rows": []})
    monkeypatch.setattr(suite.drop_in, "missing", list)
    for module in (suite.overhead, suite.modules):  # which are tested elsewhere
        monkeypatch.setattr(module, "measure", lambda *args, **kw: {"rows": []})
    monkeypatch.setattr(suite, "PARTS", [("startup", "", measure, {}, suite.is_small, 0)])
    monkeypatch.setattr(models, "path_of", lambda name: name)
    monkeypatch.setattr(record, "commit", lambda: "abc")
    options = {"threads": 1, "rounds": 1, "minutes": 1}
    suite.run(tmp_path, ["a", "random-b"], **options)
    assert runs == ["a"]  # not on a model larger than the caches
    assert (tmp_path / "startup-a.json").exists()
    suite.run(tmp_path, ["a", "c"], resume=True, **options)
    assert runs == ["a", "c"]
    assert len(timed) == 1  # the kernels were done the first time
    assert (tmp_path / "kernels.json").exists()
    assert (tmp_path / "drop_in.json").exists()
    monkeypatch.setattr(record, "commit", lambda: "abc-dirty")
    suite.run(tmp_path, ["a"], resume=True, **options)
    assert runs == ["a", "c", "a"]
    with pytest.raises(ValueError, match=r"part: expected kernels, profile, .*, got nothing"):
        suite.run(tmp_path, ["a"], only=["nothing"], **options)


def test_gpu_decode_runs_dry_and_predicts():
    """With no GPU: all of it but the speed, which is another machine's."""
    data = gpu_decode.measure("tiny", "cpu", "reference", "float16", scale=256)
    assert [t["name"] for t in data["tests"]] == [t.name for t in gpu_decode.TESTS]
    assert all(t["step_ms"] > 0 and t["prompt_tokens_per_s"] > 0 for t in data["tests"])
    assert gpu_decode.table(data).row_count == len(gpu_decode.TESTS)

    config = gpu_decode.config_of("llama3-8b", 32, 8194)
    assert sum(gpu_decode.parameters_of(config)) == 7_504_658_432  # Llama-3-8B less its embedding
    by_name = {t.name: t for t in gpu_decode.TESTS}
    one, int4 = by_name["bf16, 1 sequence at 2k"], by_name["int4, 1 sequence at 2k"]
    peaks = gpu_decode.PEAKS["H100"]
    assert 1.5e10 < gpu_decode.step_bytes(config, one) < 1.56e10
    ratio = gpu_decode.predict(config, one, peaks)["step"]
    ratio /= gpu_decode.predict(config, int4, peaks)["step"]
    assert 2.5 < ratio < 3.5
