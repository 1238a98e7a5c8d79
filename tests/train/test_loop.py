"""The training loop: what it writes, how it stops and goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import spark_fast
from spark_fast.train import PretrainConfig, RunInterrupted, loop, pretrain
from spark_fast.train.checkpoint import load_checkpoint, model_from_checkpoint
from spark_fast.train.run_folder import RunFolder

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(spark_fast.__file__).parents[1])}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_speed(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in metrics(out)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimiser and metrics are equal bit for bit."""
    a, b = load_checkpoint(first / "last.pt"), load_checkpoint(second / "last.pt")
    assert a["step"] == b["step"]
    assert set(a["model"]) == set(b["model"])
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    for key, values in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in values.items())
    assert without_speed(first) == without_speed(second)


def call_at_step(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Do something in the middle of step `at` (counted from 0)."""
    real = loop._step

    def step(config, state, images, number):
        if number == at:
            action()
        return real(config, state, images, number)

    monkeypatch.setattr(loop, "_step", step)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def reference_run(tiny_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 epochs of 3 steps that nothing disturbed."""
    return pretrain(**tiny_settings, out=tmp_path_factory.mktemp("reference") / "run").out


def test_a_run_leaves_all_its_results(settings: dict) -> None:
    result = pretrain(**{**settings, "reconstruct_every": 2, "checkpoint_every": 2})
    out = settings["out"]
    assert result.steps == 12
    assert sorted(path.name for path in out.iterdir()) == [
        *("backbone.safetensors", "config.json", "files.json", "last.pt", "loss.png"),
        *("metrics.jsonl", "reconstructions", "train.log"),
    ]
    rows = metrics(out)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "weight_decay", "mask_ratio", "grad_norm", "images_per_s"}
    assert {row["mask_ratio"] for row in rows} == {0.6}
    assert rows[-1]["epoch"] == 4.0
    assert rows[-1]["loss"] == result.final_loss
    assert 0.5 < result.final_loss < 1.5
    assert rows[-1]["lr"] == pytest.approx(1e-6)
    assert sorted(path.name for path in result.reconstructions.parent.iterdir()) == ["epoch_0002.png", "epoch_0004.png"]
    assert Image.open(result.loss_curve).size == (800, 500)
    assert "12 images, 4 epochs of 3 steps" in (out / "train.log").read_text()
    timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(result.backbone))


