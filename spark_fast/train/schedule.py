"""Learning rate, weight decay and parameter groups of the published recipe (SparK, appendix on pre-training); and the
schedule of the mask ratio, which the recipe leaves alone."""

from __future__ import annotations

import math

import torch
from timm.optim import Lamb
from torch import nn

from spark_fast.train.config import PretrainConfig

WARMUP_START = 0.005  # of the peak learning rate
FINAL = 0.001  # of the peak learning rate


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Rate at step 0..total_steps-1: linear from 0.005 to 1 of the peak, then a cosine to 0.001 of it."""
    if step < warmup_steps:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (FINAL + (1 - FINAL) * _half_cosine(progress))


def weight_decay(step: int, total_steps: int, start: float, end: float) -> float:
    """Decay at step 0..total_steps-1: a cosine from start to end over the whole run."""
    return end + (start - end) * _half_cosine(step / max(1, total_steps - 1))


def mask_ratio(epoch: int, epochs: int, start: float, end: float, schedule: str) -> float:
    """Masked share in epoch 0..epochs-1, from start to end along a line or ("cosine") half a cosine."""
    progress = epoch / max(1, epochs - 1)
    done = 1 - _half_cosine(progress) if schedule == "cosine" else progress
    return (1 - done) * start + done * end


def _half_cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: weights that decay; and 1-D parameters, biases, layer-scale gamma and mask tokens, which do not."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        exempt = parameter.ndim <= 1 or last == "bias" or "gamma" in last or "mask_token" in name
        (keep if exempt else decay).append(parameter)
    return [{"params": decay, "decays": True}, {"params": keep, "decays": False, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimiser that config.opt names. Clipping is left to the loop, which needs the gradient norm anyway."""
    groups = parameter_groups(model)
    settings = {"lr": config.peak_lr, "betas": config.optimizer_betas, "weight_decay": config.weight_decay}
    if config.opt == "lamb":
        return Lamb(groups, **settings, max_grad_norm=None)
    return torch.optim.AdamW(groups, **settings)


def set_schedule(optimizer: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Write a step's learning rate and weight decay into the optimiser's groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
