"""The optimiser's step as tensor arithmetic, against timm's Lamb and torch's AdamW."""

from __future__ import annotations

import io

import pytest
import torch
from timm.optim import Lamb
from torch import nn
from watching import no_waiting

from spark_fast.train.config import PretrainConfig
from spark_fast.train.schedule import make_optimizer, set_schedule
from spark_fast.train.tensor_step import TensorStep

STEPS = 20
SCHEDULE = [(1e-2 * (step + 1) / STEPS, 0.0 if step in (3, 7) else 0.01 * (step + 1)) for step in range(STEPS)]
OPTIMISERS = pytest.mark.parametrize("opt", ["lamb", "adamw"])


class Net(nn.Module):
    """Weights that decay and vectors that do not; weights of zeros, whose norm is 0; and some without a gradient."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=dtype))
        self.zeros = nn.Parameter(torch.zeros(5, 3, dtype=dtype))
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(5, generator=generator, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, 2, dtype=dtype))

    def fill_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            if parameter is not self.unused:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = (3 * noise + parameter).to(parameter.dtype).detach()
        if step == 4:
            self.first.grad.zero_()
        nn.utils.clip_grad_norm_(self.parameters(), 5.0)


class Stock:
    """The optimiser's own step."""

    def __init__(self, opt: str, dtype: torch.dtype, state: dict | None = None):
        self.net = Net(dtype)
        self.optimizer = make_optimizer(self.net, PretrainConfig(data="a", out="b", opt=opt))
        if state is not None:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])

    def update(self) -> None:
        self.optimizer.step()

    def run(self, first: int, last: int) -> dict:
        """Take steps first..last-1; the state as a checkpoint brings it back."""
        for step in range(first, last):
            self.net.fill_gradients(step)
            set_schedule(self.optimizer, *SCHEDULE[step])
            self.update()
        file = io.BytesIO()
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


class OfTensors(Stock):
    """The same, as TensorStep takes it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.step = TensorStep(self.optimizer)

    def update(self) -> None:
        if not self.step.parts:
            self.step.begin()
        self.step.write_schedule()
        with no_waiting():
            self.step()
        self.step.count()


def assert_same(got: dict, wanted: dict, **tolerance: float) -> None:
    torch.testing.assert_close(got["net"], wanted["net"], **tolerance)
    assert got["optimizer"]["state"].keys() == wanted["optimizer"]["state"].keys()
    for index, state in wanted["optimizer"]["state"].items():
        torch.testing.assert_close(got["optimizer"]["state"][index], state, **tolerance)
    assert len(got["optimizer"]["param_groups"]) == len(wanted["optimizer"]["param_groups"])
    for mine, theirs in zip(got["optimizer"]["param_groups"], wanted["optimizer"]["param_groups"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[name] == value for name, value in theirs.items())


@OPTIMISERS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_same_trajectory(opt, dtype, tolerance):
    """With weights of zeros at first, a gradient of zeros, and weight decay 0 at two steps: no trust ratio there."""
    wanted, got = Stock(opt, dtype).run(0, STEPS), OfTensors(opt, dtype).run(0, STEPS)
    assert not torch.equal(wanted["net"]["first"], Net(dtype).first)
    assert_same(got, wanted, rtol=tolerance, atol=tolerance)


@OPTIMISERS
@pytest.mark.parametrize("kinds", [(Stock, OfTensors), (OfTensors, Stock), (OfTensors, OfTensors)])
def test_state_dicts_load_both_ways(opt, kinds):
    wanted = Stock(opt, torch.float64).run(0, 12)
    half = kinds[0](opt, torch.float64).run(0, 5)
    assert_same(kinds[1](opt, torch.float64, half).run(5, 12), wanted, rtol=1e-12, atol=1e-12)


def test_adamw_parameters_that_took_fewer_steps():
    wanted, got = Stock("adamw", torch.float64), OfTensors("adamw", torch.float64)
    for run in (wanted, got):
        run.net.first.requires_grad_(False)
        Stock.update(run)  # no gradients yet: no step
        run.net.fill_gradients(0)
        run.net.first.grad = None
        Stock.update(run)
        assert run.optimizer.state[run.net.bias]["step"] == 1 and run.net.first not in run.optimizer.state
    assert_same(got.run(1, 6), wanted.run(1, 6), rtol=1e-12, atol=1e-12)
    assert {float(part.steps) for part in got.step.parts} == {5, 6}


def test_other_optimisers_and_options_are_refused():
    weights = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match="optimizer is a SGD, need timm's Lamb or torch's AdamW"):
        TensorStep(torch.optim.SGD(weights))
    with pytest.raises(ValueError, match="optimizer has amsgrad=True, need False"):
        TensorStep(torch.optim.AdamW(weights, amsgrad=True))
    with pytest.raises(ValueError, match=r"optimizer has max_grad_norm=1\.0, need None"):
        TensorStep(Lamb(weights))
