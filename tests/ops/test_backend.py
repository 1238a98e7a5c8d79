"""The choice of a backend: by device, or forced; never a silent fallback."""

from __future__ import annotations

import pytest
import torch

import spark_fast as sf
from spark_fast.ops import backend, native


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


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="no backend"), sf.use_backend("cudnn"):
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
