"""The choice of a backend: by device and case, measured, or forced; never a silent fallback."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import spark_fast as sf
from spark_fast.ops import backend, native, tuning
from spark_fast.ops.conv import cuda
from spark_fast.ops.window import Geometry, Window


def test_the_first_of_the_order_runs():
    for op in backend.ORDER:
        assert backend.select(op, torch.device("cpu")).__name__ == f"spark_fast.ops.{op}.{backend.ORDER[op]['cpu'][0]}"


def test_forcing_is_scoped_and_nests():
    cpu = torch.device("cpu")
    with sf.use_backend("reference"):
        with sf.use_backend("cpu", "conv"):
            assert backend.select("conv", cpu).__name__.endswith(".cpu")
            assert backend.select("pool", cpu).__name__.endswith(".reference")
        assert backend.select("conv", cpu).__name__.endswith(".reference")
    assert backend.select("conv", cpu).__name__.endswith(".cpu")


def test_a_checkpointed_forward_is_computed_again_by_the_backend_that_is_forced():
    """By the backward pass, in a thread of its own on a GPU."""

    def in_another_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(backend.select, "conv", torch.device("cpu")).result().__name__

    with sf.use_backend("reference"):
        with sf.use_backend("library", "conv"):
            assert in_another_thread().endswith(".library")
        assert in_another_thread().endswith(".reference")
    assert in_another_thread().endswith(".cpu")


def test_wrong_names_are_refused():
    with (
        pytest.raises(ValueError, match="no backend 'cudnn'; it must be one of cpu, cuda, library"),
        sf.use_backend("cudnn"),
    ):
        pass
    with pytest.raises(ValueError, match="op must be one of"), sf.use_backend("reference", "attention"):
        pass
    with sf.use_backend("cuda", "densify"), pytest.raises(sf.BackendError, match="does not run on cpu"):
        backend.select("densify", torch.device("cpu"))


def test_a_missing_native_module_raises_instead_of_falling_back(monkeypatch):
    def missing():
        raise ImportError("no such file")

    native.unavailable.cache_clear()
    monkeypatch.setattr(native, "module", missing)
    try:
        with pytest.raises(sf.BackendError, match="pip install"):
            backend.select("conv", torch.device("cpu"))
        rows = [r for r in backend.report() if (r["op"], r["device"], r["backend"]) == ("conv", "cpu", "cpu")]
        assert not rows[0]["available"] and "pip install" in rows[0]["reason"]
    finally:
        native.unavailable.cache_clear()


def test_the_report_covers_every_op_and_chooses_one_backend_on_the_cpu():
    rows = backend.report()
    for op in backend.ORDER:
        mine = [r for r in rows if r["op"] == op and r["device"] == "cpu"]
        assert [r["backend"] for r in mine] == list(backend.ORDER[op]["cpu"])
        assert sum(bool(r["chosen"]) for r in mine) == 1
        assert all(r["reason"] for r in mine if not r["chosen"])


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set"):
        native.module().set_isa("mmx")


def conv_case(side, dtype=torch.bfloat16, channels=16, active=None):
    patches = sf.ActivePatches(torch.ones(2, 2, 2, dtype=torch.bool) if active is None else active)
    geometry = Geometry.of(patches, side, Window((3, 3), (1, 1), (1, 1)))
    return (
        torch.ones(patches.rows(side), channels, dtype=dtype),
        torch.ones(8, channels, 3, 3, dtype=dtype),
        geometry,
        1,
    )


def chosen_on_a_gpu(op, *case):
    return backend.select(op, torch.device("cuda", 0), case[0].dtype, *case).__name__.split(".")[-1]


@pytest.fixture
def with_cuda(monkeypatch):
    """As on a machine whose build has the CUDA module, without measurements."""
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(tuning, "best", lambda *args: None)


def test_a_gpu_without_the_cuda_module_runs_triton(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: "no nvcc")
    monkeypatch.setattr(tuning, "best", lambda *args: None)
    assert chosen_on_a_gpu("conv", *conv_case(8)) == "triton"
    with sf.use_backend("cuda", "conv"), pytest.raises(sf.BackendError, match="no nvcc"):
        chosen_on_a_gpu("conv", *conv_case(8))


def test_a_gpu_runs_the_first_that_takes_the_case(with_cuda):
    assert chosen_on_a_gpu("conv", *conv_case(8)) == "cuda"
    assert chosen_on_a_gpu("conv", *conv_case(8, torch.float32)) == "triton"
    assert chosen_on_a_gpu("conv", *conv_case(8, channels=15)) == "triton"
    assert chosen_on_a_gpu("conv", *conv_case(1)) == "triton"
    assert chosen_on_a_gpu("conv", *conv_case(8, torch.float64)) == "library"
    x, w, _, _ = conv_case(8)
    assert chosen_on_a_gpu("conv", x, w, Geometry.dense(2, (16, 16), Window((3, 3)), x.device), 1) == "library"


def test_a_backend_yields_where_another_is_expected_to_be_faster(with_cuda):
    assert chosen_on_a_gpu("conv", *conv_case(2)) == "triton"
    with sf.use_backend("cuda", "conv"):
        assert chosen_on_a_gpu("conv", *conv_case(2)) == "cuda"


def test_measurements_choose_where_two_take_the_case(with_cuda, monkeypatch):
    asked = []

    def best(kernel, key, rows, configs, trial, device):
        asked.append((kernel, key, rows))
        return next(config for config in configs if config["backend"] == "triton")

    monkeypatch.setattr(tuning, "best", best)
    assert chosen_on_a_gpu("conv", *conv_case(8)) == "triton"
    assert chosen_on_a_gpu("conv", *conv_case(8, torch.float32)) == "triton"  # the only one of ours
    two = torch.ones(3, 2, 2, dtype=torch.bool)
    chosen_on_a_gpu("conv", *conv_case(8, active=two))
    assert [kernel for kernel, _, _ in asked] == ["conv.backend"] * 2
    assert asked[0][1] == asked[1][1] and (asked[0][2], asked[1][2]) == (512, 768)  # rows are not in the key


@pytest.mark.parametrize("op", ["conv", "depthwise", "pool", "densify", "patch_loss"])
def test_every_op_with_two_gpu_backends_can_be_measured(op, some_patches):
    """`trial` runs, here with the reference, what the tables are measured with."""
    x, window = torch.randn(some_patches.rows(2), 4), Window((3, 3), (1, 1), (1, 1))
    geometry = Geometry.of(some_patches, 2, window)
    images = torch.randn(some_patches.batch, 3, some_patches.grid[0] * 2, some_patches.grid[1] * 2)
    cases = {
        "conv": (x, torch.randn(5, 4, 3, 3), geometry, 1),
        "depthwise": (x, torch.randn(4, 1, 3, 3), geometry),
        "pool": (x, geometry),
        "densify": (images, some_patches),
        "patch_loss": (images, images, some_patches),
    }
    assert {o for o, devices in backend.ORDER.items() if set(backend.MEASURED) <= set(devices.get("cuda", ()))} == set(
        cases
    )
    api = importlib.import_module(f"spark_fast.ops.{op}.api")
    api.trial(importlib.import_module(f"spark_fast.ops.{op}.reference"), *cases[op])
