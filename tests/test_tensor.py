"""SparseTensor and the rules: what works on it equals the dense simulation, what does not is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import spark_fast as sf


@pytest.fixture
def pair():
    """A sparse tensor and the same as a zero-filled dense one, (2, 6, 6, 8) with patches of side 2."""
    patches = sf.ActivePatches(sf.random_patch_mask(2, (3, 4), 0.5))
    x = sf.SparseTensor.from_dense(torch.randn(2, 6, 6, 8), patches)
    return x, x.to_dense()


def mask_of(x: sf.SparseTensor) -> torch.Tensor:
    return x.patches.active[:, None].repeat_interleave(x.side, 2).repeat_interleave(x.side, 3)


def test_tensors_without_values_are_refused():
    patches = sf.ActivePatches(torch.ones(2, 3, 4, dtype=torch.bool, device="meta"), per_image=12)
    with pytest.raises(ValueError, match="SparseTensor: features are on meta"):
        sf.SparseTensor.from_dense(torch.zeros(2, 6, 6, 8, device="meta"), patches)


def test_it_answers_as_an_image_batch(pair):
    x, dense = pair
    assert x.shape == dense.shape and x.size(1) == 6 and x.dim() == x.ndim == 4 and len(x) == 2
    assert (
        x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad and x.numel() == x.features.numel()
    )
    assert x.permute(0, 2, 3, 1).shape == (2, 6, 8, 6)
    assert "SparseTensor(shape=(2, 6, 6, 8)" in repr(x)


def test_to_dense_fills(pair):
    x, dense = pair
    mask = mask_of(x)
    assert torch.equal(x.to_dense(fill=3.0), torch.where(mask, dense, 3.0))
    token = torch.randn(6)
    assert torch.equal(x.to_dense(fill=token), torch.where(mask, dense, token.view(1, 6, 1, 1)))
    assert torch.equal(x.permute(0, 2, 3, 1).to_dense(), dense.permute(0, 2, 3, 1))


POINTWISE = {
    "relu": lambda x: F.relu(x),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish in place": lambda x: F.hardswish(x * 1, inplace=True),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "sigmoid": lambda x: x.sigmoid() * x,
    "scalar right": lambda x: 1 - 2 / (x * x + 1) ** 2,
    "add": lambda x: x + x.abs() - (-x),
    "in place": lambda x: (x * 1).add_(x).mul_(0.5),
    "per channel": lambda x: x * torch.arange(6.0).view(1, 6, 1, 1) + torch.ones(6, 1, 1),
    "per image": lambda x: x * torch.tensor([2.0, 3.0]).view(2, 1, 1, 1),
    "per image and channel": lambda x: torch.arange(12.0).view(2, 6, 1, 1) + x,
    "full map": lambda x: x * torch.arange(48.0).view(1, 1, 6, 8) + torch.arange(8.0),
    "channels last": lambda x: (x.permute(0, 2, 3, 1) * torch.arange(6.0)).permute(0, 3, 1, 2),
    "prelu": lambda x: F.prelu(x, torch.arange(6.0)),
    "cat": lambda x: torch.cat((x, x * 2), dim=1),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: torch.split(x, [1, 5], dim=1)[1],
    "slice": lambda x: x[:, 2:4] + x[:, -2:],
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(3, 6), torch.ones(3)).permute(0, 3, 1, 2),
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2),
    "double": lambda x: x.double().to(torch.float32),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_equals_the_dense_form_masked(name, pair):
    x, dense = pair
    before = x.features.clone()
    out, expected = POINTWISE[name](x), POINTWISE[name](dense)
    assert isinstance(out, sf.SparseTensor) and out.shape == expected.shape
    torch.testing.assert_close(out.to_dense(), expected * mask_of(x))
    assert torch.equal(x.features, before)


def test_in_place_changes_the_tensor_itself(pair):
    x, dense = pair
    same = x
    x += 1
    x.relu_()
    assert x is same
    torch.testing.assert_close(x.to_dense(), (dense + 1).relu() * mask_of(x))


def test_means_cover_the_active_pixels_of_each_image():
    active = torch.tensor([[[1, 0, 1]], [[0, 0, 0]]], dtype=torch.bool)  # the second image has none
    images = torch.randn(2, 3, 2, 6)
    x = sf.SparseTensor.from_dense(images, sf.ActivePatches(active))
    expected = torch.stack((images[0][:, :, [0, 1, 4, 5]].mean((1, 2)), torch.zeros(3)))
    torch.testing.assert_close(x.mean((2, 3)), expected)
    torch.testing.assert_close(x.permute(0, 2, 3, 1).mean((-3, -2), keepdim=True).flatten(1), expected)
    torch.testing.assert_close(F.adaptive_avg_pool2d(x, 1).flatten(1), expected)
    equal = sf.SparseTensor.from_dense(images[:1], sf.ActivePatches(active[:1], per_image=2))
    torch.testing.assert_close(equal.mean((2, 3)), expected[:1])


def test_local_operations_run_dense_with_one_warning(pair):
    x, dense = pair
    sf.rules.registry._warned.clear()
    with pytest.warns(UserWarning, match="interpolate.*no sparse rule"):
        out = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(out.to_dense(), F.interpolate(dense, scale_factor=2, mode="bilinear") * mask_of(out))


REFUSED = {
    "mean over everything": lambda x: x.mean(),
    "flatten": lambda x: x.flatten(1),
    "sum over the batch": lambda x: x.sum(0),
    "softmax over the width": lambda x: x.softmax(3),
    "max with indices over the width": lambda x: x.max(3),
    "tokens meet positions": lambda x: x.flatten(2) + torch.ones(48),
    "convolution of tokens": lambda x: F.conv1d(x.flatten(2), torch.ones(1, 6, 3)),
    "norm over the tokens": lambda x: F.layer_norm(x.flatten(2), (24,)),
    "linear over the tokens": lambda x: F.linear(x.flatten(2), torch.ones(3, 24)),
    "channels into rows": lambda x: x.view(2, 6 * 6, 8),
    "batch into rows": lambda x: x.reshape(2 * 6 * 6, 8),
    "half of the rows": lambda x: x.view(2, 6, 2, 3, 8),
    "view": lambda x: x.view(2, -1),
    "softmax": lambda x: x.softmax(-1),
    "layer norm over the width": lambda x: F.layer_norm(x, (8,)),
    "linear over the width": lambda x: F.linear(x, torch.ones(3, 8)),
    "pad alone": lambda x: F.pad(x, (1, 1, 1, 1)).relu(),
    "pad of channels": lambda x: F.pad(x, (1, 1, 1, 1, 1, 1)),
    "fft": lambda x: torch.fft.fft2(x),
    "matmul": lambda x: x @ x,
    "sort": lambda x: x.sort(),
    "spatial slice": lambda x: x[:, :, 1:],
    "first image": lambda x: x[0],
    "cat of images": lambda x: torch.cat((x, x)),
    "truth": lambda x: bool(x),
    "pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "convolution channels last": lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.ones(1, 8, 1, 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name, pair):
    with pytest.raises(sf.SparseOpError):
        REFUSED[name](pair[0])


def test_the_refusal_names_operation_module_and_way_out(pair):
    with pytest.raises(sf.SparseOpError, match=r"unfold.*called in Unfold.*@spark_fast\.rule"):
        torch.nn.Unfold(3)(pair[0])


@pytest.mark.parametrize(
    "write", [lambda z, x: z.add_(x), lambda z, x: torch.add(x, 1.0, out=z), lambda z, x: z.__imul__(x)]
)
def test_writing_into_a_dense_tensor_is_refused(write, pair):
    x, dense = pair
    with pytest.raises(sf.SparseOpError, match="dense tensor"):
        write(torch.ones_like(dense), x)


def test_half_precision_means_do_not_overflow():
    for active in (torch.ones(1, 1, 5), torch.tensor([[[1, 1, 0]], [[1, 0, 0]]])):
        patches = sf.ActivePatches(active.bool())
        x = sf.SparseTensor(torch.full((patches.rows(28), 2), 60.0, dtype=torch.float16), patches, 28)
        mean = x.mean((2, 3))
        assert mean.dtype == torch.float16 and torch.equal(mean, torch.full_like(mean, 60.0))


def test_gradients_can_be_asked_of_a_sparse_tensor(pair):
    x, _ = pair
    assert x.requires_grad_() is x and x.requires_grad
    (x * 2).features.sum().backward()
    assert torch.equal(x.features.grad, torch.full_like(x.features, 2.0))


def test_type_as_works_both_ways(pair):
    x, dense = pair
    assert x.type_as(dense.double()).dtype == torch.float64
    double = dense.double().type_as(x)
    assert isinstance(double, torch.Tensor) and double.dtype == torch.float32


def test_fake_tensors_are_refused_and_leave_no_trace(pair):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, dense = pair
    with FakeTensorMode() as mode, pytest.raises((TypeError, RuntimeError)):
        F.max_pool2d(sf.SparseTensor(mode.from_tensor(x.features), x.patches, x.side), 2)
    torch.testing.assert_close(F.max_pool2d(x, 2).to_dense(), F.max_pool2d(dense, 2) * mask_of(F.max_pool2d(x, 2)))


def test_mismatched_operands_are_named(pair):
    x, _ = pair
    other = sf.SparseTensor(x.features, sf.ActivePatches(x.patches.active), 2)
    with pytest.raises(ValueError, match="different ActivePatches"):
        x + other
    with pytest.raises(ValueError, match="shapes"):
        x + F.max_pool2d(x, 2)
    with pytest.raises(ValueError, match="side"):
        sf.SparseTensor(x.features, x.patches, 0)
    with pytest.raises(AttributeError, match="to_dense"):
        _ = x.no_such_thing


def test_a_rule_can_be_registered(pair):
    x, _ = pair
    with pytest.raises(sf.SparseOpError):
        torch.special.expit(x)
    sf.rule(torch.special.expit)(lambda t: t.with_features(torch.special.expit(t.features)))
    try:
        assert torch.equal(torch.special.expit(x).features, x.features.sigmoid())
    finally:
        del sf.rules.RULES[torch.special.expit]
