"""torch.compile of modules that run on SparseTensors and of the whole step: one graph, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from simulation import stir
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import spark_fast as sf

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Three maps, by a depthwise, a grouped, a strided and a plain convolution, a pooling, two norms and a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GELU(), nn.Conv2d(16, 16, 1))
        self.middle = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 32, 3, padding=1, groups=2))
        self.norm = nn.LayerNorm(32)
        self.last = nn.Conv2d(32, 64, 3, 2, 1)

    def forward(self, x):
        a = self.stem(x)
        a = a + self.block(a)
        b = self.norm(self.middle(a).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [a, b, self.last(b)]


def assert_same_grads(module: nn.Module, other: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for (name, b), c in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(c, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", [lambda: Bottleneck(32, 8), lambda: ConvNeXtBlock(32)], ids=["resnet", "convnext"])
def test_blocks_are_one_graph_whatever_the_mask(make):
    block = stir(make()).double().train()
    other = copy.deepcopy(block)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, backend=graphs, fullgraph=True)
    for seed in range(3):
        mask = sf.random_patch_mask(2, (3, 4), 0.6, torch.Generator().manual_seed(seed))
        patches = sf.ActivePatches(mask, per_image=5)
        rows = torch.randn(patches.rows(4), 32, dtype=torch.float64)
        inputs = [sf.SparseTensor(rows.clone().requires_grad_(), patches, 4) for _ in "12"]
        outputs = [block(inputs[0]), compiled(inputs[1])]
        assert isinstance(outputs[1], sf.SparseTensor) and outputs[1].shape == outputs[0].shape
        torch.testing.assert_close(outputs[1].features, outputs[0].features, **EXACT)
        for y in outputs:
            y.features.square().sum().backward()
        torch.testing.assert_close(inputs[1].features.grad, inputs[0].features.grad, **EXACT)
        assert_same_grads(block, other, **EXACT)
    assert graphs.frame_count == 1


def compare_steps(model: sf.SparK, backend, tolerance: dict, masks: list, batches=(2, 2, 2), fullgraph=True) -> None:
    """Loss, gradients and statistics of steps, plain and compiled; a mask of None is drawn inside."""
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend=backend, fullgraph=fullgraph)
    for seed, (mask, batch) in enumerate(zip(masks, batches, strict=True)):
        images = torch.randn(batch, 3, *model.img_size, dtype=next(model.parameters()).dtype)
        losses = []
        for run in (model, compiled):
            run.zero_grad()
            torch.manual_seed(seed)
            losses.append(run(images, mask))
            losses[-1].backward()
        assert losses[0].item() > 0
        torch.testing.assert_close(losses[1], losses[0], **tolerance)
        assert_same_grads(model, other, **tolerance)


def test_the_whole_step_is_one_graph():
    model = stir(sf.SparK(Net(), img_size=(32, 48), mask_ratio=0.5, decoder_width=32)).double().train()
    graphs = CompileCounterWithBackend("aot_eager")
    compare_steps(model, graphs, EXACT, [None] * 3)
    assert graphs.frame_count == 1
    calls = [str(node.target) for graph in graphs.graphs for node in graph.graph.nodes if node.op == "call_function"]
    for op in (
        "conv_forward",
        "depthwise",
        "linear",
        "norm_batch_statistics",
        "norm_batch_apply",
        "norm_layer",
        "pool_max",
        "patch_loss",
    ):
        assert any(call.startswith(f"spark_fast.{op}") for call in calls), op


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["block", "grid", "mesh", torch.eye(2, 3) > 0], ids=["block", "grid", "mesh", "fixed"])
def test_masks_of_every_kind_are_drawn_in_the_graph(mask):
    model = stir(sf.SparK(Net(), img_size=(32, 48), mask_ratio=0.5, decoder_width=32, mask=mask)).double().train()
    graphs = CompileCounterWithBackend("eager")
    compare_steps(model, graphs, EXACT, [None] * 2, batches=(2, 2))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_ratios_drawn_per_image():
    """Patches are counted, as those of a given mask."""
    model = stir(sf.SparK(Net(), img_size=(32, 48), mask_ratio=(0.2, 0.8), decoder_width=32)).double().train()
    compare_steps(model, "aot_eager", EXACT, [None] * 2, batches=(2, 2), fullgraph=False)


@pytest.mark.slow
def test_a_given_mask_of_unequal_counts():
    """Its patches are counted, which breaks the graph; the rest is compiled."""
    model = stir(sf.SparK(Net(), img_size=(32, 48), mask_ratio=0.5, decoder_width=32)).double().train()
    masks = [torch.rand(2, *model.grid) < 0.6 for _ in range(3)]
    masks[1][0] = False  # an image of which nothing is seen
    masks[1][1, 0, 0] = True
    compare_steps(model, "aot_eager", EXACT, masks, fullgraph=False)


def test_a_few_graphs_when_the_batch_changes():
    model = stir(sf.SparK(Net(), img_size=32, mask_ratio=0.5, decoder_width=32)).double().train()
    graphs = CompileCounterWithBackend("aot_eager")
    compare_steps(model, graphs, EXACT, [None] * 5, batches=(2, 3, 4, 6, 5))
    symbolic = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # before, each size makes a graph
    assert graphs.frame_count <= (3 if symbolic else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_timm_networks_are_one_graph(name):
    model = stir(sf.SparK(name, img_size=64, mask_ratio=0.5, decoder_width=32)).double().eval()
    for parameter in model.parameters():  # timm's head is not used
        parameter.grad = torch.zeros_like(parameter)
    graphs = CompileCounterWithBackend("aot_eager")
    compare_steps(model, graphs, EXACT, [None] * 2, batches=(2, 2))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_inductor(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)  # else it draws other masks
    model = stir(sf.SparK(Net(), img_size=32, mask_ratio=0.5, decoder_width=32)).double().train()
    compare_steps(model, "inductor", EXACT, [None] * 2, batches=(2, 2))
