"""Layers and operations on SparseTensors: normalisation, ranks, pointwise ones, and those without a sparse rule."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from simulation import Mask, batch_norm, gap, layer_norm, stir
from torch import Tensor, nn

import spark_fast as sf

# unequal counts and an image without any active patch
ACTIVE = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]).bool()
SIDE, CHANNELS = 4, 6


def scene(dtype=torch.float64, active: Tensor = ACTIVE) -> tuple[Tensor, sf.SparseTensor, Mask]:
    """Zero-filled dense maps, the same as a SparseTensor, and the mask."""
    torch.manual_seed(0)
    b, gh, gw = active.shape
    dense = Mask(active).apply(torch.randn(b, CHANNELS, gh * SIDE, gw * SIDE, dtype=dtype))
    return dense, sf.SparseTensor.from_dense(dense, sf.ActivePatches(active)), Mask(active)


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (sf.nn.SparseConv2d, nn.Conv2d, {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "groups": 2}),
        (sf.nn.SparseConv2d, nn.Conv2d, {"in_channels": 6, "out_channels": 4, "kernel_size": 1, "bias": False}),
        (sf.nn.SparseMaxPool2d, nn.MaxPool2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (sf.nn.SparseAvgPool2d, nn.AvgPool2d, {"kernel_size": 3, "count_include_pad": False, "padding": 1}),
        (sf.nn.SparseBatchNorm2d, nn.BatchNorm2d, {"num_features": 6, "momentum": None}),
        (sf.nn.SparseLayerNorm, nn.LayerNorm, {"normalized_shape": 12, "eps": 1e-3}),
    ],
)
def test_layers_on_plain_tensors(ours, theirs, arguments):
    torch.manual_seed(0)
    layer, x = theirs(**arguments), torch.randn(2, 6, 8, 12)
    twin = ours(**arguments)
    assert isinstance(twin, theirs) and list(twin.state_dict()) == list(layer.state_dict())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert isinstance(twin(x), Tensor)


BATCH_NORMS = [
    {}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False}, {"track_running_stats": False},
    {"affine": False, "track_running_stats": False}, {"momentum": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("options", BATCH_NORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, sf.nn.SparseBatchNorm2d])
def test_batch_norm(options, training, kind):
    """Two steps, so that the cumulative average of momentum=None counts."""
    layer = stir(kind(CHANNELS, **options)).double().train(training)
    oracle = stir(nn.BatchNorm2d(CHANNELS, **options)).double().train(training)
    dense, sparse, mask = scene()
    for factor in (1.0, 3.0):
        x, y = (factor * dense).requires_grad_(), sparse.with_features((factor * sparse.features).requires_grad_())
        truth = batch_norm(oracle, x, mask.at(*x.shape[2:], x.dtype))
        out = layer(y)
        assert gap(out.to_dense(), truth) < 1e-11
        upstream = torch.randn_like(truth)
        wanted = torch.autograd.grad((truth * upstream).sum(), [x, *oracle.parameters()])
        found = torch.autograd.grad((out.to_dense() * upstream).sum(), [y.features, *layer.parameters()])
        assert gap(sparse.with_features(found[0]).to_dense(), mask.apply(wanted[0])) < 1e-10
        assert all(gap(a, b, 1e-6) < 1e-10 for a, b in zip(found[1:], wanted[1:], strict=True))
    mine, theirs = layer.state_dict(), oracle.state_dict()
    assert list(mine) == list(theirs) and all(gap(v, theirs[k]) < 1e-12 for k, v in mine.items())


def test_batch_norm_needs_two_active_pixels():
    active = torch.zeros(2, 1, 2, dtype=torch.bool)
    active[0, 0, 0] = True
    x = sf.SparseTensor.from_dense(torch.randn(2, 3, 1, 2), sf.ActivePatches(active))
    with pytest.raises(ValueError, match="active"):
        nn.BatchNorm2d(3)(x)
    assert nn.BatchNorm2d(3).eval()(x).shape == (2, 3, 1, 2)


def test_batch_norm_as_an_ordinary_formula():
    """The oracle itself: with every pixel active it is torch's own layer."""
    layer = stir(nn.BatchNorm2d(CHANNELS)).double()
    oracle, x = copy.deepcopy(layer), torch.randn(3, CHANNELS, 4, 4).double()
    assert gap(batch_norm(oracle, x, torch.ones(3, 1, 4, 4).double()), layer(x)) < 1e-13
    assert all(gap(v, oracle.state_dict()[k]) < 1e-13 for k, v in layer.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.LayerNorm, sf.nn.SparseLayerNorm])
