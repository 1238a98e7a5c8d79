"""Schedules against the published formulas, and the parameters that do not decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spark_fast.train.checkpoint import build_model
from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import (
    learning_rate,
    make_optimizer,
    mask_ratio,
    parameter_groups,
    set_schedule,
    weight_decay,
)


def test_learning_rate_follows_the_formula() -> None:
    total, warmup, peak = 1000, 100, 3e-3
    assert learning_rate(0, total, warmup, peak) == pytest.approx(0.005 * peak)
    assert learning_rate(50, total, warmup, peak) == pytest.approx(peak * (0.005 + 0.995 / 2))
    assert learning_rate(warmup, total, warmup, peak) == pytest.approx(peak)
    assert learning_rate(total - 1, total, warmup, peak) == pytest.approx(0.001 * peak)
    angle = math.pi * (300 - 100) / (999 - 100)
    assert learning_rate(300, total, warmup, peak) == pytest.approx(peak * (0.001 + 0.999 * (1 + math.cos(angle)) / 2))


def test_learning_rate_of_the_shortest_runs() -> None:
    assert learning_rate(0, 1, 0, 1.0) == 1.0
    assert learning_rate(1, 2, 1, 1.0) == 1.0


def test_weight_decay_follows_the_formula() -> None:
    assert weight_decay(0, 11, 0.04, 0.2) == pytest.approx(0.04)
    assert weight_decay(5, 11, 0.04, 0.2) == pytest.approx(0.12)
    assert weight_decay(10, 11, 0.04, 0.2) == pytest.approx(0.2)
    assert weight_decay(0, 1, 0.04, 0.2) == pytest.approx(0.04)


def test_mask_ratio_follows_the_formula() -> None:
    assert [mask_ratio(e, 5, 0.3, 0.7, "linear") for e in (0, 4)] == [0.3, 0.7]  # the ends exactly
    assert [mask_ratio(e, 5, 0.3, 0.7, "cosine") for e in (0, 4)] == [0.3, 0.7]
    assert mask_ratio(1, 5, 0.3, 0.7, "linear") == pytest.approx(0.4)
    assert mask_ratio(1, 5, 0.3, 0.7, "cosine") == pytest.approx(0.5 - 0.2 * math.cos(math.pi / 4))
    assert mask_ratio(3, 5, 0.7, 0.3, "cosine") == pytest.approx(0.5 - 0.2 * math.cos(math.pi / 4))
    assert mask_ratio(0, 1, 0.3, 0.7, "linear") == 0.3


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_no_decay_on_vectors_biases_gamma_and_mask_tokens(model: str) -> None:
    spark = build_model(PretrainConfig(data="a", out="b", model=model, img_size=64, decoder_width=32))
    names = {id(parameter): name for name, parameter in spark.named_parameters()}
    decay, keep = ({names[id(p)] for p in group["params"]} for group in parameter_groups(spark))
    assert decay | keep == set(names.values())
    assert decay.isdisjoint(keep)
    assert any("mask_token" in name for name in keep)
    assert not [name for name in decay if "mask_token" in name or name.endswith((".bias", ".gamma"))]
    assert all(spark.get_parameter(name).ndim > 1 for name in decay)
    assert [name for name in keep if "gamma" in name] or model != "test_convnext"


def test_gamma_that_is_not_a_vector_and_frozen_weights() -> None:
    net = nn.Module()
    net.gamma = nn.Parameter(torch.ones(1, 3, 1, 1))
    net.weight = nn.Parameter(torch.ones(3, 3))
    net.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    decay, keep = parameter_groups(net)
    assert decay["params"] == [net.weight]
    assert keep["params"] == [net.gamma]


@pytest.mark.parametrize("opt", ["lamb", "adamw"])
def test_schedule_reaches_the_optimiser(opt: str) -> None:
    config = PretrainConfig(data="a", out="b", opt=opt, betas=(0.8, 0.9))
    optimizer = make_optimizer(nn.Linear(3, 3), config)
    set_schedule(optimizer, 0.1, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_one_lamb_step_by_hand() -> None:
    """First step of LAMB: Adam's direction is sign(g); with decay the step is scaled by |w| / |update|."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.zero_()
    optimizer = make_optimizer(layer, PretrainConfig(data="a", out="b"))
    set_schedule(optimizer, 0.1, 0.5)
    layer.weight.grad, layer.bias.grad = torch.tensor([[1.0, -1.0]]), torch.tensor([2.0])
    optimizer.step()
    update = torch.tensor([[1.0, -1.0]]) + 0.5 * torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.1 * 5.0 / update.norm() * update
    assert torch.allclose(layer.weight, expected, atol=1e-5)
    assert torch.allclose(layer.bias, torch.tensor([-0.1]), atol=1e-5)  # no decay: no trust ratio
