"""Random windows on random sets of pixels: output set, values and gradients against dense PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pixels import dense_of, picked

import spark_fast as sf
from spark_fast.nn import functional as SF

RUNS = settings(max_examples=150, suppress_health_check=list(HealthCheck))
TIGHT = {"atol": 1e-10, "rtol": 1e-10}
seen = {"mask": 0, "dilated": 0, "refused": 0, "inverse": 0}


@st.composite
def sets(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Coordinates of any pixels of up to three images, in any order, and the images' shape."""
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    count = shape[0] * shape[1] * shape[2]
    cells = torch.tensor(
        draw(st.lists(st.integers(0, max(count - 1, 0)), unique=True, max_size=count)), dtype=torch.long
    )
    area = shape[1] * shape[2]
    return torch.stack((cells // area, cells % area // shape[2], cells % shape[2]), 1).view(-1, 3), shape


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding, dilation; mostly with a padding that keeps the size."""
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kept = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return kernel, stride, draw(st.one_of(st.just(kept), st.tuples(st.integers(0, 3), st.integers(0, 3)))), dilation


def active_by_hand(coords, shape, window, size, output) -> torch.Tensor:
    kernel, stride, padding, dilation = window
    if output == "dilated":
        mask = torch.zeros(shape, dtype=torch.float64)
        mask[tuple(coords.T)] = 1
        return F.conv2d(mask[:, None], torch.ones(1, 1, *kernel).double(), None, stride, padding, dilation)[:, 0] > 0
    out = torch.zeros(shape[0], *size, dtype=torch.bool)
    for image, y, x in coords.tolist():
        if y // stride[0] < size[0] and x // stride[1] < size[1]:
            out[image, y // stride[0], x // stride[1]] = True
    return out


@RUNS
@given(sets(), windows(), st.sampled_from(["mask", "dilated"]), st.sampled_from([(2, 3, 1), (4, 4, 2), (3, 3, 3)]))
def test_any_window_on_any_pixels(pixels, window, output, channels):
    (coords, shape), (kernel, stride, padding, dilation), (inc, out, groups) = pixels, window, channels
    torch.manual_seed(len(coords))
    x = torch.randn(len(coords), inc, dtype=torch.float64, requires_grad=True)
    w = torch.randn(out, inc // groups, *kernel, dtype=torch.float64, requires_grad=True)
    sparse = sf.SparseTensor.from_coords(x, coords, shape)
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    )
    kept = [o % n == 0 and o // n for o, n in zip(size, shape[1:], strict=True)]
    cells = all(o in (n // s, -(-n // s)) for o, n, s in zip(size, shape[1:], stride, strict=True))
    same = kept[0] is not False and kept[0] == kept[1]  # the output's patches are the input's
    if min(size) < 1 or (output == "mask" and not cells and not same):
        seen["refused"] += 1
        with pytest.raises(ValueError, match="kernel"):
            SF.conv2d(sparse, w, None, stride, padding, dilation, groups, output)
        return
    y = SF.conv2d(sparse, w, None, stride, padding, dilation, groups, output)
    dense = F.conv2d(dense_of(x, coords, shape), w, None, stride, padding, dilation, groups)
    if output == "dilated" or not same:
        seen[output] += 1
        active = active_by_hand(coords, shape, window, size, output)
        assert y.side == 1 and torch.equal(y.patches.active, active)
    torch.testing.assert_close(y.features, picked(dense, y.coords), **TIGHT)
    if output == "dilated":
        torch.testing.assert_close(y.to_dense(), dense, **TIGHT)  # nothing is left out
    weights = torch.randn_like(y.features)
    ours = torch.autograd.grad((y.features * weights).sum(), (x, w), retain_graph=True)
    theirs = torch.autograd.grad((picked(dense, y.coords) * weights).sum(), (x, w))
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, **TIGHT)
    check_inverse(y, sparse, torch.randn(out, inc // groups, *kernel, dtype=torch.float64), window, groups)


def check_inverse(y: sf.SparseTensor, x: sf.SparseTensor, weight, window, groups: int) -> None:
    """Back onto the pixels of `x`: as the transposed convolution, the convolution's gradient, says."""
    _, stride, padding, dilation = window
    seen["inverse"] += 1
    y = y.with_features(y.features.detach().requires_grad_())
    z = SF.conv_transpose2d(y, weight, None, stride, padding, 0, groups, dilation, output=x)
    dense = y.to_dense()
    whole = torch.nn.grad.conv2d_input(
        (len(x), x.shape[1], *x.shape[2:]), weight, dense, stride, padding, dilation, groups
    )
    torch.testing.assert_close(z.features, picked(whole, x.coords), **TIGHT)


def test_the_examples_are_of_all_kinds():
    if not any(seen.values()):
        pytest.skip("the property test was not run in this process")
    assert min(seen.values()) >= 10, seen
