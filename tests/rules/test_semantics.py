"""What functions mean in their corners: names, numbers and order of arguments, views, broadcasting, dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import spark_fast as sf

BATCH, CHANNELS, HEIGHT, WIDTH = 3, 8, 4, 6
UNEQUAL = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]], dtype=torch.bool)


@pytest.fixture
def dense() -> torch.Tensor:
    return torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)


def sparse_of(dense: torch.Tensor) -> sf.SparseTensor:
    """Without masked pixels."""
    return sf.SparseTensor.from_dense(dense, sf.ActivePatches(torch.ones(len(dense), 2, 3, dtype=torch.bool)))


def seen(out) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.to_dense()


def doubled(x):
    """The batch and half of the channels as one dimension, as attention in groups does it."""
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).flatten(0, 1)


def column(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).view(shape) - 1.5


def written(view):
    """Writing into `view(x)` in place: what becomes of x."""

    def write(x):
        x = x.clone()
        view(x).mul_(-2)
        return x

    return write


SAME = {
    # names of arguments
    "chunk": lambda x: x.chunk(chunks=2, dim=1)[1],
    "chunk by position": lambda x: torch.chunk(x, 3, 1)[2],
    "split": lambda x: x.split(split_size=3, dim=1)[2],
    "torch.split": lambda x: torch.split(x, split_size_or_sections=[1, 5, 2], dim=1)[1],
    "tensor_split": lambda x: x.tensor_split(indices=(1, 4), dim=1)[1],
    "split_with_sizes": lambda x: x.split_with_sizes(split_sizes=[2, 6], dim=-3)[1],
    "softmax": lambda x: torch.softmax(input=x, dim=1),
    "softmax's dtype": lambda x: torch.softmax(x, 1, torch.float32),
    "softmax, axis": lambda x: torch.softmax(x, axis=1),
    "add": lambda x: torch.add(input=x, other=x, alpha=3),
    "where": lambda x: torch.where(condition=x > 0, input=x, other=column(WIDTH)),
    "cat, axis": lambda x: torch.cat([x, x], axis=1),
    "stack, axis": lambda x: torch.stack([x, -x], axis=2),
    "mean, axis": lambda x: x.mean(axis=1),
    "sum, keepdims": lambda x: x.sum(axis=(2, 3), keepdims=True),
    "amax, axis": lambda x: torch.amax(x, axis=1),
    "std, axis": lambda x: x.std(axis=1),
    "max, axis": lambda x: x.max(axis=1)[0],
    "values of max": lambda x: x.max(1).values,
    "indices of min": lambda x: torch.min(x, dim=-3, keepdim=True).indices,
    "permute": lambda x: x.permute(dims=(0, 2, 3, 1)),
    "view": lambda x: x.view(size=(3, 2, 4, 4, 6)),
    "reshape": lambda x: torch.reshape(x, shape=(3, 2, 4, 4, 6)),
    "expand": lambda x: x[:, :1].expand(size=(-1, 5, -1, -1)),
    "transpose": lambda x: x.transpose(dim0=-3, dim1=-1),
    "movedim": lambda x: torch.movedim(x, (1, 0), (-1, 1)),
    "normalize": lambda x: F.normalize(x, p=3.0, dim=-3),
    "to a layout": lambda x: x.to(memory_format=torch.channels_last).clone(memory_format=torch.channels_last),
    "to another's dtype": lambda x: x.float().to(x),
    "a dense tensor to a sparse one's dtype": lambda x: torch.ones(2, dtype=torch.float32).to(x),
    "length": lambda x: torch.tensor(len(x.permute(1, 0, 2, 3))),
    # a batch joined with channels
    "softmax of channels": lambda x: doubled(x).softmax(1),
    "mean of channels": lambda x: doubled(x).mean(1, keepdim=True),
    "mean of channels, dropped": lambda x: doubled(x).mean(1),
    "amax of channels": lambda x: doubled(x).amax(-3, keepdim=True),
    "variance of channels": lambda x: doubled(x).var(1, keepdim=True),
    "max of channels": lambda x: doubled(x).max(1, keepdim=True)[1],
    "norm of channels": lambda x: F.normalize(doubled(x)),
    "prelu of joined": lambda x: F.prelu(doubled(x), column(4)),
    "prelu of moved": lambda x: F.prelu(x.view(3, 2, 4, 4, 6).permute(1, 2, 0, 3, 4), column(4)),
    "glu of joined": lambda x: F.glu(doubled(x), 1),
    "mean of space": lambda x: doubled(x).mean((2, 3), keepdim=True),
    "mean of height": lambda x: doubled(x).mean(2, keepdim=True),
    "amax of space": lambda x: doubled(x).amax((1, 2, 3)),
    "variance of space": lambda x: doubled(x).var((2, 3), keepdim=True),
    "gate of joined": lambda x: (doubled(x) * doubled(x).mean((2, 3), keepdim=True).sigmoid()).view(3, 8, 4, 6),
    "joined times a vector": lambda x: doubled(x) * column(4, 1, 1),
    "joined times a map": lambda x: doubled(x) * column(6, 1, 4, 6),
    "index of joined": lambda x: doubled(x)[:, 1:3],
    # views and copies
    "written to a view": written(lambda x: x.view(3, 2, 4, 4, 6)),
    "written to a slice": written(lambda x: x[:, 2:5]),
    "written to a number": written(lambda x: x[:, -1]),
    "written to a chunk": written(lambda x: x.chunk(2, 1)[1]),
    "written to channels last": written(lambda x: x.permute(0, 2, 3, 1)),
    "written to a copy": written(lambda x: x.permute(0, 2, 3, 1).contiguous()),
    "written to copied tokens": written(lambda x: x.flatten(2).transpose(1, 2).contiguous()),
    "written to tokens": written(lambda x: x.flatten(2)),
    "written to picked channels": written(lambda x: x[:, [0, 3]]),
    "dropped in place": written(lambda x: F.dropout2d(x, 1.0, True, inplace=True)),
    # broadcasting and dtypes
    "a row": lambda x: x * column(WIDTH),
    "a column": lambda x: column(HEIGHT, 1) - x,
    "channels": lambda x: x / column(CHANNELS, 1, 1),
    "images": lambda x: x * column(BATCH, 1, 1, 1),
    "maps": lambda x: x + column(BATCH, 1, HEIGHT, WIDTH),
    "channels grow": lambda x: x[:, :1] * column(1, 5, 1, 1),
    "whole numbers beyond float32": lambda x: (x * 0 + torch.full((HEIGHT, WIDTH), 2**24 + 1)) - 2**24,
    "whole numbers": lambda x: x.float() * torch.arange(6),
    "a wider dtype": lambda x: x.float() * torch.ones(1, CHANNELS, 1, 1, dtype=torch.float64),
    "a number of a wider dtype": lambda x: x.float() * torch.tensor(2.0, dtype=torch.float64),
    "half times float": lambda x: x.half() + torch.ones(CHANNELS, 1, 1),
    "counted": lambda x: (x > 0).sum(1),
    "counted over space": lambda x: (x > 0).sum((2, 3)),
    "conditions": lambda x: torch.where((x > 0.5).logical_or(x < -0.5), x, 0.0),
    "filled": lambda x: x.masked_fill(x.isnan(), 0.0).masked_fill(x <= 0, -1.0),
    # numbers
    "variance without freedom": lambda x: x.var(1, correction=CHANNELS),
    "variance of less": lambda x: x.var((2, 3), correction=30),
    "nearest by no whole number": lambda x: F.interpolate(x, scale_factor=1.15),
    "nearest exact by no whole number": lambda x: F.interpolate(x, scale_factor=1.15, mode="nearest-exact"),
    "frobenius": lambda x: torch.linalg.norm(x, dim=(2, 3)),
    "vector norm": lambda x: torch.linalg.norm(x, 3, dim=1),
    "norm of images": lambda x: torch.norm(x, 2, dim=(2, 3)),
    "channels padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=2.0),
    "channels cropped": lambda x: F.pad(x.permute(0, 2, 3, 1), (-1, 2)),
    "sampled and padded": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)),
    "one list": lambda x: x[:, torch.tensor([True, False] * 4)],
    "a tensor as number": lambda x: x[:, torch.tensor(3)],
    "a pool's stride": lambda x: F.avg_pool2d(x, 2, stride=()),
}


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped", "ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", SAME)
def test_as_the_dense_tensor(name, dense):
    mine, theirs = seen(SAME[name](sparse_of(dense))), SAME[name](dense)
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(mine, theirs, equal_nan=True)


REFUSED = {
    "transpose in place": (sf.SparseOpError, "transpose_", lambda x: x.transpose_(2, 3)),
    "cat into a tensor": (
        sf.SparseOpError,
        "into a dense",
        lambda x: torch.cat([x, x], 1, out=torch.zeros(3, 16, 4, 6)),
    ),
    "stack into a tensor": (sf.SparseOpError, "into a dense", lambda x: torch.stack([x, x], 1, out=torch.zeros(1))),
    "normalize into a tensor": (
        sf.SparseOpError,
        "into a dense",
        lambda x: F.normalize(x, out=torch.zeros(3, 8, 4, 6)),
    ),
    "spectral norm": (sf.SparseOpError, "matrix", lambda x: torch.linalg.norm(x, 2, dim=(2, 3))),
    "largest column": (sf.SparseOpError, "matrix", lambda x: torch.linalg.norm(x, 1, dim=(1, 2))),
    "two lists": (sf.SparseOpError, "one dimension", lambda x: x.view(3, 2, 4, 4, 6)[:, [0, 1], [1, 2]]),
    "a table as index": (sf.SparseOpError, "channels by", lambda x: x[:, torch.tensor([[0, 1]])]),
    "a new dimension in tokens": (sf.SparseOpError, "channels of a sequence", lambda x: x.flatten(2)[:, None]),
    "repeat everything": (sf.SparseOpError, "dim=None", lambda x: x.permute(1, 0, 2, 3).repeat_interleave(2)),
    "conditions averaged": (sf.SparseOpError, "use x.float", lambda x: (x > 0).mean(1)),
    "no such dimension": (IndexError, "dim=5", lambda x: x.mean(5)),
    "no such order": (IndexError, "dim=5", lambda x: x.permute(0, 5, 2, 3)),
    "no such place": (IndexError, "dim=7", lambda x: x.unsqueeze(7)),
    "no such chunk": (IndexError, "dim=-5", lambda x: x.chunk(2, -5)),
    "no such softmax": (IndexError, "dim=4", lambda x: x.flatten(2).softmax(4)),
    "a dimension twice": (ValueError, "twice", lambda x: x.mean((1, -3))),
    "images that grow": (ValueError, "only channels grow", lambda x: x * torch.ones(2, 1, 1, 1, 1)),
    "a map of another size": (ValueError, "only channels grow", lambda x: x + torch.ones(4, 5)),
    "channels that do not divide": (ValueError, "no multiple", lambda x: F.pixel_shuffle(x[:, :6], 2)),
    "a share of more than all": (ValueError, "between 0 and 1", lambda x: F.dropout2d(x, 1.5)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, dense):
    error, words, call = REFUSED[name]
    with pytest.raises(error, match=words):
        call(sparse_of(dense))


@pytest.mark.parametrize("dim", [1, (2, 3), (1, 2, 3)])
def test_a_standard_deviation_of_0_has_no_gradient(dim, dense):
    grads = []
    for make in (lambda x: x, sparse_of):
        leaf = (dense * 0 + 1).requires_grad_()
        out = make(leaf.relu()).std(dim)
        grads += torch.autograd.grad(seen(out).sum(), leaf)
    assert torch.equal(grads[0], torch.zeros_like(dense)) and torch.equal(grads[1], grads[0])


@pytest.mark.parametrize("call", [torch.var, torch.std])
@pytest.mark.parametrize("correction", [0, 1])
def test_an_image_without_pixels_spoils_no_gate(call, correction, dense):
    """Its variance is 0, so that the weights behind it keep finite gradients."""
    x = sf.SparseTensor.from_dense(dense, sf.ActivePatches(UNEQUAL))
    out = call(x, (2, 3), correction=correction)
    weight = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((x * (out @ weight)[:, :, None, None]).features.sum(), weight)
    assert not out[1].any() and grad.isfinite().all()
    for image, patches in ((0, UNEQUAL[0]), (2, UNEQUAL[2])):
        pixels = dense[image][:, patches.repeat_interleave(2, 0).repeat_interleave(2, 1)]
        torch.testing.assert_close(out[image], call(pixels, 1, correction=correction))


def test_running_statistics_of_instances_leave_out_images_without_pixels(dense):
    norm = torch.nn.InstanceNorm2d(CHANNELS, track_running_stats=True).double()
    norm(sf.SparseTensor.from_dense(dense, sf.ActivePatches(UNEQUAL)))
    pixels = [dense[i][:, UNEQUAL[i].repeat_interleave(2, 0).repeat_interleave(2, 1)] for i in (0, 2)]
    torch.testing.assert_close(norm.running_mean, 0.1 * sum(p.mean(1) for p in pixels) / 2)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * sum(p.var(1) for p in pixels) / 2)
    kept = norm.running_var.clone()
    few = torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool)
    few[0, 1, 2] = True  # a single pixel has no variance either
    norm(sf.SparseTensor.from_dense(dense, sf.ActivePatches(few)))
    assert torch.equal(norm.running_var, kept)


@pytest.mark.parametrize("channels", [1, 8])
def test_a_view_of_gathered_pixels_can_be_changed_in_place(channels):
    images = torch.randn(2, channels, 3, 3, requires_grad=True)
    x = sf.SparseTensor.from_dense(images, sf.ActivePatches(torch.rand(2, 3, 3) > 0.5))
    x.unsqueeze(1).relu_()
    (grad,) = torch.autograd.grad(x.features.sum(), images)
    mask = x.patches.active[:, None].expand_as(images)
    assert torch.equal(grad, (mask & (images > 0)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_dense(dtype):
    images, weight = torch.randn(2, 8, 4, 6), torch.randn(8, 8)
    with torch.autocast("cpu", dtype):
        mine, theirs = (
            F.linear(x.permute(0, 2, 3, 1), weight).softmax(-1) * x.permute(0, 2, 3, 1)
            for x in (
                sf.SparseTensor.from_dense(images, sf.ActivePatches(torch.ones(2, 2, 3, dtype=torch.bool))),
                images,
            )
        )
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine.to_dense(), theirs, rtol=1e-2, atol=1e-2)
