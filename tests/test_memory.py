"""What a step allocates and asks of the host: no dense map inside the encoder, no data-dependent shape, no sync."""

import contextlib
from collections.abc import Callable

import numpy
import pytest
import timm
import torch
from simulation import random_mask, stir
from torch import Tensor, nn
from watching import HostMade, Watch, host_reads, no_waiting

import spark_fast as sf
from spark_fast.ops.pool import avg_pool2d

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


@pytest.mark.parametrize("backend", [None, "library"])  # a GPU has PyTorch's own kernels or ours
@pytest.mark.parametrize("name", NETS)
def test_no_sync_and_no_data_dependent_shape(name, backend):
    """With a mask that SparK draws itself, a step can be recorded: every shape is known beforehand."""
    spark, images, _ = build(name)
    with sf.use_backend(backend) if backend else contextlib.nullcontext():
        spark(images).backward()  # tables that are made once may be made here
        with no_waiting():
            spark(images).backward()


def test_average_pooling_does_not_wait():
    """Its divisors differ at the border."""
    patches = sf.ActivePatches(random_mask(BATCH, GRID, KEEP), per_image=KEEP)
    rows = torch.randn(patches.rows(4), 5, requires_grad=True)
    with no_waiting():
        avg_pool2d(rows, patches, 4, 3, 2, 1, count_include_pad=False)[0].sum().backward()


def test_a_sync_is_noticed():
    x, notes = torch.randn(4), []
    with Watch() as watch, HostMade() as made, host_reads(notes):
        x[x > 0], x.nonzero(), float(x[0]), x.tolist(), bool((x > 0).all())
        torch.tensor([1, 2]), x.new_tensor([1.0]), torch.from_numpy(numpy.ones(2))
    assert {"nonzero", "_local_scalar_dense", "index with a bool mask"} <= set(watch.syncs)
    assert {"tolist", "__float__", "__bool__", "from_numpy"} <= set(notes)
    assert made.notes == ["tensor", "new_tensor"]


def test_patches_of_a_known_number_do_not_wait():
    """Nor does what is derived from tables, nor the complement of unequal counts."""
    active = torch.rand(BATCH, *GRID) < 0.5
    unequal = sf.ActivePatches(active)
    with no_waiting():
        sf.ActivePatches(random_mask(BATCH, GRID, KEEP), per_image=KEEP).complement()
        unequal.complement()
        again = sf.ActivePatches.from_tables(unequal.coords, unequal.grid_to_patch)
        assert again.count + again.complement().count == active.numel()
