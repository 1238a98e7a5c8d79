"""Random convolutions and poolings on random masks, through nn modules, against the dense-masked simulation."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pixels import at_pixels
from simulation import Mask, gap
from torch import Tensor, nn

import spark_fast as sf

TIGHT = 1e-11  # float64, at most a few thousand terms a sum
RUNS = settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A mask (B, gh, gw) with any number of active patches per image, the side of a patch, and a seed."""
    batch, gh, gw = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    side = draw(st.sampled_from([1, 2, 3, 4, 4, 6, 8, 8]))
    count = batch * gh * gw
    bits = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    active = torch.tensor(bits).reshape(batch, gh, gw)
    active[0, 0, 0] |= not active.any()
    return active, side, draw(st.integers(0, 2**16))


@st.composite
def windows(draw: st.DrawFn) -> dict:
    """Kernel, stride, padding and dilation: mostly of the kind that divides the map by its stride, some at random."""
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    if draw(st.integers(0, 3)):
        stride = (draw(st.sampled_from([1, 1, 2, 2, 3, 4])),) * 2
        if stride == (1, 1):
            kernel = (kernel[0] | 1, kernel[1] | 1)  # an even one cannot keep the size
        padding = tuple(max(0, d * (k - 1) + 1 - stride[0] + 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}


FITTED = {"convolution": 0, "pooling": 0}  # examples whose output fits the grid


def cells(active: Tensor, stride: int | tuple[int, int], size: tuple[int, int]) -> Mask | None:
    """Patches of one pixel that a stride makes fewer: a cell of stride x stride of them is one pixel, active if one of
    them is. None where an output of `size` does not have a pixel for each cell, or each whole one."""
    stride = (stride, stride) if isinstance(stride, int) else stride
    for axis in (0, 1):
        whole, rest = divmod(active.shape[1 + axis], stride[axis])
        if size[axis] not in (whole, whole + (rest > 0)):
            return None
    coarse = torch.zeros(active.shape[0], *size, dtype=torch.bool)
    for image, y, x in active.nonzero().tolist():
        if y // stride[0] < size[0] and x // stride[1] < size[1]:
            coarse[image, y // stride[0], x // stride[1]] = True
    return Mask(coarse)


def compare(layer: nn.Module, ours: nn.Module, channels: int, scene: tuple[Tensor, int, int]) -> None:
    """`layer` is the dense layer of the simulation, `ours` the one applied to a SparseTensor (it may be the same)."""
    active, side, seed = scene
    torch.manual_seed(seed)
    b, gh, gw = active.shape
    dense = torch.randn(b, channels, gh * side, gw * side, dtype=torch.float64, requires_grad=True)
    mask = Mask(active)
    try:
        out = layer(mask.apply(dense))
    except RuntimeError:  # no output pixel at all, or a padding that torch refuses
        out = None
    x = dense.detach().clone().requires_grad_()
    sparse = sf.SparseTensor.from_dense(x, sf.ActivePatches(active))
    fits = out is not None and out.shape[2] % gh == 0 and out.shape[3] % gw == 0
    fits = fits and out.shape[2] // gh == out.shape[3] // gw
    if not fits and out is not None:
        size = tuple(out.shape[2:])
        mask = cells(active, layer.stride, size) if side == 1 else Mask(at_pixels(active, size))
    if mask is None or out is None:
        with pytest.raises((ValueError, RuntimeError) if out is None else ValueError):
            ours(sparse)
        return
    FITTED["convolution" if isinstance(layer, nn.Conv2d) else "pooling"] += 1
    out = mask.apply(out)
    result = ours(sparse)
    assert result.shape == out.shape
    assert gap(result.to_dense(), out, floor=1e-3) < TIGHT
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad((out * upstream).sum(), [dense, *layer.parameters()])
    found = torch.autograd.grad((result.to_dense() * upstream).sum(), [x, *ours.parameters()])
    for ours_grad, true_grad in zip(found, wanted, strict=True):
        assert gap(ours_grad, true_grad, floor=1e-3) < TIGHT


@RUNS
@given(scenes(), windows(), st.sampled_from([(1, 1), (3, 5), (4, 4), (6, 9)]), st.integers(0, 2), st.booleans(),
       st.booleans())  # fmt: skip
def test_convolution(scene, window, channels, grouping, bias, swapped):
    c_in, c_out = channels
    groups = {0: 1, 1: 3 if c_in % 3 == 0 and c_out % 3 == 0 else 1, 2: c_in}[grouping]
    c_out = c_out if c_out % groups == 0 else 2 * groups  # depthwise with a multiplier
    torch.manual_seed(0)
    layer = nn.Conv2d(c_in, c_out, groups=groups, bias=bias, dtype=torch.float64, **window)
    ours = layer
    if swapped:
        ours = sf.nn.SparseConv2d(c_in, c_out, groups=groups, bias=bias, dtype=torch.float64, **window)
        ours.load_state_dict(layer.state_dict())
    compare(layer, ours, c_in, scene)


def _a_window_misses_the_image(window: dict, ceil_mode: bool, scene) -> bool:
    active, side = scene[:2]
    for axis in (0, 1):
        length = active.shape[1 + axis] * side
        kernel, stride, padding, dilation = (window[k][axis] for k in ("kernel_size", "stride", "padding", "dilation"))
        for output in range(
            -(-(length + 2 * padding) // stride) if ceil_mode else (length + 2 * padding) // stride + 1
        ):
            start = output * stride - padding
            if start < length and not any(0 <= start + k * dilation < length for k in range(kernel)):
                return True
    return False


@RUNS
@given(scenes(), windows(), st.sampled_from(["max", "avg"]), st.booleans(), st.booleans(),
       st.sampled_from([None, 1, 5]), st.booleans())  # fmt: skip
def test_pooling(scene, window, kind, ceil_mode, count_include_pad, divisor, swapped):
    window["padding"] = tuple(min(p, k // 2) for p, k in zip(window["padding"], window["kernel_size"], strict=True))
    if kind == "max":
        options = {**window, "ceil_mode": ceil_mode}
        # The gradient of PyTorch's own dense pooling writes out of bounds where a window lies wholly in the padding.
        assume(not _a_window_misses_the_image(window, ceil_mode, scene))
        dense, sparse = nn.MaxPool2d, sf.nn.SparseMaxPool2d
    else:
        del window["dilation"]
        options = {
            **window, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor_override": divisor
        }  # fmt: skip
        dense, sparse = nn.AvgPool2d, sf.nn.SparseAvgPool2d
    compare(dense(**options), (sparse if swapped else dense)(**options), 3, scene)


def test_the_examples_are_not_all_refusals():
    if not any(FITTED.values()):
        pytest.skip("the property tests were not run in this process")
    assert all(count > 100 for count in FITTED.values()), FITTED


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    layer = nn.Conv2d(3, 4, 3 if padding == "same" else 1, padding=padding, dtype=torch.float64)
    compare(layer, layer, 3, (torch.tensor([[[True, False], [True, True]]]), 4, 0))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_exact_or_refused(mode):
    active = torch.tensor([[[True, False], [True, True]]])
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    try:
        compare(layer, layer, 3, (active, 4, 0))
    except (ValueError, NotImplementedError) as error:
        assert "pad" in str(error) or mode in str(error)


def test_a_batch_without_active_patches():
    active = torch.zeros(2, 2, 3, dtype=torch.bool)
    for layer, channels in ((nn.Conv2d(3, 4, 3, padding=1).double(), 3), (nn.MaxPool2d(2), 3), (nn.AvgPool2d(2), 3)):
        compare(layer, layer, channels, (active, 4, 0))