@pytest.mark.parametrize("layout", ["channels last", "LayerNorm2d"])
def test_layer_norm(affine, kind, layout):
    dense, sparse, mask = scene()
    if layout == "LayerNorm2d":
        layer = stir(timm.layers.LayerNorm2d(CHANNELS, eps=1e-4, affine=affine)).double()
        if kind is sf.nn.SparseLayerNorm:
            layer = sf.to_sparse(layer)
        out = layer(sparse)
    else:
        layer = stir(kind(CHANNELS, eps=1e-4, elementwise_affine=affine)).double()
        out = layer(sparse.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    one, zero = torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double()
    weight, bias = (layer.weight, layer.bias) if affine else (one, zero)
    truth = layer_norm(dense, weight, bias, 1e-4, mask.at(*dense.shape[2:], dense.dtype))
    assert gap(out.to_dense(), truth) < 1e-12


def test_layer_norm_over_pixels_is_refused():
    _, sparse, _ = scene()
    with pytest.raises((ValueError, NotImplementedError)):
        F.layer_norm(sparse, list(sparse.shape[1:]))
    with pytest.raises((ValueError, NotImplementedError)):
        F.layer_norm(sparse, [sparse.shape[-1]])


def joint_case() -> tuple[Tensor, Tensor, Tensor]:
    """Four images with 1, 4, 0 and 3 active patches of 6: the two ranks see 5 and 3."""
    torch.manual_seed(1)
    active = torch.zeros(4, 6, dtype=torch.bool)
    for i, count in enumerate((1, 4, 0, 3)):
        active[i, torch.randperm(6)[:count]] = True
    shape = (4, CHANNELS, 2 * SIDE, 3 * SIDE)
    return active.view(4, 2, 3), torch.randn(shape).double(), torch.randn(shape).double()


def rank_step(layer: nn.Module, part: slice) -> dict[str, Tensor]:
    """Two training steps on some images of the joint case; the loss is a sum over images, so gradients add up."""
    active, images, upstream = joint_case()
    x = images[part].clone().requires_grad_()
    for _ in range(2):
        out = layer(sf.SparseTensor.from_dense(x, sf.ActivePatches(active[part]))).to_dense()
        layer.zero_grad(), setattr(x, "grad", None)
        (out * upstream[part]).sum().backward()
    grads = {f"grad of {n}": p.grad for n, p in layer.named_parameters()}
    return {"out": out.detach(), "grad of x": x.grad, **grads, **dict(layer.named_buffers())}


def worker(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layer: nn.Module = stir(nn.BatchNorm2d(CHANNELS)).double()
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    layer = sf.to_sparse(layer)
    assert type(layer[0]) is sf.nn.SparseSyncBatchNorm
    torch.save(rank_step(layer[0], slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_sync_batch_norm_equals_one_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    try:
        assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    truth = rank_step(stir(nn.BatchNorm2d(CHANNELS)).double(), slice(0, 4))
    for name in ("out", "grad of x"):
        assert gap(torch.cat([p[name] for p in parts]), truth[name]) < 1e-11
    for name in ("grad of weight", "grad of bias"):  # each rank has its share; DDP sums (averages) them
        assert gap(parts[0][name] + parts[1][name], truth[name]) < 1e-11
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(parts[0][name], parts[1][name]) and gap(parts[0][name], truth[name]) < 1e-12


def test_sync_batch_norm_in_one_process():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(stir(nn.BatchNorm2d(CHANNELS)).double()))
    truth = rank_step(stir(nn.BatchNorm2d(CHANNELS)).double(), slice(0, 4))
    found = rank_step(sf.to_sparse(layer)[0], slice(0, 4))
    assert all(gap(v, truth[k]) < 1e-11 for k, v in found.items())


# Local ones: if they return at all, the result is the dense operation's on the zero-filled maps, masked again.
LOCAL = {
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(CHANNELS, 2, 2, 2).double(), stride=2),
    "upsample bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "upsample nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x], 1)[:, :4], 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, 2),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "softmax over channels": lambda x: F.softmax(x, 1),
    "cumsum over channels": lambda x: torch.cumsum(x, 1),
    "sort over channels": lambda x: torch.sort(x, 1)[0],
    "norm over channels": lambda x: F.normalize(x, dim=1),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 3),
    "channel mean": lambda x: x.mean(1, keepdim=True),
    "cos": torch.cos,  # f(0) is not 0
    "where": lambda x: torch.where(x > 0, x, -x),
}

