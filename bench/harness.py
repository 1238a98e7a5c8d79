"""One case: prove every side's result, time the sides in turns, note medians, rates and the share of the floor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.ceilings import Ceilings
from bench.settings import LEAST_ROUNDS, MOST_ROUNDS, NET_ROUNDS, SAMPLE, SECONDS, TINY
from spark_fast.evaluate.speed import alternate

WANTED = {"grad_input": (0,), "grad_weight": (1,)}  # inputs whose gradients a direction asks for; others: all
MAPS = {"forward": 1, "grad_input": 1, "backward": 1, "all": 2}  # leading results of a direction that are maps

EXACT, NEAR = 1e-8, 2e-2


class WrongResultError(AssertionError):
    """A side computes something else, so that its time means nothing."""


@dataclass(frozen=True)
class Work:
    """What a case must do at least: useful floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass
class Side:
    """One way to compute an op.

    Attributes:
        call: the op, of `inputs`.
        grad: gradient of its output.
        rows: a map (output, or gradient of the first input) as packed rows, for the comparison.
        own: directions that this side computes by other means than autograd, by name.
    """

    call: Callable[..., torch.Tensor]
    inputs: Sequence[torch.Tensor]
    grad: torch.Tensor
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda map_: map_
    own: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def run(self, direction: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What is timed; the forward pass that a gradient needs runs here, once."""
        if direction in self.own:
            return lambda: (self.own[direction](),)
        wanted = WANTED.get(direction, range(len(self.inputs)))
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(self.inputs)]
        if direction == "forward":
            return lambda: (self.call(*inputs),)
        if direction == "all":
            return lambda: (output := self.call(*inputs), *torch.autograd.grad(output, inputs, self.grad))
        output, leaves = self.call(*inputs), [inputs[i] for i in wanted]
        return lambda: torch.autograd.grad(output, leaves, self.grad, retain_graph=True)

    def results(self, direction: str) -> list[torch.Tensor]:
        """The same for every side: rows and flat parameters' gradients, float64."""
        found = [t.detach() for t in self.run(direction)()]
        maps = MAPS.get(direction, 0)
        return [(self.rows(t) if i < maps else t).double().flatten() for i, t in enumerate(found)]


def tolerance(terms: float) -> float:
    """Relative distance (Frobenius) that rounding explains: float32 sums of `terms` products walk sqrt(terms) roundings
    away from the true value; 4 allows for two sides and for constants."""
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(max(terms, 16))


def prove(name: str, ours: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], bound: float) -> None:
    """WrongResultError unless all tensors agree within `bound`."""
    for mine, true in zip(ours, truth, strict=True):
        gap = float((mine - true).norm() / true.norm().clamp(min=1e-30))
        if not gap <= bound:
            raise WrongResultError(f"{name} is {gap:.2g} away from the truth, more than rounding ({bound:.2g})")


def prove_with_kinks(
    name: str, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> None:
    """For networks with ReLU6: its gradient jumps where rounding moves an input across the kink, and by chance a few
    jumps shift all gradients by some 1e-3, on either side. So `exact`, ours in float64, must be equal to the `truth` in
    float64, and `ours` in float32 must be near it; a tap left out would be farther."""
    prove(f"{name} in float64", exact, truth, EXACT)
    prove(name, ours, truth, NEAR)


def run_case(
    benchmark,
    ceilings: Ceilings,
    direction: str,
    sides: Mapping[str, Side],
    work: Work,
    terms: float,
    truth: Side | None = None,
    **info,
) -> None:
    """Proves and times `sides`: "sparse", "dense" or several "dense ..." of which the fastest counts, and others.

    Args:
        truth: what all must agree with; by default the first dense side. Given, dense sides are not compared with it.
        terms: products in the longest sum, for the tolerance.
    """
    reference = truth or next(side for name, side in sides.items() if name.startswith("dense"))
    expected = reference.results(direction)
    for name, side in sides.items():
        if truth is None or not name.startswith("dense"):
            prove(name, side.results(direction), expected, tolerance(terms))
    runs = {name: side.run(direction) for name, side in sides.items()}
    seconds = time_in_turns(runs)
    benchmark.pedantic(runs["sparse"], rounds=1 if TINY else 3, warmup_rounds=0)
    note(benchmark, seconds, ceilings, work, direction=direction, **info)


def time_in_turns(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each run; short ones are repeated within a sample."""
    repeats, total = {}, 0.0
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        repeats[name] = 1 if TINY else max(1, min(50, math.ceil(SAMPLE / once)))
        total += once * repeats[name]
    slow = total > 1  # second; two runs of each have warmed it up
    rounds = 1 if TINY else NET_ROUNDS if slow else max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / total)))
    repeated = {name: _repeat(run, repeats[name]) for name, run in runs.items()}
    times = alternate(repeated, rounds, warmup=0 if slow else 1)
    return {name: statistics.median(series) / repeats[name] for name, series in times.items()}


def _repeat(run: Callable[[], object], count: int) -> Callable[[], None]:
    def all_of_them() -> None:
        for _ in range(count):
            run()

    return all_of_them


def note(benchmark, seconds: Mapping[str, float], ceilings: Ceilings | None, work: Work | None, **info) -> None:
    """Writes medians (ms), gains of sparse over each other side, rates and the share of the floor to extra_info."""
    dense = {name: s for name, s in seconds.items() if name.startswith("dense")}
    best = min(dense, key=dense.get)
    sides = {"sparse": seconds["sparse"], "dense": dense[best]}
    sides |= {name: s for name, s in seconds.items() if name not in dense and name != "sparse"}
    info["ms"] = {name: significant(1000 * s) for name, s in sides.items()}
    info["ratio"] = {name: round(s / sides["sparse"], 3) for name, s in sides.items() if name != "sparse"}
    if len(dense) > 1:
        info["dense_form"] = best.removeprefix("dense ")
        info["dense_forms_ms"] = {n.removeprefix("dense "): significant(1000 * s) for n, s in dense.items()}
    if work is not None and ceilings is not None:
        if work.flops:
            info["gflops"] = significant(work.flops / sides["sparse"] / 1e9)
        if work.bytes:
            info["gbs"] = significant(work.bytes / sides["sparse"] / 1e9)
        info["of_floor"] = round(ceilings.floor(work.flops, work.bytes) / sides["sparse"], 3)
    benchmark.extra_info.update(dtype="float32", **info)


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to some significant digits."""
    return float(f"{value:.{digits}g}")
