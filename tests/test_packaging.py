"""What a user's machine may lack, what an import may cost, and that each kind of install works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import pyllm
from pyllm import _C

ROOT = Path(__file__).parents[1]


def python(code, *, executable=sys.executable, **options):
    """What `code` prints, run by another interpreter; its working directory is on the path."""
    command = [str(executable), "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def with_this_pyllm(**variables):
    """The environment in which a child imports the pyllm that this process imported."""
    return {**os.environ, "PYTHONPATH": str(Path(pyllm.__file__).parents[1]), **variables}


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import pyllm", {"torch", "numpy"}),
        ("import torch; before = set(sys.modules); import pyllm.ops", set()),
    ],
    ids=["pyllm", "pyllm.ops"],
)
def test_importing_is_light(statement, heavy):
    heavy = heavy | {
        "tokenizers",
        "transformers",
        "safetensors",
        "jinja2",
        "typer",
        "rich",
        "triton",
    }
    code = f"import sys; before = set(); {statement}; print(*(set(sys.modules) - before))"
    imported = python(code, env=with_this_pyllm()).split()
    assert "pyllm" in imported
    assert not heavy.intersection(imported)


def test_works_without_compiler_or_gpu(tmp_path):
    code = (
        "import torch; from pyllm.ops import rms_norm; "
        "print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0))"
    )
    env = with_this_pyllm(PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="", CUDA_HOME=str(tmp_path))
    assert python(code, env=env) == str(torch.ones(2, 4))


def test_extension_needs_no_torch():
    binary = Path(_C.__file__).read_bytes()
    # Names of libraries and mangled names are plain text in the dynamic symbol table.
    for name in [b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10", b"_ZN5torch", b"_ZNK3c10"]:
        assert name not in binary, f"the extension refers to {name.decode()}"
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for source in sources:
        for line in source.read_text().splitlines():
            included = line.partition("#include")[2].strip(' <"')
            assert not included.startswith(("torch/", "ATen/", "c10/")), f"{source}: {line}"


def test_kernels_do_not_shadow_hugging_face(tmp_path):
    """Also where the working directory is the repository, whose kernels/ is then on the path."""
    from_root = {"cwd": ROOT, "env": with_this_pyllm()}
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("def get_kernel(): ...")
    env = with_this_pyllm(PYTHONPATH=f"{from_root['env']['PYTHONPATH']}{os.pathsep}{tmp_path}")
    code = (
        "import kernels; print(kernels.__file__); import pyllm.kernels as k; print(k.__path__[0])"
    )
    assert python(code, cwd=ROOT, env=env).split("\n") == [
        str(theirs / "__init__.py"),
        str(ROOT / "kernels"),
    ]
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; import pyllm.kernels; print('imported')"
    assert python(code, **from_root) == "imported"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the files that a source distribution holds, made by making one."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def fresh_python(tmp_path):
    """The interpreter of a new virtual environment that also sees this one's packages."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    executable = tmp_path / "venv/bin/python"
    site = Path(
        python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable)
    )
    (site / "zz_parent.pth").write_text(sysconfig.get_path("purelib"))
    return executable


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "regular-here", "editable-here"])
def test_installs(how, source, fresh_python, tmp_path):
    # Unoptimized: what is tested is where the files end up.
    env = {**os.environ, "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O1"}
    env.pop("PYTHONPATH", None)

    def pip(*arguments):
        command = [str(fresh_python), "-m", "pip", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stdout + result.stderr

    options = ["--no-deps", "--quiet"]
    if how.endswith("-here"):
        pip("install", *options, "setuptools>=77", "pybind11>=2.13")
        options.append("--no-build-isolation")
    if how == "wheel":
        pip("wheel", *options, "-w", tmp_path / "wheels", source)
        pip("install", *options, *(tmp_path / "wheels").glob("*.whl"))
    else:
        pip("install", *options, *(["-e"] if how.startswith("editable") else []), source)

    installed = source / "pyllm" if how.startswith("editable") else fresh_python.parents[1]
    code = (
        "import pyllm.kernels, pyllm._C; from importlib.metadata import version; "
        "from pyllm.bench import perplexity, record; "
        "print(pyllm._C.__file__, pyllm.kernels.__path__[0], version('pyllm'),"
        " perplexity.TEXT, record.RESULTS, sep='\\n')"
    )
    for folder in [tmp_path, source] if how.startswith("editable") else [tmp_path]:
        extension, kernels, version, text, results = python(
            code, executable=fresh_python, cwd=folder, env=env
        ).split("\n")
        assert installed in Path(extension).parents
        assert (Path(kernels) / "README.md").exists()
        assert version == pyllm.__version__
        assert "Alice" in Path(text).read_text()
        in_tree = source / "bench/results" if how.startswith("editable") else Path("bench-results")
        assert Path(results) == in_tree
    command = [fresh_python.parent / "pyllm", "bench", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "end_to_end" in shown.stdout
