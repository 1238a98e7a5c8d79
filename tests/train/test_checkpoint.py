"""Files are whole or absent, and what does not fit is said in one line."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from spark_fast.files import write_atomically, write_text
from spark_fast.train.checkpoint import (
    build_model,
    export_backbone,
    load_backbone,
    load_checkpoint,
    load_weights,
    model_from_checkpoint,
    save_checkpoint,
)
from spark_fast.train.config import PretrainConfig


@pytest.fixture
def config(settings: dict) -> PretrainConfig:
    return PretrainConfig(**settings)


def state(config: PretrainConfig, step: int = 1) -> dict:
    return {"step": step, "model": build_model(config).state_dict()}


def fill_disk(path: Path) -> None:
    """Send the next write of `path` to a device that is always full."""
    path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(file: object) -> None:
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_data_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *arguments: (calls.append("fsync"), fsync(*arguments)))
    monkeypatch.setattr(os, "replace", lambda *arguments: (calls.append("replace"), replace(*arguments)))
    write_text(tmp_path / "a.txt", "new")
    assert calls == ["fsync", "replace", "fsync"]


def test_full_disk_keeps_the_last_checkpoint(config: PretrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, config, state(config))
    fill_disk(path)
    message = r"step 2 could not be written.*No space left.*last\.pt, is intact.*pretrain --out .* --resume"
    with pytest.raises(OSError, match=message) as caught:
        save_checkpoint(path, config, state(config, step=2))
    assert caught.value.errno == errno.ENOSPC
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_disk_that_fills_up_half_way(config: PretrainConfig, tmp_path: Path) -> None:
    path, content = tmp_path / "last.pt", state(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="there is none before it"):
            save_checkpoint(path, config, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_damaged_and_foreign_files(config: PretrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, config, state(config))
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load_checkpoint(path)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of spark_fast"):
        load_checkpoint(path)
    torch.save({"format": 99, "config": {}, "step": 1, "model": {}}, path)
    with pytest.raises(ValueError, match=r"format 99.*reads format 1"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(Evil(), tmp_path / "last.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "pwned").exists()


def test_model_from_checkpoint(config: PretrainConfig, tmp_path: Path) -> None:
    saved = state(config)
    save_checkpoint(tmp_path / "last.pt", config, saved)
    model, stored = model_from_checkpoint(tmp_path / "last.pt")
    assert stored == config
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_counted_and_named(config: PretrainConfig) -> None:
    net = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError) as caught:
        load_weights(net, {"weight": torch.ones(2, 4), "scale": torch.ones(1)}, Path("x.pt"))
    expected = "x.pt do not fit the network: 1 missing (first: bias), 1 unknown (first: scale), "
    assert expected + "1 of another shape (first: weight (2, 4) instead of (2, 3))" in str(caught.value)


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_timm_loads_the_backbone(config: PretrainConfig, tmp_path: Path, model: str, kind: str) -> None:
    spark = build_model(PretrainConfig(**{**vars(config), "model": model}))
    path = export_backbone(spark, tmp_path / f"backbone.{kind}", kind)
    net = timm.create_model(model, num_classes=0, checkpoint_path=str(path))
    weights = spark.encoder.model.state_dict()
    assert set(weights) == set(net.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_unknown_export_format(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format is 'onnx', need safetensors or pth"):
        export_backbone(build_model(config), tmp_path / "a", "onnx")


def test_start_from_a_backbone(config: PretrainConfig, tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=10)  # its classifier is left out
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    spark = build_model(config)
    load_backbone(spark, tmp_path / "net.safetensors")
    assert torch.equal(spark.encoder.model.conv1[0].weight, net.conv1[0].weight)
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(spark, tmp_path / "missing.pth")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone(spark, tmp_path / "bad.pth")


def test_start_from_another_backbone(config: PretrainConfig, tmp_path: Path, settings: dict) -> None:
    other: Callable = timm.create_model
    torch.save(other("test_convnext", num_classes=0).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth do not fit the network: \d+ missing"):
        load_backbone(build_model(config), tmp_path / "net.pth")
