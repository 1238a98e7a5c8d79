"""Padding that differs at the two ends, crops at the end, and maps that are no whole number of pixels for each patch:
every backend against dense PyTorch on the padded, zero-filled map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, value_and_grads
from pixels import at_pixels

import spark_fast as sf
from spark_fast.nn import functional as SF
from spark_fast.ops.conv import convolve
from spark_fast.ops.pool import avg_pool, max_pool
from spark_fast.ops.window import Window

# kernel, stride, padding (top, bottom, left, right), side: of a mask of 3x4 patches
CASES = {
    "same": (3, 2, (0, 1, 0, 1), 4),
    "same of 4x4": (4, 1, (1, 2, 1, 2), 2),
    "same of 7x7": (7, 2, (2, 3, 2, 3), 2),
    "cropped": (3, 1, (1, -1, 2, -2), 3),
    "valid": (3, 1, (0, 0, 0, 0), 3),
    "valid stride 2": (3, 2, (0, 0, 0, 0), 4),
    "valid at side 1": (3, 1, (1, 0, 0, 1), 2),
}
CHANNELS, OUT = 5, 6


@pytest.fixture(params=["equal", "unequal"])
def mask(request) -> torch.Tensor:
    if request.param == "equal":
        return sf.random_patch_mask(2, (3, 4), 0.5, torch.Generator().manual_seed(2))
    few = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    return few & torch.tensor([True, False])[:, None, None] | (torch.arange(12) == 5).view(3, 4)


def check(case, mask: torch.Tensor, op: str, dtype=torch.float32, device="cpu"):
    kernel, stride, (top, bottom, left, right), side = case
    patches = sf.ActivePatches(mask.to(device))
    generator = torch.Generator().manual_seed(4)
    groups = CHANNELS if op == "depthwise" else 1
    sizes = [(2, CHANNELS, 3 * side, 4 * side)]
    if op in ("conv", "depthwise"):
        out = CHANNELS if op == "depthwise" else OUT
        sizes += [(out, CHANNELS // groups, kernel, kernel), (out,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes]
    window = Window((kernel, kernel), (stride, stride)).padded(top, bottom, left, right)
    full = mask.to(device)[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)
    found = []

    def sparse(images, *rest):
        x = sf.SparseTensor.from_dense(images, patches)
        run, settings = {"max": (max_pool, ()), "avg": (avg_pool, (True, kernel**2))}.get(
            op, (convolve, (*rest, groups))
        )
        y = SF.windowed(op, x, window, "mask", False, run, *settings)
        found.append(y)
        return y.to_dense()

    def dense(images, *rest):
        border = -torch.inf if op == "max" else 0.0
        padded = F.pad(torch.where(full, images, 0), (left, right, top, bottom), value=border)
        if op == "max":
            out = F.max_pool2d(padded, kernel, stride)
        elif op == "avg":
            out = F.avg_pool2d(padded, kernel, stride)
        else:
            out = F.conv2d(padded, *rest, stride, groups=groups)
        return out * at_pixels(mask, tuple(out.shape[2:])).to(device)[:, None]

    ours, grads = value_and_grads(sparse, *inputs)
    theirs, their_grads = value_and_grads(dense, *inputs)
    oracle, true_grads = value_and_grads(dense, *(t.double() for t in inputs))
    assert_as_exact(ours, theirs, oracle, "forward", kernel**2 * CHANNELS)
    for name, mine, own, true in zip(("x", "weight", "bias"), grads, their_grads, true_grads, strict=False):
        assert_as_exact(mine, own, true, f"grad {name}", mask.sum().item() * side**2 * OUT)
    return found[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ["conv", "depthwise", "max", "avg"])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name, op, backend, mask):
    with sf.use_backend(backend):
        check(CASES[name], mask, op)


@pytest.mark.parametrize("op", ["conv", "depthwise", "max"])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_in_triton(name, op, mask, on_triton):
    check(CASES[name], mask, op, device=on_triton)


def test_which_patches_a_map_lies_on(mask):
    same = check(CASES["same"], mask, "conv")
    assert same.side == 2 and same.patches.grid == (3, 4)  # a whole number of pixels for each patch
    valid = check(CASES["valid"], mask, "conv")
    assert valid.side == 1 and valid.patches.grid == (7, 10)
    again = check(CASES["valid at side 1"], mask, "conv")
    assert again.patches.grid == (5, 7)


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
def test_maps_of_one_size_share_their_patches_and_return_to_the_mask(mask):
    patches = sf.ActivePatches(mask)
    x = sf.SparseTensor.from_dense(torch.randn(2, 3, 12, 16), patches)
    a = F.conv2d(x, torch.randn(4, 3, 3, 3), stride=2)  # 5x7
    b = F.max_pool2d(x, 3, 2)
    assert a.patches is b.patches and a.patches.origin is patches
    torch.cat((a, b), 1)
    wide = F.interpolate(a, scale_factor=2)
    assert wide.patches is F.conv2d(wide, torch.randn(4, 4, 3, 3), padding=1).patches
    up = F.conv2d(a, torch.randn(4, 4, 3, 3), padding=(2, 2))  # 7x9
    back = F.conv2d(up, torch.randn(2, 4, 2, 2))  # 6x8: two pixels for each patch
    assert back.patches is patches and back.side == 2


def test_bad_padding_is_named():
    x = sf.SparseTensor.from_dense(torch.randn(1, 3, 4, 4), sf.ActivePatches(torch.ones(1, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="padding must be at least 0"):
        F.conv2d(x, torch.randn(4, 3, 3, 3), padding=-1)
    with pytest.raises(ValueError, match="larger than the padded map"):
        F.conv2d(x, torch.randn(4, 3, 5, 5))
    with pytest.raises(sf.SparseOpError, match="only a convolution or a pooling"):
        F.pad(x, (1, 1, 1, 1)).relu()
    with pytest.raises(sf.SparseOpError, match="only height and width"):
        F.pad(x, (1, 1, 1, 1, 1, 1))
