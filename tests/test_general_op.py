"""The general 2D submanifold case, any set of pixels: tensors, networks, nothing at all, errors, torch.compile. The
numbers of single ops are in ops/test_output_sets.py."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pixels import SHAPE, dense_of, points
from timm.models.resnet import BasicBlock
from torch import nn
from watching import no_waiting

import spark_fast as sf
from spark_fast.nn import functional as SF

GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "fast_mode": True}


def test_inverse_convolution_onto_patches():
    """The finer set may be a tensor of patches of several pixels, or bare patches of one."""
    x = sf.SparseTensor.from_dense(torch.randn(2, 3, 12, 8).double(), sf.ActivePatches(torch.rand(2, 3, 2) < 0.6))
    y = SF.conv2d(x, torch.randn(5, 3, 3, 3).double(), None, 2, 1, output="dilated")
    w = torch.randn(5, 4, 3, 3).double()
    z = SF.conv_transpose2d(y, w, None, 2, 1, output=x)
    expected = F.conv_transpose2d(y.to_dense(), w, None, 2, 1, 1)
    assert z.side == 4 and z.patches is x.patches
    torch.testing.assert_close(z.to_dense(), sf.SparseTensor.from_dense(expected, x.patches).to_dense())
    fine = x.to_pixels().patches
    torch.testing.assert_close(SF.conv_transpose2d(y, w, None, 2, 1, output=fine).to_dense(), z.to_dense())


def test_gradients_by_differences():
    coords = points(0.3, (2, 4, 5))

    def net(x, w, up, depth):
        x = sf.SparseTensor.from_coords(x, coords, (2, 4, 5))
        y = SF.conv2d(x, w, None, 2, 1, output="dilated")
        y = SF.max_pool2d(SF.conv2d(y, depth, None, 1, 1, groups=3), 3, 2, 1) * 1.0
        y = SF.avg_pool2d(x, 3, 1, 1).mean((2, 3)).sum() + y.features.sum()
        z = SF.conv_transpose2d(SF.conv2d(x, w, None, 2, 1), up, None, 2, 1, output=x)
        return y, z.features_at(coords)

    sizes = ((len(coords), 2), (3, 2, 3, 3), (3, 2, 3, 3), (3, 1, 3, 3))
    assert torch.autograd.gradcheck(
        net, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes], **GRADCHECK
    )


@pytest.mark.filterwarnings("ignore:var")  # torch's, of no rows
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 5), (1, 1, 1)])
def test_nothing_at_all(shape):
    """No image, or no pixel: every op runs forward and backward, or says why it does not."""
    no_coords = torch.zeros(0, 3, dtype=torch.int32)
    w, up = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    depth, flat = torch.randn(3, 1, 3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    gamma = torch.ones(3, requires_grad=True)
    ops: dict[str, Callable] = {
        "conv": lambda x: SF.conv2d(x, w, None, 1, 1),
        "conv stride 2": lambda x: SF.conv2d(x, w, None, 2, 1),
        "conv dilated": lambda x: SF.conv2d(x, w, None, 2, 1, output="dilated"),
        "depthwise": lambda x: SF.conv2d(x, depth, None, 2, 1, groups=3),
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "transposed": lambda x: F.conv_transpose2d(x, up.transpose(0, 1), None, 2, 1, 1),
        "inverse": lambda x: SF.conv_transpose2d(SF.conv2d(x, w, None, 2, 1), up, None, 2, 1, output=x),
        "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), flat),
        "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,), gamma),
        "batch norm": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), gamma, None, False),
        "relu": F.relu,
        "mean": lambda x: x.mean((2, 3)),
        "pixels": lambda x: x.to_pixels(),
    }
    for backend in ("cpu", "library", "reference"):
        for name, op in ops.items():
            features = torch.zeros(0, 3, requires_grad=True)
            x = sf.SparseTensor.from_coords(features, no_coords, shape)
            with sf.use_backend(backend):
                y = op(x)
                rows = y.features if isinstance(y, sf.SparseTensor) else y
                dense = y.to_dense(fill=1.0) if isinstance(y, sf.SparseTensor) else y
                assert dense.shape[0] == shape[0] and torch.isfinite(dense).all(), name
                (rows.sum() + dense.sum()).backward()
            assert features.grad is None or features.grad.shape == (0, 3), name
            for parameter in (w, up, depth, flat, gamma):
                assert parameter.grad is None or not parameter.grad.any(), name
    x = sf.SparseTensor.from_coords(torch.zeros(0, 3), no_coords, shape)
    with pytest.raises(ValueError, match="batch_norm"):
        F.batch_norm(x, None, None, training=True)


def test_one_pixel():
    x = sf.SparseTensor.from_coords(torch.ones(1, 1), torch.tensor([[0, 2, 4]]), (1, 5, 5))
    y = SF.conv2d(x, torch.ones(1, 1, 3, 3), None, 2, 1, output="dilated")
    assert y.coords.tolist() == [[0, 1, 2]] and y.features.tolist() == [[1.0]]
    y = SF.conv2d(x, torch.ones(1, 1, 3, 3), None, 1, 1, output="dilated")
    assert len(y.coords) == 6 and (y.features == 1).all()


def test_rows_are_sorted_and_come_back_in_the_callers_order():
    coords = points(0.4)
    features = torch.randn(len(coords), 3, requires_grad=True)
    x = sf.SparseTensor.from_coords(features, coords, SHAPE)
    assert x.shape == (3, 3, 11, 13) and x.side == 1 and x.patches.per_image is None
    assert x.coords.dtype == torch.int32 and x.coords.tolist() == sorted(coords.tolist())
    assert torch.equal(x.features_at(coords), features)
    assert torch.equal(x.to_dense(), dense_of(features, coords, SHAPE))
    weights = torch.randn_like(features)
    (x.features_at(coords) * weights).sum().backward()
    assert torch.equal(features.grad, weights)
    for dtype in (torch.int16, torch.uint8, torch.int64):
        assert torch.equal(sf.SparseTensor.from_coords(features, coords.to(dtype), SHAPE).features, x.features)
    strided = torch.stack((coords, coords), 2)[..., 1]
    assert torch.equal(
        sf.SparseTensor.from_coords(features.double().T.contiguous().T, strided, SHAPE).features, x.features.double()
    )
    full = torch.ones(SHAPE).nonzero()
    assert sf.SparseTensor.from_coords(torch.zeros(len(full), 1), full, SHAPE).patches.per_image == 143


def test_pixels_of_patches():
    patches = sf.ActivePatches(torch.rand(3, 4, 3) < 0.5)
    rows = torch.randn(patches.rows(3), 2, requires_grad=True)
    x = sf.SparseTensor(rows, patches, 3)
    y = x.to_pixels()
    assert y.side == 1 and y.shape == x.shape and torch.equal(y.to_dense(), x.to_dense())
    assert y.coords.tolist() == sorted(x.coords.tolist())
    assert torch.equal(y.features_at(x.coords), x.features) and torch.equal(x.features_at(y.coords), y.features)
    weights = torch.randn_like(rows)
    (y.features_at(x.coords) * weights).sum().backward()
    assert torch.equal(rows.grad, weights)
    assert x.to_pixels().patches is y.patches and y.to_pixels() is y
    equal = sf.SparseTensor(torch.randn(2 * 4 * 4, 2), sf.ActivePatches(sf.random_patch_mask(2, (2, 4), 0.5)), 2)
    assert equal.to_pixels().patches.per_image == 16


@pytest.mark.parametrize("output", ["mask", "dilated"])
def test_patches_as_pixels_are_the_same_convolution(output):
    x = sf.SparseTensor.from_dense(torch.randn(2, 3, 12, 8).double(), sf.ActivePatches(torch.rand(2, 3, 2) < 0.6))
    w = torch.randn(4, 3, 3, 3).double()
    ours, pixels = (SF.conv2d(t, w, None, 2, 1, output=output) for t in (x, x.to_pixels()))
    torch.testing.assert_close(ours.to_dense(), pixels.to_dense())
    assert sorted(ours.coords.tolist()) == pixels.coords.tolist()


def wrong(message: str, error: type[Exception] = ValueError, **change):
    coords = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 3, 3]])
    arguments = {"features": torch.zeros(3, 2), "coords": coords, "shape": (2, 4, 4), **change}
    with pytest.raises(error, match=message):
        sf.SparseTensor.from_coords(**arguments)


def test_wrong_points_are_named():
    given = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 3, 3]])
    wrong(
        r"1 pixels lie outside.*coords\[2\] = \[0, 3, 4\]",
        coords=given + torch.tensor([[0], [0], [1]]) * torch.tensor([0, 0, 1]),
    )
    wrong(r"outside.*coords\[0\] = \[0, -1, 2\]", coords=given * torch.tensor([1, -1, 1]))
    wrong("outside", shape=(1, 4, 4))
    wrong("outside", shape=(0, 4, 4))
    wrong(r"more than once.*coords\[2\] = \[0, 1, 2\]", coords=given[[0, 1, 0]])
    wrong("integers", TypeError, coords=given.float())
    wrong("integers", TypeError, coords=given > 0)
    wrong("coords must be an integer tensor", TypeError, coords=given.tolist())
    wrong(r"\(N, 3\)", coords=given[:, :2])
    wrong("row for each pixel", coords=given[:2])
    wrong("features must be a tensor", TypeError, features=[1.0])
    wrong("floating point", TypeError, features=torch.zeros(3, 2, dtype=torch.int32))
    wrong("features must be", features=torch.zeros(3))
    wrong("meta", features=torch.zeros(3, 2, device="meta"), coords=given.to("meta"))
    wrong("features are on cpu, coords on meta", coords=given.to("meta"))
    wrong("shape must be three whole numbers", TypeError, shape=(2, 4))
    wrong("shape must be three whole numbers", TypeError, shape=(2, 4.0, 4))
    wrong("at least 1", shape=(2, 0, 4))
    x = sf.SparseTensor.from_coords(torch.zeros(3, 2), given, (2, 4, 4))
    with pytest.raises(ValueError, match=r"1 pixels are not active, such as coords\[1\] = \[0, 0, 0\]"):
        x.features_at(given * torch.tensor([[1], [0], [1]]))
    with pytest.raises(ValueError, match=r"not active, such as coords\[0\] = \[0, 5, 2\]"):
        x.features_at(given + torch.tensor([0, 4, 0]))
    with pytest.raises(TypeError, match="integers"):
        x.features_at(given.float())
    with pytest.raises(ValueError, match="coords are on meta"):
        x.features_at(given.to("meta"))


def test_wrong_settings_are_named():
    coords = points(0.3)
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 3), coords, SHAPE)
    w = torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="output must be 'mask' or 'dilated'; got 'grown'"):
        SF.conv2d(x, w, output="grown")
    with pytest.raises(ValueError, match="output must be 'mask' or 'dilated'"):
        sf.nn.SparseConv2d(3, 4, 3, output="grown")
    with pytest.raises(ValueError, match=r"11x13 pixels into 9x11.*output='dilated'"):
        SF.conv2d(x, w)
    with pytest.raises(ValueError, match="larger than the padded map"):
        SF.conv2d(x, torch.randn(4, 3, 15, 15), output="dilated")
    with pytest.raises(ValueError, match="channels-last"):
        SF.conv2d(x.permute(0, 2, 3, 1), w, padding=1)
    with pytest.raises(TypeError, match="SparseTensor"):
        SF.conv2d(torch.zeros(1, 3, 4, 4), w)
    with pytest.raises(ValueError, match="weight must be"):
        SF.conv_transpose2d(x, w[0])
    with pytest.raises(ValueError, match="takes 4 channels"):
        SF.conv_transpose2d(x, w, None, 2, 1, 1)
    with pytest.raises(TypeError, match="weight is"):
        SF.conv_transpose2d(x, w.transpose(0, 1).double(), None, 2, 1, 1)
    with pytest.raises(ValueError, match=r"not a whole number of pixels for each of the 11x13 patches.*output="):
        SF.conv_transpose2d(x, w.transpose(0, 1), None, 2, 1)
    with pytest.raises(ValueError, match="less than the stride"):
        SF.conv_transpose2d(x, w.transpose(0, 1), None, 1, 1, 1)
    y = SF.conv2d(x, w, None, 2, 1)
    with pytest.raises(ValueError, match=r"output is a map of 11x13 pixels.*makes \(11, 13\), but x has \(6, 7\)"):
        SF.conv_transpose2d(y, w, None, 1, 1, output=x)
    with pytest.raises(ValueError, match="output has 1 images"):
        SF.conv_transpose2d(y, w, None, 2, 1, output=sf.ActivePatches(torch.ones(1, 11, 13) > 0))
    with pytest.raises(TypeError, match="output must be a SparseTensor"):
        SF.conv_transpose2d(y, w, None, 2, 1, output=torch.zeros(1))


@pytest.mark.parametrize("output", ["mask", "dilated"])
@pytest.mark.parametrize("kernel", [3, 4, (2, 5)])
def test_padding_by_name(kernel, output):
    """Of an even kernel it is larger at one end."""
    coords = points(0.2)
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 3).double(), coords, SHAPE)
    w = torch.randn(4, 3, *((kernel, kernel) if isinstance(kernel, int) else kernel)).double()
    y = SF.conv2d(x, w, None, padding="same", output=output)
    dense = F.conv2d(x.to_dense(), w, padding="same")
    torch.testing.assert_close(y.to_dense(), dense if output == "dilated" else dense * x.patches.active[:, None])


def test_layers_share_output_sets():
    """So that a strided convolution and its shortcut can be added, whatever their kernels."""
    coords = points(0.3)
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 3), coords, SHAPE)
    a, b = SF.conv2d(x, torch.randn(4, 3, 3, 3), None, 2, 1), SF.conv2d(x, torch.randn(4, 3, 1, 1), None, 2)
    c = SF.avg_pool2d(x, 2, 2, ceil_mode=True)
    assert a.patches is b.patches is c.patches and torch.equal((a + b).features, a.features + b.features)
    d, e = (SF.conv2d(x, torch.randn(4, 3, 3, 3), None, 2, 1, output="dilated") for _ in "12")
    assert d.patches is e.patches is not a.patches
    with no_waiting():  # what is there is not counted again
        SF.conv2d(x, torch.randn(4, 3, 3, 3), None, 2, 1)
    whole = sf.SparseTensor(torch.randn(8, 3), sf.ActivePatches(torch.ones(2, 1, 1) > 0, per_image=1), 2)
    with no_waiting():
        assert len(whole.to_pixels().coords) == 8


def test_sets_made_without_gradients_serve_a_training_step():
    coords = points(0.3)
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 3), coords, SHAPE)
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    for backend in ("cpu", "library", "reference"):
        x.patches.derived.clear()
        with sf.use_backend(backend):
            with torch.inference_mode():
                SF.conv2d(x, w, None, 2, 1, output="dilated")
            SF.max_pool2d(SF.conv2d(x, w, None, 2, 1, output="dilated"), 3, 1, 1).features.sum().backward()


def test_a_residual_network_on_pixels():
    """timm's block, unmodified, with a strided shortcut: equal to the dense one with a mask after each layer."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    block = BasicBlock(4, 6, stride=2, downsample=shortcut).double().eval()
    coords = points(0.3)
    x = torch.randn(len(coords), 4, dtype=torch.float64)
    y = block(sf.SparseTensor.from_coords(x, coords, SHAPE))
    mask = torch.zeros(3, 1, 6, 7, dtype=torch.float64)
    for image, row, col in coords.tolist():
        mask[image, 0, row // 2, col // 2] = 1
    dense = dense_of(x, coords, SHAPE)
    out = block.act1(block.bn1(block.conv1(dense) * mask)) * mask
    out = block.act2(block.bn2(block.conv2(out)) + shortcut(dense)) * mask
    torch.testing.assert_close(y.to_dense(), out)


def test_modules_say_which_output_they_want():
    coords = points(0.3)
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 3), coords, SHAPE)
    conv = sf.nn.SparseConv2d(3, 4, 3, stride=2, padding=1, output="dilated")
    up = sf.nn.SparseConvTranspose2d(4, 3, 3, stride=2, padding=1)
    net = nn.Sequential(conv, sf.nn.SparseMaxPool2d(2, output="dilated"), sf.nn.SparseAvgPool2d(3, 1, 1))
    assert "output='dilated'" in repr(net) and "output" not in repr(sf.nn.SparseConv2d(3, 4, 3))
    assert conv.state_dict().keys() == {"weight", "bias"}
    wanted = SF.conv2d(x, conv.weight, conv.bias, 2, 1, output="dilated")
    pooled = SF.avg_pool2d(SF.max_pool2d(wanted, 2, output="dilated"), 3, 1, 1)
    same = [net, sf.to_sparse(sf.to_dense(copy.deepcopy(net))), pickle.loads(pickle.dumps(net))]
    for other in same:
        assert other[0].output == "dilated"
        assert torch.equal(other(x).features, pooled.features)
    back = up(wanted, output=x)
    assert torch.equal(back.features, SF.conv_transpose2d(wanted, up.weight, up.bias, 2, 1, output=x).features)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(conv(images), F.conv2d(images, conv.weight, conv.bias, 2, 1))
    plain = sf.to_sparse(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1)))
    assert type(plain[1]) is sf.nn.SparseConvTranspose2d and plain[0].output == "mask"
    assert plain(images).shape == images.shape
    size = up(SF.conv2d(x, conv.weight, None, 2, 1), output_size=(12, 14)).shape
    assert size == (3, 3, 12, 14)
    with pytest.raises(TypeError, match="sparse input"):
        up(conv(images), output=x)
    with pytest.raises(ValueError, match="not both"):
        up(wanted, output_size=(11, 13), output=x)


