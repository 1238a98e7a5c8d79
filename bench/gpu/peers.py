"""Section "peers": the 3x3 layers against spconv and spconv-triton, forward and both gradients, in half precision.

A peer finds its index pairs ("rulebook") in the forward pass; with and without that time. It runs in bfloat16 where it
can, else in float16. Calls are timed as Python makes them on both sides: a peer's call cannot be captured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

import spark_fast as sf
from bench.gpu import conv_ops
from bench.gpu.conv_ops import Problem
from bench.gpu.measure import HALF, capture, seconds
from bench.gpu.nets import distance
from bench.gpu.ops import patches_of
from bench.gpu.section import NotAvailableError, Section
from bench.harness import significant
from spark_fast.ops.conv import conv2d

PEERS = ("spconv.pytorch", "spconv_triton.pytorch")
FAR = 2e-2  # relative, Frobenius: half precision of both sides; a tap left out would be farther


def run(section: Section) -> None:
    patches = patches_of(section)
    for layer in conv_ops.RESNET:
        section.case(layer.name, lambda layer=layer: measure(Problem(layer, patches, section.tiny)))


def installed() -> tuple[dict[str, ModuleType], dict[str, str]]:
    found, absent = {}, {}
    for name in PEERS:
        try:
            found[name.split(".")[0]] = importlib.import_module(name)
        except ImportError as error:
            absent[name.split(".")[0]] = f"not installed ({error})"
    return found, absent


def measure(problem: Problem) -> dict:
    peers, notes = installed()
    if not peers:
        raise NotAvailableError("; ".join(f"{name}: {why}" for name, why in notes.items()))
    device = problem.x.device
    ours = sparse_pass(problem)
    truth, runs = ours(), {"sparse": ours}
    for name, module in peers.items():
        try:
            peer = Peer(module, problem)
            gap = distance([t.double() for t in peer.results()], [t.double() for t in truth])
            if gap > FAR:
                notes[name] = f"its results are {gap:.2g} away from ours: not timed"
                continue
            runs[f"{name} with rulebook"] = lambda peer=peer: peer.run(rulebook=True)
            runs[name] = peer.run
            notes[f"{name} dtype"] = str(peer.x.dtype).removeprefix("torch.")
        except Exception as error:  # a peer's own trouble is no failure of ours
            notes[name] = f"{type(error).__name__}: {error}"[:300]
    if len(runs) == 1:
        raise NotAvailableError("no peer runs: " + "; ".join(f"{name}: {why}" for name, why in notes.items()))
    replay = capture(ours, device)
    ms = {name: significant(1e3 * seconds(run, device)) for name, run in runs.items()}
    if replay is not None:
        ms["sparse, CUDA graph"] = significant(1e3 * seconds(replay, device))
    best = min(time for name, time in ms.items() if not name.startswith("sparse"))
    return {"ms": ms, "gains": {"peer": round(best / ms["sparse"], 3)}, "notes": notes}


def sparse_pass(problem: Problem) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Output and both gradients."""
    layer = problem.layer
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        out = conv2d(x, w, None, problem.patches, layer.side, layer.stride, layer.padding)[0]
        return (out.detach(), *torch.autograd.grad(out, (x, w), problem.grad))

    return run


class Peer:
    """A problem's convolution as a layer of spconv, or of a package that copies its interface."""

    def __init__(self, module: ModuleType, problem: Problem):
        self.module, self.problem, layer = module, problem, problem.layer
        self.conv = module.SubMConv2d(layer.channels, layer.out, layer.kernel, bias=False, indice_key="layer")
        self.coords = coordinates(problem.patches, layer.side)
        (gh, gw), side = problem.patches.grid, layer.side
        self.shape = [gh * side, gw * side]
        for dtype in (HALF, torch.float16):
            self._prepare(dtype)
            try:
                self.cached = self._forward(rulebook=True).indice_dict
                self.run()
                return
            except (RuntimeError, ValueError, TypeError, KeyError, AssertionError):
                if dtype is torch.float16:
                    raise

    def _prepare(self, dtype: torch.dtype) -> None:
        self.x = self.problem.x.to(dtype).requires_grad_()
        weight = self.problem.w.permute(0, 2, 3, 1).contiguous()  # (O, kh, kw, C)
        self.conv = self.conv.to(self.x.device, dtype)
        self.conv.weight.data = weight.to(dtype)
        self.grad = self.problem.grad.to(dtype)

    def _forward(self, rulebook: bool):
        tensor = self.module.SparseConvTensor(self.x, self.coords, self.shape, self.problem.patches.batch)
        if not rulebook:
            tensor.indice_dict = self.cached
        return self.conv(tensor)

    def run(self, rulebook: bool = False) -> tuple[torch.Tensor, ...]:
        """Without `rulebook`: with the index pairs of an earlier call."""
        output = self._forward(rulebook).features
        return (output.detach(), *torch.autograd.grad(output, (self.x, self.conv.weight), self.grad))

    def results(self) -> list[torch.Tensor]:
        """In the order of our weight: (O, C, kh, kw)."""
        output, grad_input, grad_weight = self.run(rulebook=True)
        return [output, grad_input, grad_weight.permute(0, 3, 1, 2)]


def coordinates(patches: sf.ActivePatches, side: int) -> torch.Tensor:
    """(image, y, x) of every row: int32 (P * side * side, 3)."""
    image, row, col = (i[:, None, None] for i in patches.index)
    inside = torch.arange(side, device=patches.device)
    shape = (patches.count, side, side)
    y, x = row * side + inside[:, None], col * side + inside
    return torch.stack([t.expand(shape).flatten() for t in (image, y, x)], 1).int()