# These must work: they are what convolutional networks are made of.
POINTWISE = {
    "scalar": lambda x: 2 * x + 1 - x / 3,
    "reversed": lambda x: 1 - (2 / (x.abs() + 1)),
    "power": lambda x: x**2,
    "two maps": lambda x: x * x + x.sigmoid(),
    "in place": lambda x: x.clone().mul_(2).add_(1).relu_(),
    "augmented": lambda x: augmented(x.clone()),
    "per channel": lambda x: x * vector(CHANNELS, 1, 1) + vector(1, CHANNELS, 1, 1),
    "per image": lambda x: x / (2 + vector(3, 1, 1, 1).abs()),  # drop path
    "per image and channel": lambda x: x * vector(3, CHANNELS, 1, 1).sigmoid(),  # squeeze-and-excite
    "reversed broadcast": lambda x: vector(3, CHANNELS, 1, 1) * x,
    "activations": lambda x: F.hardswish(F.gelu(F.silu(F.leaky_relu(F.elu(x), 0.1)))),
    "prelu": lambda x: F.prelu(x, vector(CHANNELS)),
    "clamp": lambda x: torch.clamp(x, -0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, -x),
    "cat": lambda x: torch.cat([x, 2 * x, x], 1),
    "slice": lambda x: x[:, 1:4],
    "chunk": lambda x: torch.chunk(x, 2, 1)[1],
    "split": lambda x: torch.split(x, [2, 4], 1)[1],
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), vector(4, CHANNELS), vector(4)).permute(0, 3, 1, 2),
    "last: per channel": lambda x: (x.permute(0, 2, 3, 1) * vector(CHANNELS) + vector(CHANNELS)).permute(0, 3, 1, 2),
    "last: per image": lambda x: (x.permute(0, 2, 3, 1) * vector(3, 1, 1, CHANNELS)).permute(0, 3, 1, 2),
    "layouts": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).contiguous().to(torch.float64),
}

# Tensors that line up with pixels, or with nothing: exact or refused.
AWKWARD = {
    "per pixel": lambda x: x * vector(1, 1, 8, 12),
    "per row": lambda x: x + vector(8, 1),
    "per column": lambda x: x + vector(12),
    "dense map": lambda x: x + vector(3, CHANNELS, 8, 12),
    "dense map first": lambda x: vector(3, CHANNELS, 8, 12) - x,
    "one pixel wide": lambda x: x * vector(3, 1, 8, 12),
    "last: per pixel": lambda x: (x.permute(0, 2, 3, 1) * vector(8, 12, 1)).permute(0, 3, 1, 2),
    "last and first": lambda x: x + x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "cat with dense": lambda x: torch.cat([x, vector(3, 1, 8, 12)], 1),
    "stack": lambda x: torch.stack([x, x], 1).sum(1),
    "glu": lambda x: F.glu(x, 1),
}


