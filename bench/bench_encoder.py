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
from bench.settings import BATCH, HEADLINE_ROUNDS, MASK_RATIO, NET_ROUNDS, SIZE
from spark_fast.evaluate.speed import compare_with_dense

MODELS = ["resnet50", "resnet101", "convnext_tiny", "convnext_small", "efficientnet_b0"]
HEADLINE = ("resnet50", "convnext_small")
fastest_form: dict[str, str] = {}  # of each model, found once per run


def measure_encoder(
    benchmark, ceilings, model: str, batch: int, size: int, ratio: float, rounds: int, choose_once: bool = True, **info
) -> None:
    """One encoder on one batch, proven and timed.

    Args:
        choose_once: take the dense form that an earlier case of this run found to be the fastest.
    """
    encoder = stir(sf.Encoder(model, model_kwargs=model_kwargs(model)))
    images, grid = torch.randn(batch, 3, size, size), (size // 32, size // 32)
    active = sf.random_patch_mask(batch, grid, ratio)
    forms = dense_forms(encoder)
    if choose_once and model in fastest_form:
        forms = {fastest_form[model]: forms[fastest_form[model]]}
    speed = compare_with_dense(encoder, images, active, rounds, forms)
    fastest_form[model] = speed.form
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
    if model.startswith("convnext"):
        benchmark.extra_info["dense_form"] = speed.form
    if speed.forms:
        benchmark.extra_info["dense_forms_ms"] = {name: round(1000 * s, 1) for name, s in speed.forms.items()}


@pytest.mark.parametrize("model", [pytest.param(m, id=f"{m}-headline" if m in HEADLINE else m) for m in MODELS])
def test_encoder(benchmark, ceilings, model: str) -> None:
    rounds = HEADLINE_ROUNDS if model in HEADLINE else NET_ROUNDS
    settings = dict(kind="encoder", choose_once=False)
    measure_encoder(benchmark, ceilings, model, BATCH, SIZE, MASK_RATIO, rounds, **settings)
