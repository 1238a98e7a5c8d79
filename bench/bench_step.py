"""A whole pre-training step: SparK's forward, backward and optimiser step, against the same with everything dense.

Dense: channels-last, masked encoder, norm + fill + projection, plain decoder, the same loss and its own optimiser.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import spark_fast as sf
from bench.harness import note
from bench.nets import DenseSparK, dense_forms, model_kwargs, stir
from bench.settings import BATCH, HEADLINE_ROUNDS, MASK_RATIO, SIZE, TINY
from spark_fast.evaluate.speed import BOUND, alternate, distance, fastest
from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import make_optimizer


@pytest.mark.parametrize("model", [pytest.param(m, id=f"{m}-headline") for m in ("resnet50", "convnext_small")])
def test_step(benchmark, model: str) -> None:
    width = {"decoder_width": 32} if TINY else {}
    spark = stir(sf.SparK(model, SIZE, MASK_RATIO, model_kwargs=model_kwargs(model), **width))
    active, images = spark.random_mask(BATCH), torch.randn(BATCH, 3, SIZE, SIZE)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    forms = {name: DenseSparK(spark, form, active) for name, form in dense_forms(spark.encoder).items()}
    for form in forms.values():
        prove_same_step(spark, form, images, active)
    dense = {name: training_step(form, model, lambda form=form: form(channels_last)) for name, form in forms.items()}
    sparse = training_step(spark, model, lambda: spark(images, active))
    best, seconds = fastest(dense)
    times = alternate({"sparse": sparse, "dense": dense[best]}, HEADLINE_ROUNDS, warmup=1)
    benchmark.pedantic(sparse, rounds=1, warmup_rounds=0)
    note(
        benchmark, {name: statistics.median(series) for name, series in times.items()}, None, None,
        kind="step", net=model, batch=BATCH, img_size=SIZE, mask_ratio=MASK_RATIO, rounds=HEADLINE_ROUNDS,
    )  # fmt: skip
    if seconds:
        forms = {name: round(1000 * s, 1) for name, s in seconds.items()}
        benchmark.extra_info.update(dense_form=best, dense_forms_ms=forms)


def training_step(model: nn.Module, name: str, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """What the trainer does with a batch, on `model` and an optimiser of its own."""
    config = PretrainConfig(data=Path("images"), out=Path("run"), model=name, batch_size=BATCH)
    optimizer = make_optimizer(model.train(), config)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()

    return step


def prove_same_step(spark: sf.SparK, dense: DenseSparK, images: torch.Tensor, active: torch.Tensor) -> None:
    """Loss and gradients in evaluation mode, where dense batch norms mean the same; RuntimeError if they differ."""
    ours, theirs = copy.deepcopy(spark).eval(), copy.deepcopy(dense).eval()
    losses = ours(images, active), theirs(images.contiguous(memory_format=torch.channels_last))
    for loss in losses:
        loss.backward()
    gaps = {"loss": distance(*losses)}
    expected = {name.replace("encoder.encoder.", "encoder."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None or expected[name] is not None:
            gaps[name] = distance(parameter.grad.view_as(expected[name]), expected[name])
    wrong = {name: gap for name, gap in gaps.items() if not gap < 10 * BOUND}  # decoder and loss on top of the encoder
    if wrong:
        raise RuntimeError(f"the sparse and the dense step differ: {wrong}")
