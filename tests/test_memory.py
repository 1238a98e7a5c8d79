"""What a step allocates and asks of the host: no dense map inside the encoder, no data-dependent shape, no sync."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from simulation import random_mask, stir
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spark_fast as sf

KWARGS = {
    "resnet26": {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)},
    "resnet18d": {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)},
}
NETS = list(KWARGS)
# 7x7 patches, 20 active: a dense map's size is a multiple of 49 and, with these channels, that of packed rows never is.
# Channels are multiples of 32, so that weights repacked in blocks keep their size.
GRID, KEEP, BATCH = (7, 7), 20, 2
SYNCS = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "equal", "bincount")
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Watch(TorchDispatchMode):
    """Notes every output of every operation, and every operation whose result shape or value the host must wait for."""

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[str, tuple[int, ...]]] = []
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.strip("_") in [s.strip("_") for s in SYNCS]:
            self.syncs.append(name)
        indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_", "_unsafe_index") else []
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices):
            self.syncs.append(f"{name} with a bool mask")
        if name == "repeat_interleave" and isinstance(tree_leaves(args)[-1], Tensor):
            self.syncs.append(f"{name} with a tensor of repeats")
        result = func(*args, **(kwargs or {}))
        # a view allocates nothing, and so does a result that is one of the arguments
        given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for out in tree_leaves(result):
            if isinstance(out, Tensor) and out.numel() and out.untyped_storage().data_ptr() not in given:
                self.outputs.append((name, tuple(out.shape)))
        return result


@contextmanager
def host_reads(notes: list[str]) -> Iterator[None]:
    """Notes the Tensor methods that hand values to Python (some of them dispatch nothing on a CPU tensor)."""
    original = {name: getattr(Tensor, name) for name in HOST_METHODS}

    def noting(name: str) -> Callable:
        def method(self, *args, **kwargs):
            notes.append(name)
            return original[name](self, *args, **kwargs)

        return method

    try:
        for name in HOST_METHODS:
            setattr(Tensor, name, noting(name))
        yield
    finally:
        for name, method in original.items():
            setattr(Tensor, name, method)


def build(name: str) -> tuple[sf.SparK, Tensor, sf.ActivePatches]:
    torch.manual_seed(0)
    spark = stir(sf.SparK(name, 224, decoder_width=32, model_kwargs=KWARGS[name]))
    return spark, torch.randn(BATCH, 3, 224, 224), sf.ActivePatches(random_mask(BATCH, GRID, KEEP), per_image=KEEP)


def size(shape) -> int:
    return torch.Size(shape).numel()


def leaf_calls(model: nn.Module, run: Callable[[], object]) -> list[tuple[str, nn.Module, tuple, object]]:
    """(name, leaf module, its arguments, its result) of every call during `run`."""
    calls = []
    hooks = [
        layer.register_forward_hook(lambda m, args, out, name=name: calls.append((name, m, args, out)))
        for name, layer in model.named_modules()
        if not list(layer.children())
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def features(x: object) -> Tensor:
    return x.features if isinstance(x, sf.SparseTensor) else x


def too_large(layer: nn.Module, args: tuple, out: object) -> list[tuple[str, tuple[int, ...]]]:
    """Allocations of one layer, forward and backward, that are as large as a dense map at its input or output."""
    dense = max(size(t.shape) for t in (*args, out) if isinstance(t, Tensor | sf.SparseTensor))
    weights = {p.numel() for p in layer.parameters()}
    given = args[0]
    leaf = features(given).detach().clone().requires_grad_()
    rows = leaf.clone()  # some layers work in place, which a leaf forbids
    x = given.with_features(rows) if isinstance(given, sf.SparseTensor) else rows
    with Watch() as watch:
        y = features(layer(x))
        y.backward(torch.ones_like(y))
    return [(op, shape) for op, shape in watch.outputs if size(shape) >= dense and size(shape) not in weights]


@pytest.mark.parametrize("name", NETS)
def test_no_layer_allocates_a_dense_map(name):
    spark, images, patches = build(name)
    x = sf.SparseTensor.from_dense(images, patches)
    calls = leaf_calls(spark.encoder, lambda: spark.encoder(x))
    assert len(calls) > 20
    assert all(isinstance(out, sf.SparseTensor) for *_, out in calls)
    excess = {key: found for key, layer, args, out in calls if (found := too_large(layer, args, out))}
    assert not excess


def test_a_dense_layer_is_noticed():
    backbone = timm.create_model("resnet26", num_classes=0, **KWARGS["resnet26"])
    calls = leaf_calls(backbone, lambda: backbone.forward_features(torch.randn(BATCH, 3, 224, 224)))
    convolutions = [c for c in calls if isinstance(c[1], nn.Conv2d)]
    assert convolutions and all(too_large(layer, args, out) for _, layer, args, out in convolutions)


def dense_sizes(calls: list) -> set[int]:
    """Numbers of elements of the dense maps at every layer's input and output."""
    return {size(t.shape) for *_, args, out in calls for t in (*args, out) if isinstance(t, Tensor | sf.SparseTensor)}


@pytest.mark.parametrize("name", NETS)
def test_the_encoder_never_holds_a_dense_map(name):
    """The whole encoder, the operations between its layers included, forward and backward."""
    spark, images, patches = build(name)
    x = sf.SparseTensor.from_dense(images, patches)
    calls = leaf_calls(spark.encoder, lambda: spark.encoder(x))
    maps, rows = dense_sizes(calls), {features(t).numel() for *_, args, out in calls for t in (*args, out)}
    weights = {p.numel() for p in spark.parameters()}
    assert not maps & rows and not maps & weights  # so that a size tells what it is
    with Watch() as watch:
        sum(t.features.square().sum() for t in spark.encoder(x)).backward()
    assert {shape for _, shape in watch.outputs if size(shape) in maps} == set()
    largest = max(watch.outputs, key=lambda o: size(o[1]))
    assert size(largest[1]) <= max(rows | weights), largest


def test_a_dense_encoder_is_noticed():
    backbone = timm.create_model("resnet26", num_classes=0, **KWARGS["resnet26"])
    images = torch.randn(BATCH, 3, 224, 224)
    maps = dense_sizes(leaf_calls(backbone, lambda: backbone.forward_features(images)))
    with Watch() as watch:
        backbone.forward_features(images).sum().backward()
    assert {size(shape) for _, shape in watch.outputs} & maps


@pytest.mark.parametrize("name", NETS)
def test_no_sync_and_no_data_dependent_shape(name):
    """With a mask that SparK draws itself, a step can be recorded: every shape is known beforehand."""
    spark, images, _ = build(name)
    spark(images).backward()  # tables that are made once may be made here
    notes = []
    with Watch() as watch, host_reads(notes):
        spark(images).backward()
    assert watch.outputs
    assert watch.syncs == [] and notes == []


def test_a_sync_is_noticed():
    x, notes = torch.randn(4), []
    with Watch() as watch, host_reads(notes):
        x[x > 0], x.nonzero(), float(x[0]), x.tolist(), bool((x > 0).all())
    assert {"nonzero", "_local_scalar_dense", "index with a bool mask"} <= set(watch.syncs)
    assert {"tolist", "__float__", "__bool__"} <= set(notes)
