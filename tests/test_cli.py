"""The command line: each command once, and errors of one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from spark_fast import cli
from spark_fast.train import RunInterrupted

TINY = "--model test_resnet --img-size 64 --decoder-width 32 --batch-size 4 --epochs 2 --workers 0 --threads 1"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "photos"
    folder.mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 255, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((96, 72)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, threads = tmp_path_factory.mktemp("cli") / "run", torch.get_num_threads()
    assert cli.main(["pretrain", "--data", str(photos), "--out", str(out), *TINY.split()]) == 0
    torch.set_num_threads(threads)
    return out


def fail(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spark-fast: error: ")
    assert error.count("\n") == 1
    return error


def test_pretrain_writes_a_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert (config["model"], config["img_size"], config["epochs"]) == ("test_resnet", 64, 2)
    assert (run / "backbone.safetensors").exists()


def test_resume_takes_the_stored_settings(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    assert "epochs: 2 -> 3" in fail(capsys, "pretrain", "--out", run, "--resume", "--epochs", 3)
    # The default, said aloud, is another setting too.
    assert "epochs: 2 -> 1600" in fail(capsys, "pretrain", "--out", run, "--resume", "--epochs", 1600)


def test_errors_are_one_line(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    new = tmp_path / "new"
    assert "does not exist" in fail(capsys, "pretrain", "--data", tmp_path / "none", "--out", new)
    assert "not empty" in fail(capsys, "pretrain", "--data", photos, "--out", run)
    assert "epochs is 0" in fail(capsys, "pretrain", "--data", photos, "--out", new, "--epochs", 0)
    assert "holds no run to resume" in fail(capsys, "pretrain", "--out", new, "--resume")
    assert not new.exists()


def test_errors_of_the_operating_system(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    line = fail(capsys, "pretrain", "--data", photos, "--out", tmp_path / "file" / "run", *TINY.split())
    assert "Not a directory" in line


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    arguments = ["export", "--run", str(tmp_path / "none"), "--out", "a.pth"]
    if how == "flag":
        arguments.append("--debug")
    else:
        monkeypatch.setenv("SPARK_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="not a folder"):
        cli.main(arguments)


def test_bugs_are_not_dressed_up_as_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise KeyError("bug")

    monkeypatch.setattr(cli, "_info", bug)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt() -> None:
        raise RunInterrupted("stopped after step 3; go on with: spark-fast pretrain --out x --resume")

    monkeypatch.setattr(cli, "_info", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err.startswith("spark-fast: stopped after step 3")


@pytest.mark.parametrize("arguments", [[], ["train"], ["pretrain", "--epoch", "3"], ["export"], ["pretrain"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["", "pretrain", "reconstruct", "export", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if command == "pretrain":
        assert set(re.findall(r"--[a-z-]+", text)) >= {"--amp-dtype", "--grad-accum-steps", "--in-chans", "--resume"}
        assert "Folder of images" in text


def test_reconstruct(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["reconstruct", "--run", str(run), "--count", "3"]) == 0
    with Image.open(run / "reconstruction.png") as picture:
        three = picture.height
    one = tmp_path / "one.png"
    arguments = ["reconstruct", "--checkpoint", str(run / "last.pt"), "--out", str(one)]
    assert cli.main([*arguments, "--data", str(photos / "0.png")]) == 0
    with Image.open(one) as picture:
        assert picture.height < three
    first = one.read_bytes()
    assert cli.main([*arguments, "--data", str(photos / "0.png"), "--seed", "5"]) == 0
    assert one.read_bytes() != first
    assert "give --data" in fail(capsys, "reconstruct", "--checkpoint", run / "last.pt")
    assert "either --run" in fail(capsys, "reconstruct", "--run", run, "--checkpoint", run / "last.pt")
    assert "does not exist" in fail(capsys, "reconstruct", "--run", run, "--data", tmp_path / "none")
    assert "count is 0" in fail(capsys, "reconstruct", "--run", run, "--count", 0)


@pytest.mark.parametrize("name", ["net.safetensors", "deep/net.pth"])
def test_export(run: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert cli.main(["export", "--run", str(run), "--out", str(path)]) == 0
    net = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(path))
    expected = load_file(run / "backbone.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


def test_export_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "ends in none of" in fail(capsys, "export", "--run", run, "--out", tmp_path / "net.onnx")
    assert "either --run" in fail(capsys, "export", "--out", tmp_path / "net.pth")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert "not a whole checkpoint" in fail(
        capsys, "export", "--checkpoint", tmp_path / "bad.pt", "--out", tmp_path / "a.pth"
    )
    assert not (tmp_path / "a.pth").exists()


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert re.search(r"^\* conv +cpu", text, re.MULTILINE)
    assert "not available: torch sees no CUDA device" in text or torch.cuda.is_available()
