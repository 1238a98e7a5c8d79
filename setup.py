"""Builds the native modules with CMake; everything else stands in pyproject.toml.

SPARK_FAST_CUDA=0 leaves the CUDA module out, =1 makes a missing nvcc an error; unset: built when nvcc is found.
SPARK_FAST_CUDA_ARCHS: compute capabilities, "80;90" if unset. CXX, CUDACXX, CUDA_HOME, CMAKE_ARGS: as usual.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# pip without an activated environment does not have the environment's cmake and ninja on PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc, or None and why the build goes without it; SystemExit where it is demanded and absent."""
    wish = os.environ.get("SPARK_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SPARK_FAST_CUDA must be 0, 1 or unset; got {wish!r}")
    if wish == "0":
        return None, "SPARK_FAST_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, filter(None, places))), None)
    absent = "nvcc is neither at CUDACXX nor in CUDA_HOME/bin, PATH or /usr/local/cuda/bin"
    if nvcc is None and wish == "1":
        raise SystemExit(
            f"SPARK_FAST_CUDA=1, but {absent}. "
            "Install the CUDA toolkit, or set CUDACXX to its nvcc, or unset SPARK_FAST_CUDA"
        )
    return nvcc, absent


def check_tools() -> None:
    """SystemExit, naming the way out, where a compiler, Python's headers or cmake are missing."""
    compiler = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(map(shutil.which, compiler or ("c++", "g++", "clang++"))):
        raise SystemExit(
            f"spark_fast needs a C++17 compiler; not found: {' '.join(compiler) or 'c++, g++, clang++'}. "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
            "macOS: xcode-select --install), or set CXX"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise SystemExit(
            f"spark_fast needs Python's headers; {header} is missing. "
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    if not shutil.which("cmake", path=PATH):
        raise SystemExit("spark_fast needs cmake: pip install cmake ninja, or leave out --no-build-isolation")


class CMakeBuild(build_ext):
    """One CMake build for both modules, in build/cmake-<python>, which a rebuild finds again."""

    def build_extensions(self) -> None:
        check_tools()
        import pybind11

        nvcc, why = find_nvcc()
        print(f"spark_fast: CUDA module with {nvcc}" if nvcc else f"spark_fast: no CUDA module, {why}", flush=True)

        if self.editable_mode and not nvcc:
            for stale in (ROOT / "spark_fast").glob("_native_cuda.*"):  # of an earlier build with CUDA
                stale.unlink()
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DSPARK_FAST_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            archs = os.environ.get("SPARK_FAST_CUDA_ARCHS", "80;90").replace(",", ";")
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DSPARK_FAST_CUDA_ARCHS={archs}"]
        ninja = shutil.which("ninja", path=PATH)
        if ninja:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            self.configure(build, configure)
            self.cmake("--build", str(build), "--parallel", str(self.parallel or os.cpu_count() or 1))
        except subprocess.CalledProcessError as error:
            hint = "; SPARK_FAST_CUDA=0 builds without CUDA, SPARK_FAST_CUDA_ARCHS chooses the GPUs" if nvcc else ""
            raise SystemExit(f"spark_fast: cmake failed, see its messages above{hint}") from error

    def configure(self, build: Path, arguments: list[str]) -> None:
        known = (build / "CMakeCache.txt").exists()
        try:
            self.cmake("-S", str(ROOT), "-B", str(build), *arguments)
        except subprocess.CalledProcessError:
            if not known:
                raise
            shutil.rmtree(build)  # made by other tools than today's, perhaps
            self.cmake("-S", str(ROOT), "-B", str(build), *arguments)

    def cmake(self, *arguments: str) -> None:
        command = [shutil.which("cmake", path=PATH), *arguments]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"spark_fast needs setuptools >= 77; found {setuptools.__version__}. "
        "Upgrade it (pip install --upgrade setuptools), or leave out --no-build-isolation"
    )
modules = ["spark_fast._native"] + ["spark_fast._native_cuda"] * bool(find_nvcc()[0])
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": CMakeBuild})
