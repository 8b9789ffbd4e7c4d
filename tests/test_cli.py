"""The command line, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PYLLM = [sys.executable, "-m", "pyllm"]
QUESTION = "Why is the sky blue?"


def run(*arguments, stdin=None, timeout=120):
    return subprocess.run(
        [*PYLLM, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=timeout
    )


def test_generate_writes_text(smollm2):
    result = run("generate", QUESTION, "-m", smollm2)
    assert result.returncode == 0, result.stderr
    assert "light" in result.stdout
    assert "tokens/s" in result.stderr


def test_generate_without_a_model_name_uses_the_default(smollm2):
    assert "light" in run("generate", QUESTION).stdout


def test_generate_json_and_stdin(smollm2):
    result = run("generate", "-", "-m", smollm2, "--json", "-n", 8, "--raw", stdin="The sky is")
    data = json.loads(result.stdout)
    assert len(data["token_ids"]) == 8
    assert data["finish_reason"] == "length"
    assert data["usage"]["prompt_tokens"] == 3


def test_a_device_that_is_not_there(smollm2):
    result = run("generate", QUESTION, "-m", smollm2, "--device", "tpu")
    assert result.returncode == 2
    assert "device: expected 'cpu', 'cuda' or 'cuda:1', got 'tpu'" in result.stderr


def test_chat_keeps_the_conversation(smollm2):
    result = run("chat", "-m", smollm2, stdin=f"{QUESTION}\nWhat did I ask?\n/exit\n")
    assert result.returncode == 0, result.stderr
    assert "light" in result.stdout
    assert len(result.stdout.strip().splitlines()) >= 2


def test_info_of_the_machine_and_of_a_model(smollm2):
    machine = json.loads(run("info", "--json").stdout)
    assert machine["backends"]["cpu"]
    assert "in use" in machine["instruction sets"].values()
    result = run("info", smollm2, "--json", "--context", 1000, "--batch", 2)
    model = json.loads(result.stdout)
    assert model["tensors by type"]["Q4_1"]["tensors"] == 210
    # keys and values x sequences x layers x whole pages of 32 tokens x heads x dimensions x float16
    assert model["cache"]["bytes"] == 2 * 2 * 30 * 1024 * 3 * 64 * 2
    assert model["kernels"]["quant_matmul"]["backend"] == "cpu"
    assert "Q4_1" in run("info", smollm2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "prompt: expected some text"),
        (["generate", "hi", "--temperature", "nan"], "temperature: expected a finite number"),
        (["generate", "hi", "-m", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["generate", "hi", "-m", "no-such-model"], "no-such-model"),
        (["generate", "hi", "--max-context", "0"], "max_context"),
        (["generate"], "error: the following arguments are required: prompt"),
        (["generate", "hi", "-n", "x"], "error: argument --max-new-tokens/-n: invalid int value"),
        (["generate", "hi", "--temp", "1"], "error: unrecognized arguments: --temp"),
        (["sing"], "error: argument COMMAND: invalid choice: 'sing'"),
        (["info", __file__], "error: "),
        (["pull", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_clear_error(smollm2, arguments, message):
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(smollm2):
    assert "Traceback" in run("generate", "hi", "--temperature", "nan", "--debug").stderr


def test_ctrl_c_stops_cleanly(smollm2):
    process = subprocess.Popen(
        [*PYLLM, "generate", "Count!", "-m", str(smollm2), "-n", "4000", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Shells start background jobs with SIGINT ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.read(1)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_the_command_of_the_readme(smollm2):
    """The last part of the README's first command, as a newcomer types it, in a shell."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    command = readme.split("<!-- generate command -->\n```sh\n")[1].split("\n```")[0]
    assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install")
    generate = command.rsplit("&& pyllm ", 1)[1]
    result = subprocess.run(
        f"{sys.executable} -m pyllm {generate}", shell=True, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 20
