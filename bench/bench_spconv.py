"""3x3 convolutions against spconv's CPU build, forward + backward, one thread on both sides.

Optional: `pip install spconv` (2.3.8 has a CPU build for Linux). Its backward pass asks torch for a CUDA stream that it
does not use on a CPU: without a GPU `bench.spconv_cpu` hands it a stand-in. spconv's strided convolution dilates the
active set: it computes more outputs than ours and is compared at those that both have. It cannot use a rulebook again.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import Work, note, prove, time_in_turns, tolerance
from bench.layers import Layer, Problem

LAYERS = [
    *(Layer("resnet", side, c, c) for side, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    Layer("resnet", 8, 128, 128, stride=2),
]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layer", [pytest.param(layer, id=layer.name) for layer in LAYERS])
def test_spconv(benchmark, one_thread, layer: Layer) -> None:
    spconv_cpu = pytest.importorskip("bench.spconv_cpu", reason="spconv is not installed", exc_type=ImportError)
    problem = Problem(layer)
    ours = problem.sides()
    peer = spconv_cpu.Peer(problem)
    truth = ours["dense"].results("all")
    bound = tolerance(max(problem.terms(d) for d in ("forward", "grad_input", "grad_weight")))
    prove("sparse", ours["sparse"].results("all"), truth, bound)
    prove("spconv", peer.results(), truth, bound)
    runs = {"sparse": ours["sparse"].run("all"), "dense": ours["dense"].run("all")}
    runs["spconv with rulebook"] = lambda: peer.run(rulebook=True)
    if layer.stride == 1:
        runs["spconv"] = peer.run
    seconds = time_in_turns(runs)
    benchmark.pedantic(runs["sparse"], rounds=3, warmup_rounds=0)
    work = Work(3 * problem.work("forward").flops, 0)
    info = dict(problem.info(), kind="spconv", op="conv", direction="all", threads=1, spconv=spconv_cpu.VERSION)
    note(benchmark, seconds, None, work, **info)
