"""Which configuration a GPU kernel runs with: forced, measured, cached, shipped, or the rule of thumb."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import spark_fast as sf
from spark_fast.ops import tuning

GPU = torch.device("cuda")
CONFIGS = [{"BLOCK": 32}, {"BLOCK": 64}, {"BLOCK": 128}]
TIMES = {32: 3.0, 64: 1.0, 128: 2.0}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called "Test GPU 1" on which a configuration takes its time of TIMES; lists the measured ones."""
    measured, current = [], [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def switched(device):
        current.append(device)
        yield
        current.pop()

    def milliseconds(function):
        assert current[-1] is GPU, "measured on another GPU's stream"
        block = function()["BLOCK"]
        measured.append(block)
        return TIMES[block]

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU 1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_looked_up", {})
    tuning._gpu.cache_clear()
    monkeypatch.setenv("SPARK_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARK_FAST_AUTOTUNE", raising=False)
    (tmp_path / "tables").mkdir()
    yield measured
    tuning._gpu.cache_clear()


def chosen(rows=1000, case=("bf16", 64), device=GPU):
    return tuning.run("conv.gather", case, rows, CONFIGS, CONFIGS[0], lambda config: config, device)


def cached() -> dict:
    return json.loads(tuning.cache_file("test-gpu-1").read_text())


def forget():
    """As in a new process."""
    tuning._found.clear()
    tuning._looked_up.clear()


def test_without_measurements_the_rule_of_thumb_runs_and_nothing_is_measured(gpu):
    assert chosen() == CONFIGS[0]
    assert gpu == [] and not tuning.cache_file("test-gpu-1").exists()


def test_on_the_cpu_nothing_is_measured(gpu):
    with sf.autotune():
        assert chosen(device=torch.device("cpu")) == CONFIGS[0]
    assert gpu == []


def test_autotune_measures_once_and_another_process_finds_the_result(gpu):
    with sf.autotune():
        assert chosen() == CONFIGS[1]
        assert chosen() == CONFIGS[1]
    assert gpu == [32, 64, 128]
    forget()
    assert chosen() == CONFIGS[1]
    assert gpu == [32, 64, 128]
    assert list(cached()["entries"]) == ["conv.gather|bf16|64|2^10"]


def test_backward_passes_which_have_threads_of_their_own_are_measured_and_forced_too(gpu):
    def in_another_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(chosen).result()

    assert in_another_thread() == CONFIGS[0]
    with tuning.forced({"BLOCK": 5}):
        assert in_another_thread() == {"BLOCK": 5}
    with sf.autotune():
        assert in_another_thread() == CONFIGS[1]


def test_the_environment_can_ask_for_it(gpu, monkeypatch):
    monkeypatch.setenv("SPARK_FAST_AUTOTUNE", "1")
    with sf.autotune(enabled=False):
        assert chosen() == CONFIGS[0]
    assert chosen() == CONFIGS[1]


def test_another_batch_size_is_not_measured_again_another_layer_is(gpu):
    with sf.autotune():
        chosen(rows=1000)
        for rows in (700, 1024, 1025, 1800, 300):
            assert chosen(rows=rows) == CONFIGS[1]
        assert len(gpu) == 3
        chosen(case=("bf16", 128))
        chosen(rows=100_000)
    assert len(gpu) == 9


def test_a_shipped_table_is_used_and_a_measurement_of_this_machine_comes_first(gpu):
    (tuning.TABLES / "test-gpu-1.json").write_text(
        json.dumps({"entries": {"conv.gather|bf16|64|2^10": {"BLOCK": 128}}})
    )
    assert chosen() == CONFIGS[2]
    tuning._remember("test-gpu-1", "conv.gather|bf16|64|2^10", CONFIGS[1])
    forget()
    assert chosen() == CONFIGS[1]


def test_a_configuration_that_no_longer_ships_is_not_used(gpu):
    (tuning.TABLES / "test-gpu-1.json").write_text(json.dumps({"entries": {"conv.gather|bf16|64|2^10": {"BLOCK": 7}}}))
    assert chosen() == CONFIGS[0]


def test_other_versions_void_the_cache(gpu, monkeypatch):
    with sf.autotune():
        chosen()
    forget()
    monkeypatch.setattr(tuning, "versions", lambda: {"kernels": "other"})
    assert chosen() == CONFIGS[0]
    with sf.autotune():
        chosen()
    assert cached()["versions"] == {"kernels": "other"}


def test_versions_change_with_the_kernels_source(monkeypatch, tmp_path):
    tuning.versions.cache_clear()
    try:
        before = tuning.versions()
        assert set(before) == {"kernels", "torch", "triton"}
        folder = tmp_path / "ops"
        folder.mkdir()
        (folder / "triton.py").write_text("other")
        monkeypatch.setattr(tuning, "__file__", str(folder / "tuning.py"))
        tuning.versions.cache_clear()
        other = tuning.versions()
        assert other["kernels"] != before["kernels"]
        (tmp_path / "_native_cuda.so").write_text("CUDA kernels, against which Triton's are measured")
        tuning.versions.cache_clear()
        assert tuning.versions()["kernels"] != other["kernels"]
    finally:
        tuning.versions.cache_clear()


def test_all_that_was_measured_is_told(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "measured", {})
    with sf.autotune():
        chosen()
    assert tuning.measured == {"conv.gather|bf16|64|2^10": [(1.0, CONFIGS[1]), (2.0, CONFIGS[2]), (3.0, CONFIGS[0])]}


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_damaged_cache_is_reported_and_replaced(gpu, content):
    path = tuning.cache_file("test-gpu-1")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="no tuning table"), sf.autotune():
        assert chosen() == CONFIGS[1]
    assert cached()["entries"]


def test_a_user_without_a_home_folder_has_a_cache_too(gpu, monkeypatch, tmp_path):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPARK_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning.Path, "home", nobody)
    monkeypatch.setattr(tuning.tempfile, "gettempdir", lambda: str(tmp_path))
    with sf.autotune():
        assert chosen() == CONFIGS[1]
    assert cached()["entries"] and tuning.cache_file("test-gpu-1").is_relative_to(tmp_path)


def test_a_cache_that_cannot_be_written_is_reported_and_the_result_used(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARK_FAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="SPARK_FAST_CACHE"), sf.autotune():
        assert chosen() == CONFIGS[1]
        assert chosen() == CONFIGS[1]
    assert len(gpu) == 3


def test_never_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with sf.autotune():
        assert chosen() == CONFIGS[0]
    assert gpu == []


def test_in_a_process_group_only_if_allowed(gpu, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with sf.autotune():
        assert chosen() == CONFIGS[0]
    with sf.autotune(in_process_group=True):
        assert chosen() == CONFIGS[1]


def test_a_configuration_too_large_for_the_gpu_is_passed_over(gpu):
    class OutOfResources(Exception):  # noqa: N818  (Triton's name)
        pass

    def run(config):
        if config["BLOCK"] == 64:
            raise OutOfResources
        return config

    with sf.autotune():
        assert tuning.run("conv.gather", (), 10, CONFIGS, CONFIGS[0], run, GPU) == CONFIGS[2]

    def broken(config):
        raise ZeroDivisionError

    with sf.autotune(), pytest.raises(ZeroDivisionError):
        tuning.run("conv.gather", ("x",), 10, CONFIGS, CONFIGS[0], broken, GPU)


def test_forced(gpu):
    with tuning.forced({"BLOCK": 5}):
        assert chosen() == {"BLOCK": 5}
    assert chosen() == CONFIGS[0]