def vector(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def augmented(x):
    x += 1
    x *= 3
    x -= x * 0.5
    x /= 2
    return x


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_operations(name):
    dense, sparse, mask = scene()
    before = sparse.features.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here goes through the dense form
        out = POINTWISE[name](sparse)
    truth = mask.apply(POINTWISE[name](dense))
    assert isinstance(out, sf.SparseTensor) and out.shape == truth.shape
    assert gap(out.to_dense(), truth) < 1e-13
    assert torch.equal(sparse.features, before)


def test_dropout_of_channels_is_per_image():
    active = torch.ones(3, 2, 3, dtype=torch.bool)
    sparse = sf.SparseTensor.from_dense(torch.ones(3, CHANNELS, 8, 12), sf.ActivePatches(active))
    try:
        out = F.dropout2d(sparse, 0.5, training=True)
    except sf.SparseOpError:
        return
    maps = out.to_dense().flatten(2)
    assert torch.equal(maps.amin(2), maps.amax(2)) and set(maps.unique().tolist()) == {0.0, 2.0}


# Global ones: a result over a zero-filled map would be wrong. They are refused, or mean the active pixels.
GLOBAL = {
    "fft2": lambda x: torch.fft.fft2(x),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "view": lambda x: x.view(x.shape[0], CHANNELS, -1),
    "sort over rows": lambda x: torch.sort(x, 2)[0],
    "softmax over columns": lambda x: F.softmax(x, -1),
    "cumsum over rows": lambda x: torch.cumsum(x, 2),
    "flip": lambda x: torch.flip(x, [3]),
    "roll": lambda x: torch.roll(x, 1, 2),
    "matmul": lambda x: x @ torch.ones(x.shape[3], 2).double(),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "var": lambda x: x.var(),
    "median": lambda x: x.median(),
    "argmax": lambda x: x.argmax(),
    "convolution of the transpose": lambda x: F.conv2d(x.transpose(2, 3), torch.ones(1, CHANNELS, 1, 1).double()),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(3, 2, 2, 2).double(), align_corners=False),
    "numpy": lambda x: x.numpy(),
    "row index": lambda x: x[:, :, 1],
}


@pytest.mark.parametrize("name", [*LOCAL, *AWKWARD])
def test_a_local_operation_is_exact_or_refused(name):
    dense, sparse, mask = scene()
    call = {**LOCAL, **AWKWARD}[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call(sparse)
    except (sf.SparseOpError, ValueError, TypeError) as error:
        assert len(str(error)) > 20
        return
    assert isinstance(out, sf.SparseTensor)
    assert gap(out.to_dense(), mask.apply(call(dense))) < 1e-12


@pytest.mark.parametrize("name", GLOBAL)
def test_a_global_operation_is_refused(name):
    _, sparse, _ = scene()
    with pytest.raises((sf.SparseOpError, ValueError, TypeError, AttributeError)) as caught:
        GLOBAL[name](sparse)
    assert len(str(caught.value)) > 20


def per_image(function) -> Tensor:
    """`function` of each image's active pixels (C, n), stacked; NaN for an image without any."""
    dense, _, mask = scene()
    seen = mask.at(*dense.shape[2:], torch.float64).bool()[:, 0]
    rows = [dense[i][:, seen[i]] for i in range(len(dense))]
    return torch.stack([function(r) if r.numel() else torch.full((CHANNELS,), float("nan")).double() for r in rows])


@pytest.mark.parametrize(
    ("call", "formula"),
    [
        (lambda x: x.mean((2, 3)), lambda r: r.mean(1)),
        (lambda x: x.mean((2, 3), keepdim=True).flatten(1), lambda r: r.mean(1)),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda r: r.mean(1)),
        (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), lambda r: r.mean(1)),
        (lambda x: x.amax((2, 3)), lambda r: r.amax(1)),
        (lambda x: F.adaptive_max_pool2d(x, 1).flatten(1), lambda r: r.amax(1)),
    ],
    ids=["mean", "mean keepdim", "adaptive_avg_pool2d", "channels last", "amax", "adaptive_max_pool2d"],
)
def test_reductions_over_pixels_mean_the_active_ones(request, call, formula):
    """Per image; what an image without active pixels gives is not asked here."""
    _, sparse, _ = scene()
    try:
        out = call(sparse)
    except sf.SparseOpError:  # averages must work: squeeze-and-excite is made of them
        assert request.node.callspec.id.startswith(("amax", "adaptive_max"))
        return
    truth = per_image(formula)
    rows = ~truth.isnan().any(1)
    assert rows.sum() == 2 and gap(out[rows], truth[rows]) < 1e-12


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, CHANNELS), nn.GroupNorm(2, CHANNELS), nn.InstanceNorm2d(CHANNELS)])
def test_norms_of_an_image_mean_its_active_pixels(layer):
    dense, sparse, mask = scene()
    layer = stir(layer).double()
    try:
        out = layer(sparse)
    except (sf.SparseOpError, ValueError, TypeError):
        return
    seen = mask.at(*dense.shape[2:], dense.dtype).bool()[:, 0]
    result = out.to_dense()
    for i in (0, 2):
        rows = dense[i][:, seen[i]]
        assert gap(result[i][:, seen[i]], layer(rows[None, :, None])[0, :, 0]) < 1e-10