@pytest.mark.slow
def test_torch_compile_breaks_the_graph_where_pixels_are_counted():
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = sf.nn.SparseConv2d(3, 4, 3, padding=1)
            self.down = sf.nn.SparseConv2d(4, 6, 3, 2, 1, output="dilated")
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.up = sf.nn.SparseConvTranspose2d(6, 4, 3, 2, 1)
            self.grow = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.grow(self.up(self.down(x), output=x)), self.pool(x)

    net = Net().double()
    other = copy.deepcopy(net)
    compiled = torch.compile(other, backend="aot_eager")
    coords = points(0.3)
    features = torch.randn(len(coords), 3, dtype=torch.float64)
    x = sf.SparseTensor.from_coords(features, coords, SHAPE)
    for run in (net, compiled):
        sum((y.features**2).sum() for y in run(x)).backward()
    for a, b in zip(net(x), compiled(x), strict=True):
        torch.testing.assert_close(b.features, a.features)
        assert b.coords.tolist() == a.coords.tolist()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    torch._dynamo.reset()


@pytest.mark.slow
def test_transposed_convolution_of_patches_is_one_graph():
    torch._dynamo.reset()
    for settings in ((4, 6, 4, 2, 1), (4, 4, 2, 2, 0, 0, 4), (4, 6, 1)):
        net = nn.ConvTranspose2d(*settings).double()
        other = copy.deepcopy(net)
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        patches = sf.ActivePatches(torch.rand(2, 3, 2) < 0.6)
        rows = torch.randn(patches.rows(2), 4, dtype=torch.float64)
        for run in (net, compiled):
            (run(sf.SparseTensor(rows, patches, 2)).features ** 2).sum().backward()
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
    torch._dynamo.reset()


