"""Section "training": ten real steps on the device and on the CPU, in float32 and in float64, then under bfloat16.

The same weights, images, masks and settings. Rounding makes runs drift apart, by ReLUs that switch and by steps of the
optimiser that depend on small gradients' signs. How far is measured: the device may be as far from the CPU's float64
run as the CPU's own float32 run is, `SPREAD` times, since two walks of the same length end apart by chance, and
`ROUNDING` more, which the sums of the first loss explain.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import spark_fast as sf
from bench.gpu.measure import HALF, exact_float32
from bench.gpu.section import Section
from bench.harness import significant
from bench.nets import model_kwargs, stir
from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import make_optimizer

STEPS, IMAGES, BATCH = 10, 64, 16
MODEL, SIZE, WIDTH = "resnet50", 128, 128
SPREAD, ROUNDING = 8.0, 2e-6
FIRST = 1e-5  # relative: of the first loss, which no step has moved yet
HALF_BAND = 2e-3  # relative: the loss is a mean of many values, whose roundings cancel


def run(section: Section) -> None:
    losses: dict[str, list[float]] = {}

    def float32() -> dict:
        with exact_float32():
            for name, device, dtype in (
                ("cpu float64", "cpu", torch.float64), ("cpu float32", "cpu", torch.float32),
                ("device float32", section.device, torch.float32),
            ):  # fmt: skip
                losses[name] = train(section, device, dtype)
        return judged(losses)

    section.case("ten steps in float32", float32)
    section.case("ten steps under bfloat16", lambda: half_precision(section, losses))


def train(section: Section, device: str, dtype: torch.dtype, autocast: bool = False) -> list[float]:
    """The losses of the steps, from the same start every time."""
    size, batch, width = (64, 4, 32) if section.tiny else (SIZE, BATCH, WIDTH)
    torch.manual_seed(0)
    model = stir(sf.SparK(MODEL, size, 0.6, decoder_width=width, model_kwargs=model_kwargs(MODEL)))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, size, size, generator=generator)
    masks = [model.random_mask(batch, generator) for _ in range(STEPS)]
    model = model.to(device, dtype).train()
    config = PretrainConfig(data=Path("images"), out=Path("run"), model=MODEL, opt="adamw", lr=1e-4, batch_size=batch)
    optimizer = make_optimizer(model, config)
    losses = []
    for step, mask in enumerate(masks):
        at = torch.arange(step * batch, (step + 1) * batch) % IMAGES
        with torch.autocast(torch.device(device).type, HALF, enabled=autocast):
            loss = model(images[at].to(device, dtype), mask.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses).tolist()


def judged(losses: dict[str, list[float]]) -> dict:
    """What float32 runs are off float64, and whether the device's may be."""
    true, cpu, device = (torch.tensor(losses[n]) for n in ("cpu float64", "cpu float32", "device float32"))
    off = {"cpu": float((cpu - true).abs().max()), "device": float((device - true).abs().max())}
    allowed = SPREAD * off["cpu"] + ROUNDING
    first = float((device[0] - true[0]).abs() / true[0])
    entry = {"losses": losses, "off_float64": {n: significant(v, 3) for n, v in off.items()}, "allowed": allowed}
    if not (off["device"] <= allowed and first <= FIRST):
        entry["error"] = f"losses are {off['device']:.3g} off float64 ({first:.3g} the first), allowed {allowed:.3g}"
    return entry


def half_precision(section: Section, losses: dict[str, list[float]]) -> dict:
    found = torch.tensor(train(section, section.device, torch.float32, autocast=True))
    if "cpu float64" not in losses:
        return {"losses": found.tolist(), "error": "no float64 losses to compare with"}
    true = torch.tensor(losses["cpu float64"])
    off = float(((found - true) / true).abs().max())
    entry = {"losses": found.tolist(), "off_float64": significant(off, 3), "allowed": HALF_BAND}
    if not (found.isfinite().all() and off <= HALF_BAND):
        entry["error"] = f"losses {found.tolist()} are {off:.3g} off float64, allowed {HALF_BAND}"
    return entry
