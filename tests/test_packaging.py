"""The package as others get it: its imports, its source archive, its version, and nothing of our machines in it."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

import spark_fast

ROOT = Path(__file__).resolve().parents[1]

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(["triton", "spark_fast._native_cuda"]))  # None: importing it raises ImportError
import torch, spark_fast as sf
patches = sf.ActivePatches(sf.random_patch_mask(2, (2, 2), 0.5))
x = sf.SparseTensor.from_dense(torch.randn(2, 3, 8, 8), patches)
out = torch.nn.functional.conv2d(x, torch.randn(5, 3, 3, 3), padding=1).to_dense()
assert out.shape == (2, 5, 8, 8) and out.isfinite().all()
"""

IMPORTED = """
import sys
import torch, timm
before = set(sys.modules)
import spark_fast
lazy = ("triton", "torchvision", "spark_fast._native", "spark_fast._native_cuda", "spark_fast.train", "tyro")
print(*sorted(name for name in set(sys.modules) - before if name.startswith(lazy)))
"""


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_works_without_triton_and_cuda_module(tmp_path: Path) -> None:
    run_python(BLOCKED, cwd=tmp_path)


def test_import_loads_no_backend_and_no_trainer(tmp_path: Path) -> None:
    """timm itself imports torchvision and, through torch, triton; we add neither."""
    assert run_python(IMPORTED, cwd=tmp_path).split() == []


def test_command_line_is_installed(tmp_path: Path) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="spark-fast")
    assert entry.value == "spark_fast.cli:main"
    done = subprocess.run([sys.executable, "-m", "spark_fast", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_version_is_stated_once() -> None:
    assert importlib.metadata.version("spark-fast") == spark_fast.__version__
    literal = re.escape(spark_fast.__version__)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert not re.search(rf"version\W+{literal}", (ROOT / name).read_text(), re.IGNORECASE), name


def test_source_archive_is_complete(tmp_path: Path) -> None:
    """Everything that a build needs is in the sdist. Built in a copy, since setuptools writes into its tree."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    for folder in ("csrc", "spark_fast"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, tree)
    out.mkdir()
    run_python("import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])", str(out), cwd=tree)
    (archive,) = out.iterdir()
    assert archive.name == f"spark_fast-{spark_fast.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"}
    for folder in ("csrc", "spark_fast"):
        needed |= {str(p.relative_to(tree)) for p in (tree / folder).rglob("*") if p.is_file()}
    assert needed <= names, sorted(needed - names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_no_path_of_one_machine_is_tracked() -> None:
    path = re.compile(r"""(?<![\w.~}-])/(?:home|root|Users|work|workspace|mnt)/[\w.]""")
    found = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image, a checkpoint
        found += [f"{file.relative_to(ROOT)}:{n}" for n, line in enumerate(text.splitlines(), 1) if path.search(line)]
    assert not found


@pytest.fixture
def setup_function(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function of setup.py, on a machine that has nothing: no nvcc, no compiler, no cmake."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("SPARK_FAST_CUDA", "CUDACXX", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    functions = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    return functions.__getitem__


def test_nvcc_is_optional_unless_demanded(setup_function, monkeypatch: pytest.MonkeyPatch) -> None:
    find_nvcc = setup_function("find_nvcc")
    assert find_nvcc()[0] is None
    monkeypatch.setenv("SPARK_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"SPARK_FAST_CUDA=1, but nvcc is neither at CUDACXX nor .*Install the CUDA"):
        find_nvcc()
    monkeypatch.setenv("CUDA_HOME", "home")
    monkeypatch.setattr(shutil, "which", lambda path: path if path.startswith("home") else None)
    assert find_nvcc()[0] == str(Path("home", "bin", "nvcc"))
    monkeypatch.setenv("SPARK_FAST_CUDA", "0")
    assert find_nvcc() == (None, "SPARK_FAST_CUDA=0")
    monkeypatch.setenv("SPARK_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset; got 'yes'"):
        find_nvcc()


def test_a_missing_compiler_is_named(setup_function) -> None:
    with pytest.raises(SystemExit, match=r"C\+\+17 compiler; not found: c\+\+, g\+\+, clang\+\+\. Install one"):
        setup_function("check_tools")()
