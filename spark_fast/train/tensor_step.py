"""The optimiser's step as arithmetic of tensors alone, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor
from torch.optim import AdamW

# What the arithmetic below assumes of the options of timm's and torch's optimisers.
OPTIONS: dict[type, dict[str, object]] = {
    Lamb: {
        "bias_correction": True,
        "grad_averaging": True,
        "max_grad_norm": None,
        "trust_clip": False,
        "always_adapt": False,
        "caution": False,
        "decoupled_decay": False,
    },
    AdamW: {"amsgrad": False, "maximize": False},
}


@dataclass(frozen=True)
class Part:
    """Parameters of one group and dtype that have taken as many steps, their moments, and the numbers of their next
    step: 0-dimensional, float64, where the parameters are."""

    group: dict[str, Any]
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: Tensor
    rate: Tensor
    decay: Tensor


class TensorStep:
    """`optimizer.step()` of timm's Lamb or torch's AdamW, the same to rounding, without a number of the host.

    timm's Lamb computes its bias corrections on the host. AdamW has a capturable form, whose weight decay is a number
    of the host all the same, and which takes no CPU tensors. Here the learning rate, the weight decay and the count of
    steps are tensors; the moments are the optimiser's own, and so is its state dict, which `count` keeps up to date.

        step.begin()              # once, when the parameters have gradients
        step.write_schedule()     # the groups' "lr" and "weight_decay", before each call
        step()                    # may be recorded, and replayed in place of calls
        step.count()              # after each call or replay

    Groups whose "decays" is False never decay; without weight decay Lamb leaves out the trust ratio, as timm's does.

    Raises:
        TypeError: the optimiser is another one.
        ValueError: it has an option that is not supported here.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if type(optimizer) not in OPTIONS:
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, need timm's Lamb or torch's AdamW")
        for group in optimizer.param_groups:
            for name, needed in OPTIONS[type(optimizer)].items():
                if group.get(name, needed) != needed:
                    raise ValueError(f"optimizer has {name}={group[name]!r}, need {needed!r} for a step of tensors")
        self.optimizer = optimizer
        self.parts: list[Part] = []

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that a call changes besides the parameters."""
        return [t for part in self.parts for t in (*part.averages, *part.squares, part.steps)]

    def begin(self) -> None:
        """Take over where the optimiser is, for the parameters that have a gradient now: these are updated.

        The learning rate is 0 until the schedule is written.
        """
        self.parts = []
        for group in self.optimizer.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[self._steps(group, parameter), parameter.dtype, parameter.device].append(parameter)
            for (steps, _, device), parameters in alike.items():
                numbers = [torch.full((), value, dtype=torch.float64, device=device) for value in (steps, 0.0, 0.0)]
                moments = [[self._moment(p, name) for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
                self.parts.append(Part(group, parameters, *moments, *numbers))

    def _steps(self, group: dict[str, Any], parameter: Tensor) -> float:
        """How often the parameter was updated: timm's Lamb counts for each group, AdamW for each parameter."""
        if isinstance(self.optimizer, Lamb):
            return float(group.setdefault("step", torch.tensor(0.0)))
        return float(self.optimizer.state[parameter].setdefault("step", torch.tensor(0.0)))

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        state = self.optimizer.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]

    def write_schedule(self) -> None:
        """Write learning rate and weight decay of the optimiser's groups into the tensors of the step."""
        for part in self.parts:
            part.rate.fill_(part.group["lr"])
            part.decay.fill_(part.group["weight_decay"])

    def count(self) -> None:
        """Count a step in the optimiser's state."""
        if isinstance(self.optimizer, Lamb):
            for group in self.optimizer.param_groups:
                group["step"] = group.get("step", torch.tensor(0.0)) + 1
        else:
            torch._foreach_add_([self.optimizer.state[p]["step"] for part in self.parts for p in part.parameters], 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """Update the parameters from their gradients."""
        for part in self.parts:
            updates = _adam_direction(part)
            if isinstance(self.optimizer, Lamb):
                _apply_lamb(part, updates)
            else:
                _apply_adamw(part, updates)


def _adam_direction(part: Part) -> list[Tensor]:
    """Advances the moments; average of the gradients over the root of their mean square, both corrected for bias."""
    beta1, beta2 = part.group["betas"]
    gradients, dtype = [p.grad for p in part.parameters], part.parameters[0].dtype
    part.steps.add_(1)
    torch._foreach_lerp_(part.averages, gradients, 1 - beta1)
    torch._foreach_mul_(part.squares, beta2)
    torch._foreach_addcmul_(part.squares, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(part.squares)
    torch._foreach_div_(roots, (1 - beta2**part.steps).sqrt().to(dtype))
    torch._foreach_add_(roots, part.group["eps"])
    updates = torch._foreach_div(part.averages, roots)
    torch._foreach_div_(updates, (1 - beta1**part.steps).to(dtype))
    return list(updates)


def _apply_lamb(part: Part, updates: list[Tensor]) -> None:
    rate = -part.rate.to(updates[0].dtype)
    if part.group.get("decays", True):
        decay = part.decay.to(rate.dtype)
        torch._foreach_add_(updates, torch._foreach_mul(part.parameters, decay))
        sizes, lengths = (torch.stack(torch._foreach_norm(t)) for t in (part.parameters, updates))
        distrusted = (sizes == 0) | (lengths == 0) | (decay == 0)
        torch._foreach_mul_(updates, (sizes / lengths).masked_fill_(distrusted, 1.0).mul_(rate).unbind())
    else:
        torch._foreach_mul_(updates, rate)
    torch._foreach_add_(part.parameters, updates)


def _apply_adamw(part: Part, updates: list[Tensor]) -> None:
    dtype = updates[0].dtype
    if part.group.get("decays", True):
        torch._foreach_mul_(part.parameters, (1 - part.rate * part.decay).to(dtype))
    torch._foreach_mul_(updates, (-part.rate).to(dtype))
    torch._foreach_add_(part.parameters, updates)
