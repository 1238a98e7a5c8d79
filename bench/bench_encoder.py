"""Encoder forward + backward: sparse against the same network dense, channels-last and masked, in one run.

For ConvNeXt dense has two forms, MLPs as Linear or as 1x1 convolutions; the faster one is compared with.
"""

from __future__ import annotations

import statistics

import pytest
import torch

import spark_fast as sf
from bench.harness import Work, note
from bench.nets import dense_forms, model_kwargs, stir, useful_flops
from bench.settings import BATCH, GRID, MASK_RATIO, NET_ROUNDS, SIZE, TINY
from spark_fast.evaluate.speed import compare_with_dense

MODELS = ["resnet50", "resnet101", "convnext_tiny", "convnext_small", "efficientnet_b0"]
HEADLINE = ("resnet50", "convnext_small")


def measure_encoder(benchmark, ceilings, model: str, batch: int, size: int, ratio: float, rounds: int, **info) -> None:
    """One encoder on one batch, proven and timed."""
    encoder = stir(sf.Encoder(model, model_kwargs=model_kwargs(model)))
    images, grid = torch.randn(batch, 3, size, size), (size // 32, size // 32)
    active = sf.random_patch_mask(batch, grid, ratio)
    speed = compare_with_dense(encoder, images, active, rounds, dense_forms(encoder))
    seconds = {"sparse": statistics.median(speed.sparse), "dense": statistics.median(speed.dense)}

    def step() -> None:
        maps = encoder(sf.SparseTensor.from_dense(images, sf.ActivePatches(active)))
        sum(m.features.square().mean() for m in maps).backward()

    benchmark.pedantic(step, rounds=1, warmup_rounds=1)
    flops = useful_flops(encoder, images, active)
    note(
        benchmark, seconds, ceilings, Work(flops, 0), net=model, batch=batch, img_size=size, mask_ratio=ratio,
        active_patches=int(active.sum()), rounds=rounds, **info,
    )  # fmt: skip
    if speed.forms:
        forms = {name: round(1000 * s, 1) for name, s in speed.forms.items()}
        benchmark.extra_info.update(dense_form=speed.form, dense_forms_ms=forms)


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=f"{m}-headline" if m in HEADLINE else m) for m in MODELS if not TINY or m != "resnet101"]
)
def test_encoder(benchmark, ceilings, model: str) -> None:
    assert GRID == (SIZE // 32, SIZE // 32)
    measure_encoder(benchmark, ceilings, model, BATCH, SIZE, MASK_RATIO, NET_ROUNDS, kind="encoder")
