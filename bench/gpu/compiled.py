"""Section "compiled": the encoders and the sparse step under torch.compile, as far as the time reaches.

Compiling takes longer than everything else, so that no case of this section must pass; what it finds is compared with
the fastest form of the other sections by whoever reads both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bench.gpu.nets import MODELS, Batch, forms_of, halved, make_encoder, pass_of, sparse_maps
from bench.gpu.section import Section
from bench.gpu.step import TrainingStep, make_spark
from bench.harness import significant
from spark_fast.evaluate.speed import alternate


def run(section: Section) -> None:
    torch.backends.cudnn.benchmark = True
    for model in MODELS[:1] if section.tiny else MODELS:
        for name, measure in (("dense encoder", _dense), ("sparse encoder", _sparse), ("sparse step", _step)):
            section.case(
                f"{model} {name}, compiled",
                lambda model=model, measure=measure: halved(section, lambda batch: measure(section, model, batch)),
                optional=True,
            )


def compiled(section: Section, function: Callable) -> Callable:
    return torch.compile(function, backend="eager" if section.tiny else "inductor")


def timed(section: Section, runs: dict[str, Callable[[], object]]) -> dict:
    times = alternate(runs, 1 if section.tiny else 5, 2, section.device)
    return {"ms": {name: significant(1e3 * statistics.median(series)) for name, series in times.items()}}


def _dense(section: Section, model: str, batch: Batch) -> dict:
    """Each way to write the network; the fastest one compiled is what counts."""
    images = batch.images.contiguous(memory_format=torch.channels_last)
    runs = {}
    for name, form in forms_of(make_encoder(model, section.device), batch.active).items():
        form.train()
        with torch.no_grad():
            form(images)  # makes the masks
        call = compiled(section, form)
        runs[f"dense {name}"] = pass_of(form, lambda call=call: call(images), images.device)
    return timed(section, runs)


def _sparse(section: Section, model: str, batch: Batch) -> dict:
    encoder = make_encoder(model, section.device).train()
    call = compiled(section, lambda: sparse_maps(encoder, batch))
    return timed(section, {"sparse": pass_of(encoder, call, batch.images.device)})


def _step(section: Section, model: str, batch: Batch) -> dict:
    spark = make_spark(section, model)
    call = compiled(section, spark)
    return timed(
        section, {"sparse": TrainingStep(spark, model, lambda: call(batch.images), True, batch.images.shape[0])}
    )
