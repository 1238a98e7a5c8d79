"""Timing refuses to compare networks that do not compute the same."""

from __future__ import annotations

import pytest
import torch
from simulation import stir

import spark_fast as sf
from spark_fast.evaluate.speed import alternate, compare_with_dense, fastest, prove_equal

SMALL = {
    "resnet26": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "efficientnet_b0": {},
}


def make(name: str) -> tuple[sf.Encoder, torch.Tensor, torch.Tensor]:
    encoder = stir(sf.Encoder(name, model_kwargs=SMALL[name]))
    return encoder, torch.randn(2, 3, 96, 96), sf.random_patch_mask(2, (3, 3), 0.6)


@pytest.mark.parametrize("name", list(SMALL))
def test_sparse_and_dense_are_equal(name):
    encoder, images, active = make(name)
    gaps = prove_equal(encoder, {"dense": encoder}, images, active)
    assert 0 <= gaps["maps"] < 1e-4 and 0 < gaps["gradients"] < 2e-2
    assert 0 < gaps["exact maps"] < 1e-12 and 0 < gaps["exact gradients"] < 1e-10


def test_a_comparison_gives_times():
    encoder, images, active = make("resnet26")
    speed = compare_with_dense(encoder, images, active, rounds=3)
    assert len(speed.sparse) == len(speed.dense) == 3
    assert speed.ratio > 0 and speed.form == "as given"


def test_the_fastest_form_is_compared_with():
    encoder, images, active = make("convnext_tiny")
    speed = compare_with_dense(encoder, images, active, rounds=1, forms={"one": encoder, "two": encoder})
    assert speed.form == min(speed.forms, key=speed.forms.get) and set(speed.forms) == {"one", "two"}


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_another_result_is_refused(wrong):
    encoder, images, active = make("resnet26")
    other, _, _ = make("resnet26")
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        other.model.layer2[0].conv2.weight.add_(wrong)
    with pytest.raises(RuntimeError, match="differ"):
        compare_with_dense(encoder, images, active, rounds=1, forms={"other": other})


def test_runs_take_turns_and_the_order_swaps():
    seen = []
    times = alternate({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert "".join(seen) == "abbaab"
    assert {name: len(series) for name, series in times.items()} == {"a": 2, "b": 2}


def test_without_a_choice_nothing_is_timed():
    assert fastest({"only": lambda: pytest.fail("ran")}) == ("only", {})
