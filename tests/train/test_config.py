"""PretrainConfig: defaults by recipe, early and clear errors, the way to JSON and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_fast import mask
from spark_fast.train.config import PretrainConfig


def make(**settings: object) -> PretrainConfig:
    return PretrainConfig(data="images", out="run", **settings)


@pytest.mark.parametrize(
    ("settings", "kind", "named"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0, need an integer >= 1"),
        ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
        ({"batch_size": True}, TypeError, "batch_size is True"),
        ({"batch_size": "64"}, TypeError, "batch_size is '64'"),
        ({"img_size": (64, 64, 64)}, ValueError, "img_size"),
        ({"img_size": (64, 0)}, ValueError, "img_size is 0"),
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio is 1.0"),
        ({"mask_ratio": 0.0}, ValueError, "mask_ratio is 0.0"),
        ({"mask_ratio": float("nan")}, ValueError, "mask_ratio is nan"),
        ({"mask_ratio": "0.6"}, TypeError, "mask_ratio is '0.6'"),
        ({"mask_ratio": (0.5, 1.0)}, ValueError, r"mask_ratio is 1\.0"),
        ({"mask_ratio": (0.5, 0.4)}, ValueError, r"mask_ratio is \(0\.5, 0\.4\), need one number, or the lowest"),
        ({"mask_ratio": (0.5,)}, ValueError, "mask_ratio"),
        ({"mask_ratio_end": 1.0}, ValueError, r"mask_ratio_end is 1\.0"),
        ({"mask_ratio_end": "0.5"}, TypeError, "mask_ratio_end"),
        (
            {"mask_ratio_end": 0.7, "mask_ratio": (0.5, 0.6)},
            ValueError,
            "mask_ratio_end is .* need None with mask_ratio",
        ),
        ({"mask_ratio_schedule": "step"}, ValueError, "mask_ratio_schedule is 'step', need one of linear, cosine"),
        ({"mask_kind": "blocks"}, ValueError, "mask_kind='blocks' is no kind of mask, need one of random, block"),
        ({"mask_kind": len}, TypeError, "mask_kind .* need a name; register_mask gives one"),
        ({"cuda_graph": True, "mask_ratio": (0.5, 0.6)}, ValueError, "cuda_graph is True, need False unless all masks"),
        ({"cuda_graph": True, "mask_ratio_end": 0.7}, ValueError, "cuda_graph is True, need False unless all masks"),
        ({"lr": -1e-3}, ValueError, "lr is -0.001"),
        ({"lr": float("inf")}, ValueError, "lr is inf"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"betas": (0.9,)}, ValueError, "betas"),
        ({"scale": (0.9, 0.5)}, ValueError, "scale"),
        ({"scale": (0.0, 1.0)}, ValueError, "scale"),
        ({"mean": (0.5,)}, ValueError, r"mean is \(0.5,\), need 3 numbers"),
        ({"std": (0.0, 1, 1)}, ValueError, "std"),
        ({"opt": "sgd"}, ValueError, "opt is 'sgd', need one of lamb, adamw"),
        ({"amp_dtype": "fp16"}, ValueError, "amp_dtype is 'fp16'"),
        ({"grad_accum_steps": 3, "batch_size": 8}, ValueError, "grad_accum_steps is 3.*divisor of batch_size=8"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"model": None}, TypeError, "model is None"),
        ({"workers": -1}, ValueError, "workers"),
        ({"checkpoint_minutes": 0}, ValueError, "checkpoint_minutes"),
        ({"resume": "yes"}, TypeError, "resume"),
    ],
)
def test_bad_settings_are_named(settings: dict, kind: type[Exception], named: str) -> None:
    with pytest.raises(kind, match=named):
        make(**settings).check()


def test_recipe_by_model_name() -> None:
    assert make(model="resnet50").check().drop_path_rate == 0.05
    assert make(model="resnet200.untrained").drop_path_rate == 0.15
    assert make(model="convnext_base").drop_path_rate == 0.3
    assert make(model="vgg16").drop_path_rate == 0.0
    assert make(model="resnet50", drop_path=0.0).drop_path_rate == 0.0
    assert make(model="resnet50").optimizer_betas == (0.9, 0.95)
    assert make(model="convnext_small").optimizer_betas == (0.9, 0.999)


def test_learning_rate_scales_with_the_batch() -> None:
    assert make(batch_size=4096).peak_lr == pytest.approx(3.2e-3)
    assert make(batch_size=4096, lr=0.0).peak_lr == 0.0


def test_warm_up_is_a_tenth_of_a_short_run() -> None:
    assert make(epochs=1600).warmup_steps(100) == 4000
    assert make(epochs=50).warmup_steps(100) == 500
    assert make(epochs=1).warmup_steps(100) == 10


def test_normalization_by_channels() -> None:
    assert make().normalization[0] == (0.485, 0.456, 0.406)
    mean, std = make(in_chans=5).check().normalization
    assert mean == (0.449,) * 5
    assert std == (0.226,) * 5
    assert make(in_chans=1, mean=(0.1,)).check().normalization[0] == (0.1,)


def test_json_round_trip() -> None:
    config = make(img_size=(64, 96), mask_ratio=(0.4, 0.8), betas=(0.8, 0.9), mean=[0.1, 0.2, 0.3], lr=1e-3)
    again = PretrainConfig.from_dict(json.loads(config.save_text()))
    assert again.changed_since(config) == []
    assert again.check().size == (64, 96)
    assert again.data == Path("images").absolute()


def test_changed_settings_are_listed_and_free_ones_are_not() -> None:
    changed = make(epochs=5, workers=7, log_every=1, device="cpu").changed_since(make(epochs=6))
    assert changed == ["epochs: 6 -> 5"]


def test_masks_of_varying_counts_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mask._KINDS, "mine", lambda *arguments: None)
    make(mask_kind="mine").check()
    make(mask_kind="block", cuda_graph=True).check()
    with pytest.raises(ValueError, match="cuda_graph is True, need False unless all masks"):
        make(mask_kind="mine", cuda_graph=True).check()


def test_settings_stored_before_there_were_mask_kinds() -> None:
    stored = make().to_dict()
    for name in ("mask_kind", "mask_ratio_end", "mask_ratio_schedule"):
        del stored[name]
    assert make().changed_since(PretrainConfig.from_dict(stored)) == []


def test_unknown_stored_setting() -> None:
    with pytest.raises(ValueError, match="unknown settings: colour"):
        PretrainConfig.from_dict({"data": "a", "out": "b", "colour": 1})
