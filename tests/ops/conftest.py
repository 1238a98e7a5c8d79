"""Sparse batches of odd shapes, and every CPU instruction set."""

from __future__ import annotations

import numpy
import pytest
import torch

import spark_fast as sf
from spark_fast.ops import native, triton_launch


def _mask(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "equal":
        return sf.random_patch_mask(2, (3, 4), 0.6, generator)
    if kind == "unequal":  # one image with no active patch, one with a few
        return torch.stack((torch.zeros(2, 3, dtype=torch.bool), torch.rand(2, 3, generator=generator) < 0.7))
    if kind == "all":
        return torch.ones(1, 2, 2, dtype=torch.bool)
    if kind == "one":
        return (torch.arange(9) == 4).view(1, 3, 3)
    assert kind == "none"
    return torch.zeros(2, 2, 3, dtype=torch.bool)


@pytest.fixture(params=["equal", "unequal", "all", "one", "none"])
def patches(request) -> sf.ActivePatches:
    return sf.ActivePatches(_mask(request.param))


@pytest.fixture
def some_patches() -> sf.ActivePatches:
    return sf.ActivePatches(_mask("equal"))


def _instruction_sets() -> list[str]:
    run = native.module()
    best = run.isa()
    found = []
    for name in ("portable", "avx2", "avx512"):
        try:
            run.set_isa(name)
            found.append(name)
        except ValueError:
            pass
    run.set_isa(best)
    return found


@pytest.fixture(params=_instruction_sets())
def instruction_set(request):
    """Each instruction set that this build and machine have."""
    best = native.module().isa()
    native.module().set_isa(request.param)
    yield request.param
    native.module().set_isa(best)


@pytest.fixture(scope="session")
def triton_problem() -> str | None:
    """Why Triton's kernels cannot be tested here, or None."""
    if triton_launch.unavailable() or not triton_launch.interpreted():
        return triton_launch.unavailable()
    import triton
    import triton.language as tl

    @triton.jit
    def sum_of(out, count):
        total = 0
        for i in range(count):
            total += i
        tl.store(out, total)

    try:
        sum_of[(1,)](torch.zeros(1, dtype=torch.int32), 3)
    except Exception as error:
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__} ({error}): "
            "a newer Triton or pip install 'numpy<2.4' will do"
        )
    return None


@pytest.fixture
def on_triton(triton_problem):
    """The device on which Triton's kernels run, and they are forced meanwhile: a GPU, or the CPU in the interpreter."""
    if triton_problem:
        pytest.skip(triton_problem)
    with sf.use_backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