@pytest.mark.parametrize("stop_at", [4, 6])  # in the middle of an epoch and of a log window; between two of them
def test_ctrl_c_saves_and_the_resumed_run_is_the_same(
    settings: dict, reference_run: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    out, before = settings["out"], signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        call_at_step(patch, stop_at - 1, interrupt)
        with pytest.raises(RunInterrupted, match=rf"stopped after step {stop_at} of 12.*pretrain --out .* --resume"):
            pretrain(**settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(out / "last.pt")["step"] == stop_at
    assert pretrain(out=out, resume=True, workers=1).steps == 12
    assert_same_run(reference_run, out)
    assert f"resumed at step {stop_at}" in (out / "train.log").read_text()


def test_drop_path_and_accumulation_resume_exactly(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**settings, "drop_path": 0.3, "grad_accum_steps": 2, "opt": "adamw", "model": "test_convnext"}
    whole = pretrain(**{**settings, "out": settings["out"].with_name("whole")}).out
    with monkeypatch.context() as patch:
        call_at_step(patch, 6, interrupt)
        with pytest.raises(RunInterrupted):
            pretrain(**settings)
    pretrain(out=settings["out"], resume=True)
    assert_same_run(whole, settings["out"])


def test_the_mask_ratio_of_each_epoch_and_exact_resumption(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"mask_kind": "block", "mask_ratio": 0.3, "mask_ratio_end": 0.6, "log_every": 1, "img_size": (96, 128)}
    settings, shown, real = {**settings, **changes}, [], loop._step

    def step(config, state, images, number):
        shown.append(state.model.len_keep)
        return real(config, state, images, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", step)
        whole = pretrain(**{**settings, "out": settings["out"].with_name("whole"), "reconstruct_every": 2})
    assert shown == [8] * 3 + [7] * 3 + [6] * 3 + [5] * 3  # of 12 patches
    assert [row["mask_ratio"] for row in metrics(whole.out)][::3] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    with monkeypatch.context() as patch:
        call_at_step(patch, 4, interrupt)
        with pytest.raises(RunInterrupted):
            pretrain(**settings)
    pretrain(out=settings["out"], resume=True)
    assert without_speed(whole.out) == without_speed(settings["out"])
    first, second = (load_checkpoint(out / "last.pt")["model"] for out in (whole.out, settings["out"]))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_ratio_per_image_resumes_exactly(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**settings, "mask_ratio": (0.2, 0.6), "mask_kind": "mesh", "reconstruct_every": 4}
    whole = pretrain(**{**settings, "out": settings["out"].with_name("whole")})
    assert metrics(whole.out)[0]["mask_ratio"] == [0.2, 0.6] and whole.reconstructions.exists()
    with monkeypatch.context() as patch:
        call_at_step(patch, 6, interrupt)
        with pytest.raises(RunInterrupted):
            pretrain(**settings)
    pretrain(out=settings["out"], resume=True)
    assert_same_run(whole.out, settings["out"])


def test_pictures_have_the_last_ratio_in_every_epoch(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    monkeypatch.setattr(loop, "save_grid", lambda path, model, images, active, mean, std: masks.append(active))
    pretrain(**{**settings, "mask_ratio": 0.25, "mask_ratio_end": 0.5, "reconstruct_every": 1})
    assert len(masks) == 4 and all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0].sum((1, 2)).tolist() == [2] * len(masks[0])


def test_kinds_of_ones_own(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spark_fast.mask._KINDS, "mine", spark_fast.mask.FixedMask(torch.eye(2) > 0))
    result = pretrain(**{**settings, "mask_kind": "mine", "mask_ratio": 0.5, "epochs": 1})
    model, config = model_from_checkpoint(result.checkpoint)
    assert config.mask_kind == "mine"
    assert torch.equal(model.random_mask(1)[0], torch.eye(2) > 0)
    monkeypatch.delitem(spark_fast.mask._KINDS, "mine")
    with pytest.raises(ValueError, match=r"mask='mine' is no kind of mask.*register_mask"):
        model_from_checkpoint(result.checkpoint)


def test_seed_changes_the_run_and_nothing_else_does(settings: dict, reference_run: Path) -> None:
    torch.manual_seed(123)
    same = pretrain(**{**settings, "workers": 2}).out
    assert_same_run(reference_run, same)
    other = pretrain(**{**settings, "seed": 1, "out": settings["out"].with_name("other")})
    assert other.final_loss != metrics(same)[-1]["loss"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_and_resume(settings: dict, command_line: Callable) -> None:
    """Killed without warning after its first checkpoint: the rest is done again, nothing is doubled."""
    settings = {**settings, "epochs": 40, "checkpoint_every": 2, "log_every": 1, "workers": 1}
    out = settings["out"]
    with subprocess.Popen(command_line(settings), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (out / "last.pt").exists() and len(metrics(out)) > 10, process)
        process.kill()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 999, "loss"')  # a half line
    assert load_checkpoint(out / "last.pt")["step"] < 120
    pretrain(out=out, resume=True, workers=0)
    whole = pretrain(**{**settings, "out": out.with_name("whole"), "workers": 0}).out
    assert [row["step"] for row in metrics(out)] == list(range(1, 121))
    assert_same_run(whole, out)


@pytest.mark.slow
def test_sigterm_to_the_group_saves_and_exits_with_130(settings: dict, command_line: Callable) -> None:
    """As a batch system does it: reader processes get the signal too."""
    settings = {**settings, "epochs": 1000, "log_every": 1, "workers": 2}
    out = settings["out"]
    process = subprocess.Popen(
        command_line(settings), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, process)
        os.killpg(process.pid, signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert f"pretrain --out {out} --resume" in error
    assert load_checkpoint(out / "last.pt")["step"] == metrics(out)[-1]["step"]


def test_killed_before_the_first_checkpoint(settings: dict, reference_run: Path) -> None:
    config = PretrainConfig(**settings)
    RunFolder(config.out).begin(config, loop.list_images(config.data))
    pretrain(out=config.out, resume=True)
    assert "the run was stopped before its first checkpoint" in (config.out / "train.log").read_text()
    assert_same_run(reference_run, config.out)


def test_resuming_a_finished_run_changes_nothing(reference_run: Path) -> None:
    before = (reference_run / "last.pt").read_bytes(), metrics(reference_run)
    (reference_run / "backbone.safetensors").unlink()
    assert pretrain(out=reference_run, resume=True).final_loss == before[1][-1]["loss"]
    assert ((reference_run / "last.pt").read_bytes(), metrics(reference_run)) == before
    assert (reference_run / "backbone.safetensors").exists()


def test_resume_keeps_to_the_images_it_began_with(settings: dict, own_photos: Path, monkeypatch) -> None:
    """Files that came or went meanwhile do not change the length of an epoch."""
    settings["data"] = own_photos
    with monkeypatch.context() as patch:
        call_at_step(patch, 2, interrupt)
        with pytest.raises(RunInterrupted):
            pretrain(**settings)
    (own_photos / "02.jpg").unlink()
    (own_photos / "new.png").write_bytes((own_photos / "00.png").read_bytes())
    assert pretrain(out=settings["out"], resume=True).steps == 12
    log = (settings["out"] / "train.log").read_text()
    assert log.count("02.jpg cannot be read") == 1


def test_resume_errors(settings: dict, reference_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        pretrain(**settings, resume=True)
    with pytest.raises(ValueError, match=r"other settings .*model: test_resnet -> resnet18; epochs: 4 -> 9"):
        pretrain(out=reference_run, resume=True, model="resnet18", epochs=9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((reference_run / "last.pt").read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        pretrain(out=tmp_path / "run", resume=True)


def test_checkpoint_of_another_run_in_the_folder(settings: dict, reference_run: Path) -> None:
    config = PretrainConfig(**{**settings, "img_size": 96, "mask_ratio": 0.5})
    RunFolder(config.out).begin(config, loop.list_images(config.data))
    (config.out / "last.pt").write_bytes((reference_run / "last.pt").read_bytes())
    with pytest.raises(ValueError, match=r"img_size: 64 -> 96; mask_ratio: 0.6 -> 0.5"):
        pretrain(out=config.out, resume=True)


def test_folders_that_cannot_be_used(settings: dict, tmp_path: Path) -> None:
    out = settings["out"]
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not empty.*resume.*another folder"):
        pretrain(**settings)
    with pytest.raises(ValueError, match="is a file"):
        pretrain(**{**settings, "out": out / "thesis.txt"})
    with pytest.raises(ValueError, match="lies inside data"):
        pretrain(**{**settings, "out": settings["data"] / "run"})
    assert os.listdir(out) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"mask_ratio": 0.1, "mask_ratio_end": 0.5}, ValueError, "mask_ratio=0.1 hides no patch of a grid of 2x2"),
        ({"mask_ratio": 0.5, "mask_ratio_end": 0.9}, ValueError, "mask_ratio=0.9 leaves no visible patch"),
        ({"mask_kind": "blok"}, ValueError, "mask_kind='blok' is no kind of mask"),
        ({"batch_size": 64}, ValueError, "fewer than batch_size=64"),
        ({"model": "resnet51"}, ValueError, "resnet51"),
        ({"patch_size": 33}, ValueError, "patch_size .* got 33"),
        ({"img_size": 65}, ValueError, "img_size 65x65 is not divisible .* 64x64"),
        ({"amp_dtype": "float16"}, ValueError, "needs a GPU"),
        ({"device": "cuda:99"}, ValueError, "device is 'cuda:99'"),
        ({"device": "tpu"}, ValueError, "device is 'tpu'"),
        ({"learning_rate": 1.0}, TypeError, "learning_rate"),
        ({"in_chans": 5}, ValueError, "in_chans=5 needs .npy"),
    ],
)
def test_bad_settings_leave_no_folder(settings: dict, changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pretrain(**{**settings, **changes})
    assert not settings["out"].exists()


def test_config_object_is_taken_too(settings: dict) -> None:
    with pytest.raises(TypeError, match="config is a dict"):
        pretrain(settings)
    assert pretrain(PretrainConfig(**settings), epochs=1).steps == 3


def test_bad_images_are_logged_once_and_training_goes_on(settings: dict, own_photos: Path) -> None:
    (own_photos / "04.jpg").write_bytes((own_photos / "04.jpg").read_bytes()[:600])
    result = pretrain(**{**settings, "data": own_photos, "workers": 1})
    log = (settings["out"] / "train.log").read_text()
    assert result.steps == 12
    assert log.count("warning") == 1
    assert f"warning: {own_photos / '04.jpg'} cannot be read, another image takes its place (OSError" in log


def test_images_that_vanish(settings: dict, own_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_all() -> None:
        for path in own_photos.rglob("*.*"):
            path.unlink()

    call_at_step(monkeypatch, 4, remove_all)
    with pytest.raises(ValueError, match="17 images in a row could not be read"):
        pretrain(**{**settings, "data": own_photos, "checkpoint_every": 1})
    assert load_checkpoint(settings["out"] / "last.pt")["step"] == 3


def test_a_loss_that_is_not_finite_stops_the_run(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._step

    def step(config, state, images, number):
        return real(config, state, images * float("nan") if number == 7 else images, number)

    monkeypatch.setattr(loop, "_step", step)
    with pytest.raises(FloatingPointError, match=r"noticed after step 8.*last\.pt is from before it"):
        pretrain(**{**settings, "checkpoint_every": 2, "log_every": 100})
    content = load_checkpoint(settings["out"] / "last.pt")
    assert content["step"] == 6
    assert all(value.isfinite().all() for value in content["model"].values())


def test_a_weight_that_is_not_finite_is_not_saved(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loss says: a checkpoint is checked before it replaces the one before."""
    real = torch.optim.AdamW.step

    def step(self, *arguments):
        real(self, *arguments)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match=r"a weight is not finite.*no checkpoint was written"):
        pretrain(**{**settings, "opt": "adamw", "epochs": 1, "batch_size": 12})
    assert not (settings["out"] / "last.pt").exists()


class Toy(nn.Module):
    """No batch statistics and no mask: the mean loss over a batch is that over its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model = nn.Conv2d(3, 1, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.model(images).square().mean()


def test_accumulation_averages_gradients(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", lambda config: Toy())
    first = pretrain(**settings)
    second = pretrain(**{**settings, "grad_accum_steps": 4, "out": settings["out"].with_name("parts")})
    whole, parts = (load_checkpoint(result.checkpoint)["model"] for result in (first, second))
    assert all(torch.allclose(value, parts[name], atol=1e-6) for name, value in whole.items())
    for row, other in zip(metrics(first.out), metrics(second.out), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_gradient_clipping(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm that is logged is the one before clipping; the one that is used is the smaller."""
    seen = []
    monkeypatch.setattr(loop, "build_model", lambda config: Toy())
    real = torch.optim.AdamW.step

    def step(self, *arguments):
        used = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.nn.utils.get_total_norm(used).item())
        real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    pretrain(**{**settings, "opt": "adamw", "clip_grad": 1e-3, "log_every": 1})
    assert max(seen) == pytest.approx(1e-3, rel=1e-3)
    assert min(row["grad_norm"] for row in metrics(settings["out"])) > 1e-2


def test_five_channels_non_square_bfloat16(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    for index in range(4):
        np.save(tmp_path / "arrays" / f"{index}.npy", np.random.default_rng(index).random((40, 70, 5), np.float32))
    changes = {"in_chans": 5, "img_size": (64, 96), "amp_dtype": "bfloat16", "data": tmp_path / "arrays", "epochs": 2}
    result = pretrain(**{**settings, **changes, "reconstruct_every": 1})
    assert np.isfinite(result.final_loss)
    assert result.reconstructions.exists()
    net = timm.create_model("test_resnet", num_classes=0, in_chans=5, checkpoint_path=str(result.backbone))
    assert net.conv1[0].weight.dtype == torch.float32


def test_initial_checkpoint_is_where_training_starts(settings: dict, reference_run: Path, monkeypatch) -> None:
    start = load_checkpoint(reference_run / "last.pt")["model"]
    found = {}

    def keep(config, state, images, number):
        found.update({name: value.clone() for name, value in state.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_step", keep)
    backbone = [name for name in start if name.startswith("encoder.model.")]
    assert backbone
    # The run dies before its first checkpoint, so the second attempt starts from the same weights again.
    first = {**settings, "initial_checkpoint": reference_run / "backbone.safetensors"}
    for arguments in (first, {"out": settings["out"], "resume": True}):
        found.clear()
        with pytest.raises(KeyboardInterrupt):
            pretrain(**arguments)
        assert all(torch.equal(found[name], start[name]) for name in backbone)


def test_time_makes_a_checkpoint_due(settings: dict) -> None:
    state = loop._make_state(PretrainConfig(**settings), torch.device("cpu"), fresh=True)
    config = PretrainConfig(**{**settings, "checkpoint_minutes": 1.0})
    state.step = 1
    assert not loop._checkpoint_due(config, state, 3)
    state.saved_at -= 61
    assert loop._checkpoint_due(config, state, 3)
    assert loop._checkpoint_due(dataclasses.replace(config, checkpoint_every=1), dataclasses.replace(state, step=3), 3)
