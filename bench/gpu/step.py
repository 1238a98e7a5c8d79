"""Section "step": a whole pre-training step with its optimiser, against the same with everything dense.

Also against the dense-masked step as the released code runs it: float32, NCHW, every layer's output masked, batch norms
over gathered active pixels, PyTorch's default for TF32.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import spark_fast as sf
from bench.gpu.measure import HALF
from bench.gpu.nets import (
    MODELS,
    NEAR,
    PROVEN,
    Batch,
    HalfMaskedDense,
    batch_of,
    distance,
    halved,
    time_sides,
    with_graph,
)
from bench.gpu.section import Section
from bench.harness import significant
from bench.nets import DenseSparK, dense_forms, model_kwargs, stir
from bench.settings import ROOT
from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import make_optimizer

sys.path.append(str(ROOT / "tests"))
from simulation import Simulation, maps_of


def run(section: Section) -> None:
    torch.backends.cudnn.benchmark = True
    for model in MODELS:
        section.case(f"{model} step", lambda model=model: _step(section, model))
    for model in MODELS:
        section.case(f"{model} step, released form", lambda model=model: _released(section, model))


def make_spark(section: Section, model: str) -> sf.SparK:
    torch.manual_seed(0)
    size, width = (128, {"decoder_width": 32}) if section.tiny else (224, {})
    return stir(sf.SparK(model, size, 0.6, model_kwargs=model_kwargs(model), **width)).to(section.device)


class DenseForm(DenseSparK):
    """SparK dense and channels-last, with masks in the dtype of the maps."""

    def __init__(self, spark: sf.SparK, encoder: sf.Encoder, active: torch.Tensor):
        super().__init__(spark, encoder, active)
        self.encoder = HalfMaskedDense(encoder, active)
        self.to(active.device)


def dense_steps(spark: sf.SparK, active: torch.Tensor) -> dict[str, DenseForm]:
    return {
        name: DenseForm(spark, encoder.to(active.device), active)
        for name, encoder in dense_forms(spark.encoder).items()
    }


class TrainingStep:
    """Loss, gradients and clipping in one call that a CUDA graph can hold, and the optimiser's step outside of it."""

    def __init__(self, model: nn.Module, name: str, loss: Callable[[], torch.Tensor], autocast: bool, batch: int):
        config = PretrainConfig(data=Path("images"), out=Path("run"), model=name, batch_size=batch)
        self.model, self.loss, self.autocast, self.clip = model.train(), loss, autocast, config.clip_grad
        self.optimizer = make_optimizer(model, config)
        self.device = next(model.parameters()).device

    def gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, HALF, enabled=self.autocast):
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()

    def with_graph(self) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
        """The optimiser's step stays outside: its bias corrections are numbers of the host."""
        return with_graph("sparse", self.gradients, self.model, self.device, self.optimizer.step)


def _step(section: Section, model: str) -> dict:
    spark = make_spark(section, model)
    proof = prove(spark, batch_of(section).first(PROVEN))
    return {"proof": proof, **halved(section, lambda batch: _times(section, spark, model, batch))}


def _times(section: Section, spark: sf.SparK, model: str, batch: Batch) -> dict:
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    count, rounds = batch.images.shape[0], 1 if section.tiny else 5
    sparse = TrainingStep(spark, model, lambda: spark(batch.images), True, count)
    runs, notes = sparse.with_graph()
    for name, form in dense_steps(spark, batch.active).items():
        runs[f"dense {name}"] = TrainingStep(form, model, lambda form=form: form(channels_last), True, count)
    return time_sides(runs, batch.images.device, rounds) | notes


def prove(spark: sf.SparK, batch: Batch) -> dict[str, float]:
    """Loss and gradients in evaluation mode, by the rule of `bench.gpu.nets.prove`."""
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    plain = DenseForm(spark, spark.encoder, batch.active)
    truth = _outcome(copy.deepcopy(plain).double(), lambda m: m(channels_last.double()), False)
    dense = _outcome(plain, lambda m: m(channels_last), True)
    ours = _outcome(copy.deepcopy(spark), lambda m: m(batch.images, batch.active), True)
    found = {}
    for number, what in enumerate(("loss", "gradients")):
        mine, theirs = (distance(side[number], truth[number]) for side in (ours, dense))
        found[what], found[f"dense {what}"] = significant(mine, 3), significant(theirs, 3)
        assert mine <= 2 * theirs + NEAR, f"sparse {what}: {mine:.3g} off float64, dense {theirs:.3g}"
    return found


def _outcome(model: nn.Module, run, autocast: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    device = next(model.parameters()).device
    with torch.autocast(device.type, HALF, enabled=autocast):
        loss = run(model.eval())
    loss.backward()
    found = {name.replace("encoder.encoder.", "encoder."): p.grad for name, p in model.named_parameters()}
    return [loss.detach().double()], [found[n].double().flatten() for n in sorted(found) if found[n] is not None]


def released_batch_norm(layer: nn.BatchNorm2d, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Batch norm of the gathered active pixels, scattered back: x (B, C, H, W), mask (B, H, W) bool."""
    pixels = x.permute(0, 2, 3, 1)
    places = mask.nonzero(as_tuple=True)
    rows = F.batch_norm(
        pixels[places], layer.running_mean, layer.running_var, layer.weight, layer.bias, True, layer.momentum, layer.eps
    )
    out = torch.zeros_like(pixels)
    out[places] = rows
    return out.permute(0, 3, 1, 2)


def released_form(section: Section, spark: sf.SparK, model: str) -> Simulation:
    """The dense simulation with spark's weights, its batch norms as the released code computes them."""
    backbone = timm.create_model(model, num_classes=0, **model_kwargs(model))
    width = spark.decoder.width
    form = Simulation(backbone, *maps_of(backbone), width=width, norm=spark.densify_norm)
    form = form.to(section.device).copy_from(spark).train()

    def norm(layer: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        return released_batch_norm(layer, x, form.mask.at(*x.shape[2:], torch.bool)[:, 0])

    for layer in form.encoder.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.forward = types.MethodType(norm, layer)
    return form


def _released(section: Section, model: str) -> dict:
    return halved(section, lambda batch: _released_times(section, model, batch))


def _released_times(section: Section, model: str, batch: Batch) -> dict:
    """Both sides on the batch that fits the released form's memory."""
    spark, count = make_spark(section, model), batch.images.shape[0]
    form = released_form(section, spark, model)
    ours, theirs = (float(m.train()(batch.images[:PROVEN], batch.active[:PROVEN])) for m in (spark, form))
    assert abs(ours - theirs) <= 1e-2 * abs(theirs), f"loss {ours} for {theirs}: not the same step"
    dense = TrainingStep(form, model, lambda: form(batch.images, batch.active), False, count)
    runs, notes = TrainingStep(spark, model, lambda: spark(batch.images), True, count).with_graph()
    found = time_sides({**runs, "dense released": dense}, batch.images.device, 1 if section.tiny else 3)
    return found | notes | {"gains": {"released": found["gains"]["dense"]}, "losses": [ours, theirs]}
