"""A whole pre-training step: SparK's forward, backward and optimiser step, against the same with everything dense.

Dense: channels-last, masked encoder, norm + fill + projection, plain decoder, the same loss and its own optimiser.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import spark_fast as sf
from bench.harness import note, prove_with_kinks
from bench.nets import DenseSparK, dense_forms, model_kwargs, stir
from bench.settings import BATCH, HEADLINE_ROUNDS, MASK_RATIO, SIZE, TINY
from spark_fast.evaluate.speed import alternate, fastest
from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import make_optimizer


@pytest.mark.parametrize("model", [pytest.param(m, id=f"{m}-headline") for m in ("resnet50", "convnext_small")])
def test_step(benchmark, model: str) -> None:
    width = {"decoder_width": 32} if TINY else {}
    spark = stir(sf.SparK(model, SIZE, MASK_RATIO, model_kwargs=model_kwargs(model), **width))
    active, images = spark.random_mask(BATCH), torch.randn(BATCH, 3, SIZE, SIZE)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    encoders = dense_forms(spark.encoder)
    prove_same_step(spark, encoders, images[:2], active[:2])
    forms = {name: DenseSparK(spark, encoder, active) for name, encoder in encoders.items()}
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


def prove_same_step(
    spark: sf.SparK, encoders: Mapping[str, sf.Encoder], images: torch.Tensor, active: torch.Tensor
) -> None:
    """Loss and all gradients in evaluation mode, where dense batch norms mean the same: sparse and dense equal in
    float64, and sparse and every dense form close to that in float32. WrongResultError if not."""
    channels_last = images.contiguous(memory_format=torch.channels_last)
    forms = {name: DenseSparK(spark, encoder, active) for name, encoder in encoders.items()}
    first = next(iter(forms.values()))
    truth = _results(copy.deepcopy(first).double(), channels_last.double())
    exact = _results(copy.deepcopy(spark).double(), images.double(), active)
    prove_with_kinks("sparse step", _results(copy.deepcopy(spark), images, active), exact, truth)
    for name, form in forms.items():
        prove_with_kinks(f"dense step ({name})", _results(form, channels_last), truth, truth)


def _results(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients, flat, in the order of the sparse model's names."""
    loss = model.eval()(*inputs)
    loss.backward()
    found = {n.replace("encoder.encoder.", "encoder."): p.grad for n, p in model.named_parameters()}
    gradients = [found[name].double().flatten() for name in sorted(found) if found[name] is not None]
    return [loss.detach().double().flatten(), *gradients]