@pytest.mark.parametrize("call", [lambda x: x.mean(), lambda x: x.sum(), lambda x: x.std(), lambda x: x.norm()])
def test_a_whole_batch_statistic_is_over_active_pixels_or_refused(call):
    _, sparse, _ = scene()
    try:
        out = call(sparse)
    except (sf.SparseOpError, ValueError, TypeError, AttributeError):
        return
    assert gap(out, call(sparse.features)) < 1e-12


def test_mixing_masks_is_refused():
    """Rows of two masks do not belong together, even where there are as many of them."""
    _, sparse, _ = scene()
    other = sf.SparseTensor.from_dense(torch.randn(3, CHANNELS, 8, 12).double(), sf.ActivePatches(ACTIVE.flip(2)))
    for call in (lambda: sparse + other, lambda: torch.cat([sparse, other], 1), lambda: sparse * other):
        with pytest.raises((sf.SparseOpError, ValueError)):
            call()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))


CROPS = {
    "convolution": lambda x: F.conv2d(F.pad(x, (1, -1, 1, -1)), torch.ones(2, CHANNELS, 3, 3).double(), padding=1),
    "max pooling": lambda x: F.max_pool2d(F.pad(x, (1, -1, 1, -1), value=-torch.inf), 3, 1, 1),
    "average pooling": lambda x: F.avg_pool2d(F.pad(x, (1, -1, 1, -1)), 3, 1, 1),
}


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize("name", CROPS)
def test_what_is_cropped_is_not_read_by_a_windows_own_padding(name):
    dense, sparse, _ = scene()
    out, expected = CROPS[name](sparse), CROPS[name](dense)
    shown = out.patches.active[:, None].repeat_interleave(out.side, 2).repeat_interleave(out.side, 3)
    torch.testing.assert_close(out.to_dense(), torch.where(shown, expected, 0))


def test_padding_is_a_copy_or_refused():
    _, sparse, _ = scene()
    padded = F.pad(sparse, (1, 1, 1, 1))
    sparse.relu_()
    with pytest.raises(sf.SparseOpError, match="changed in place after it was padded"):
        F.max_pool2d(padded, 3)
    with pytest.raises(sf.SparseOpError, match="a crop that is padded again"):
        F.pad(F.pad(sparse, (-1, -1, -1, -1)), (2, 2, 2, 2))


def test_every_other_pixel_of_some_images_is_refused():
    _, sparse, _ = scene()
    with pytest.raises(sf.SparseOpError, match="B by slice"):
        sparse[:1, :, ::2, ::2]


def test_tokens_become_a_map_whatever_sizes_coincide():
    active = torch.tensor([[[True, False], [False, True]]])  # two pixels of 2x2, so that K = W
    x = sf.SparseTensor.from_dense(torch.randn(1, 4, 2, 2), sf.ActivePatches(active))
    y = (2 * x.flatten(2)).view(1, -1, 2, 2)
    assert isinstance(y, sf.SparseTensor)
    torch.testing.assert_close(y.features, 2 * x.features)