def test_large_numbers_of_cells_need_no_dense_map():
    """Few points on a large grid: tables of the grid, but nothing of grid times channels."""
    coords = torch.tensor([[0, 0, 0], [0, 2047, 2047], [0, 1000, 1001], [0, 1000, 1000]])
    x = sf.SparseTensor.from_coords(torch.eye(4, 64), coords, (1, 2048, 2048))
    y = SF.conv2d(x, torch.randn(8, 64, 3, 3), None, 2, 1)
    assert y.coords.tolist() == [[0, 0, 0], [0, 500, 500], [0, 1023, 1023]]


def test_the_guide_runs_and_says_the_truth():
    text = (Path(__file__).resolve().parent.parent / "docs" / "general_op.md").read_text()
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "general_op.md", "exec"), names)
        for name, channels, size, count in re.findall(
            r"^(\w+) = .*# \(2, (\d+), (\d+), \d+\), (\d+) pixels", code, re.M
        ):
            assert names[name].shape == (2, int(channels), int(size), int(size)), name
            assert len(names[name].coords) == int(count), name
    x, same, back = (names[name] for name in ("x", "same", "back"))
    assert same.patches is x.patches is back.patches and x.shape == (2, 16, 8, 8) and len(x.coords) == 4
    assert torch.equal(x.features_at(names["coords"]), names["features"])
    tables = (x.patches.active, x.patches.grid_to_patch)
    assert sum(t.numel() * t.element_size() for t in tables) == 5 * 2 * 8 * 8
