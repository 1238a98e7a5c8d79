"""Group norm with the statistics of each image: every backend against PyTorch's own on its active pixels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, value_and_grads
from watching import no_waiting

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import backend as backends
from spark_fast.ops import tuning
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.group_norm.images import patch_starts

BACKENDS = ["cpu", "library", "reference"]
# channels, groups: one channel in a group, one group, channels that fill no vectors, rows that are joined
GROUPS = [(6, 3), (1, 1), (5, 5), (7, 1), (65, 13), (64, 32), (130, 10)]
SIDES = [1, 3]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param, "group_norm"):
        yield request.param


def rows_of(patches: sf.ActivePatches, side: int) -> list[int]:
    """Active pixels of each image."""
    return (patches.active.flatten(1).sum(1) * side**2).tolist()


def pytorchs(x, patches, side, groups, w=None, b=None):
    """Of images that consist of the active pixels only, one by one; F.group_norm but for refusing a single value."""
    images = [torch.group_norm(i.t()[None], groups, w, b)[0].t() for i in x.split(rows_of(patches, side)) if len(i)]
    tied = sum(0 * t.sum() for t in (x, w, b) if t is not None)  # without images too
    return torch.cat(images) + tied if images else x * 1 + tied


def samples(patches, side, channels, affine, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(100 + channels)  # not that of the gradient

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [draw(channels), draw(channels)] if affine else []
    x = draw(patches.rows(side), channels) * (1 + draw(channels).abs()) + 3 * draw(channels)
    return [t.to(device, dtype) for t in (x, *weights)]


def moved(patches, device):
    return patches if device == "cpu" else sf.ActivePatches(patches.active.to(device))


def check(patches, side, channels, groups, dtype, affine=True, device="cpu"):
    inputs, there = samples(patches, side, channels, affine, dtype, device), moved(patches, device)
    ours, our_grads = value_and_grads(lambda x, *wb: group_norm(x, there, side, groups, *wb), *inputs)

    def theirs_of(x, *wb):
        return pytorchs(x, patches, side, groups, *wb)

    theirs, their_grads = value_and_grads(theirs_of, *inputs)
    oracle, grads = value_and_grads(theirs_of, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    # A sum for the mean, two for the variance; six steps of the formula.
    terms = 3 * max([1, *rows_of(patches, side)]) * (channels // groups) + 6
    assert_as_exact(ours, theirs, oracle, "forward", terms)
    for name, mine, own, exact in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=False):
        assert mine.dtype == dtype
        # Products of two normal draws reach 4.
        size = 4 * (largest_slope(inputs[0], patches, side, groups, *inputs[1:2]) if name == "input" else 1)
        assert_as_exact(mine, own, exact, f"grad {name}", max(terms, len(inputs[0])), size)


def largest_slope(x, patches, side, groups, weight=None) -> float:
    """How large the terms of the input's gradient are, which cancel the more the fewer values a group has."""
    images = [i.reshape(len(i), groups, -1) for i in x.double().split(rows_of(patches, side)) if len(i)]
    slopes = [(i.var((0, 2), correction=0) + 1e-5).rsqrt().max().item() for i in images]
    return max(slopes, default=0) * (1 if weight is None else weight.abs().max().item())


# One pixel alone, of as many groups as channels, is a case of its own below.
CASES = [
    (mask, side) for mask in ("equal", "unequal", "all", "one", "none") for side in (1, 3) if (mask, side) != ("one", 1)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "groups"), GROUPS)
@pytest.mark.parametrize(("patches", "side"), CASES, indirect=["patches"])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_pytorchs_on_the_active_pixels(affine, patches, side, channels, groups, dtype, backend):
    check(patches, side, channels, groups, dtype, affine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_value_is_its_own_mean(dtype, backend):
    check_one_value(dtype)


def check_one_value(dtype, device="cpu"):
    """PyTorch refuses a single value."""
    patches = sf.ActivePatches((torch.arange(9) == 4).view(1, 3, 3).to(device))
    x, w, b = (t.to(device, dtype) for t in (torch.randn(1, 5) + 100, torch.randn(5), torch.randn(5)))
    out, grads = value_and_grads(lambda *t: group_norm(t[0], patches, 1, 5, *t[1:]), x, w, b)
    assert torch.equal(out[0], b)
    # Nothing but the rounding of the products, times the reciprocal deviation.
    torch.testing.assert_close(grads[0], torch.zeros_like(x), rtol=0, atol=1e-5**-0.5 * 2**-22)
    assert torch.equal(grads[1], torch.zeros_like(w)) and grads[2].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_half_precision(patches, dtype, backend):
    check(patches, 3, 65, 13, dtype)


@pytest.mark.parametrize(("channels", "groups"), [*GROUPS, (256, 32)])
@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_every_instruction_set(patches, channels, groups, instruction_set):
    check(patches, 3, channels, groups, torch.float32)


@pytest.mark.parametrize(("channels", "groups"), [(6, 3), (5, 5), (64, 32)])
def test_without_masked_pixels_it_is_pytorchs_of_the_maps(channels, groups, backend):
    maps, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, channels, 4, 6), (channels,), (channels,)))
    patches = sf.ActivePatches(torch.ones(2, 2, 3, dtype=torch.bool))

    def sparse(maps, w, b):
        x = sf.SparseTensor.from_dense(maps, patches)
        return x.with_features(group_norm(x.features, patches, 2, groups, w, b)).to_dense()

    ours = value_and_grads(sparse, maps, w, b)
    theirs = value_and_grads(lambda maps, w, b: F.group_norm(maps, groups, w, b), maps, w, b)
    torch.testing.assert_close(ours, theirs)


def test_many_images(backend):
    """More than the CPU kernel's blocks of images, whose sums of the weight's gradient are added afterwards."""
    check(sf.ActivePatches(torch.rand(150, 2, 2) < 0.6), 2, 6, 3, torch.float32)


def far_away(device="cpu"):
    """300,000 rows of mean 1000 and deviation 1, after an image of few, with channels that differ."""
    active = torch.zeros(2, 600, 500, dtype=torch.bool)
    active[0, 0, :3] = active[1] = True
    x = torch.randn(300_003, 4) + torch.tensor([1000.0, 1000.0, 1000.0, 1001.0])
    return x.to(device), sf.ActivePatches(active.to(device))


def check_far_away(device="cpu"):
    # Sums of values or squares kept in float32 would be off by more than the variance of 1.
    x, patches = far_away(device)
    out, grads = value_and_grads(lambda x, w: group_norm(x, patches, 1, 2, w), x, torch.ones(4, device=device))
    where = sf.ActivePatches(patches.active.cpu())
    true, true_grads = value_and_grads(
        lambda x, w: pytorchs(x, where, 1, 2, w, w * 0), x.double(), torch.ones(4, device=device).double()
    )
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1000 * 2**-22)
    torch.testing.assert_close(grads[0].double(), true_grads[0], rtol=0, atol=1000 * 2**-22)
    torch.testing.assert_close(grads[1].double(), true_grads[1], rtol=2**-18, atol=300_000**0.5 * 1000 * 2**-23)


@pytest.mark.parametrize("name", ["cpu", "library"])
def test_many_rows_far_from_zero_keep_their_precision(name):
    with use_backend(name, "group_norm"):
        check_far_away()


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_nan_stays_in_its_image_and_group(patches, backend):
    check_nan(patches)


def check_nan(patches, device="cpu"):
    there, image = moved(patches, device), patches.pixel_coords(2)[:, 0]
    for row in (0, len(image) - 1):  # the first may be what sums are around
        x = torch.randn(len(image), 6, device=device)
        x[row, 3] = torch.nan
        out = group_norm(x, there, 2, 3)
        hit = (image == image[row]).to(device)
        assert out[hit][:, 2:4].isnan().all() and out[hit][:, [0, 1, 4, 5]].isfinite().all()
        assert out[~hit].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows_with_float_weights(dtype, some_patches, backend):
    check_float_weights(dtype, some_patches)


def check_float_weights(dtype, patches, device="cpu"):
    x, w, b = samples(patches, 3, 9, True, torch.float32, device)
    x, there = x.to(dtype), moved(patches, device)
    mine, grads = value_and_grads(lambda *t: group_norm(t[0], there, 3, 3, *t[1:]), x, w, b)
    own, own_grads = value_and_grads(lambda x, *wb: pytorchs(x.float(), patches, 3, 3, *wb).to(dtype), x, w, b)
    exact = [t.double() for t in (x, w, b)]
    true, true_grads = value_and_grads(lambda x, *wb: pytorchs(x, patches, 3, 3, *wb), *exact)
    assert (mine.dtype, *(g.dtype for g in grads)) == (dtype, dtype, torch.float32, torch.float32)
    assert_as_exact(mine, own, true, "forward", 200)
    for name, a, theirs, oracle in zip(("input", "weight", "bias"), grads, own_grads, true_grads, strict=True):
        assert_as_exact(a, theirs, oracle, f"grad {name}", 200)


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_gradcheck(patches, backend):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((patches.rows(1), 6), (6,), (6,)))
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, patches, 1, 3, w, b), (x, w, b))
    assert torch.autograd.gradcheck(lambda x: group_norm(x, patches, 1, 2), (x,))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_wanted_gradients(wanted, some_patches, backend):
    tensors = samples(some_patches, 1, 6, True, torch.float64)

    def grads(needs):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        group_norm(leaves[0], some_patches, 1, 3, *leaves[1:]).square().sum().backward()
        return [t.grad for t in leaves]

    for ours, whole, needed in zip(grads(wanted), grads((True,) * 3), wanted, strict=True):
        assert ours is None if not needed else torch.equal(ours, whole)


# Images for all threads, and fewer, which share an image.
@pytest.mark.parametrize("images", [1, 5, 70])
def test_the_threads_do_not_matter(images):
    patches = sf.ActivePatches(torch.rand(images, 6, 6) < 0.5)
    x, w, b = samples(patches, 8, 24, True, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = value_and_grads(lambda *t: group_norm(t[0], patches, 8, 4, *t[1:]), x, w, b)
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs_and_gradients(some_patches, backend):
    check_strided(some_patches)


def check_strided(patches, device="cpu"):
    rows, there = patches.rows(1), moved(patches, device)
    x, w, b = torch.randn(6, 2 * rows).t()[::2], torch.randn(12)[::2], torch.randn(6, 2)[:, 1]

    def run(*t):
        return group_norm(t[0], there, 1, 3, *t[1:]).t().flatten()  # hands a strided gradient back

    inputs = [t.to(device) for t in (x, w, b)]
    ours, our_grads = value_and_grads(run, *inputs)
    packed, packed_grads = value_and_grads(run, *(t.contiguous() for t in inputs))
    torch.testing.assert_close((ours, *our_grads), (packed, *packed_grads), rtol=0, atol=0)


def test_the_result_is_fresh_and_only_the_input_is_kept(some_patches, backend):
    rows = some_patches.rows(1)
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((rows, 6), (6,), (6,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = group_norm(x, some_patches, 1, 3, w, b)
    assert not out._is_view() and out.is_contiguous()
    assert sorted(tuple(t.shape) for t in kept) == [(2, 3), (2, 3), (6,), (6,), (rows, 6)]
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]
    copy = out.detach().clone()
    out.relu_()
    assert torch.equal(out, copy.relu())
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_no_images_no_pixels_and_no_channels(backend):
    check_empty()


def check_empty(device="cpu"):
    for active in (torch.zeros(0, 2, 3), torch.zeros(2, 2, 3), torch.eye(2)[None]):
        patches = sf.ActivePatches(active.bool().to(device))
        for channels in (6, 0):
            x, w, b = (torch.randn(s, device=device) for s in ((patches.rows(2), channels), (channels,), (channels,)))
            out, grads = value_and_grads(lambda *t: group_norm(t[0], patches, 2, 3, *t[1:], eps=0.0), x, w, b)  # noqa: B023
            assert out.shape == grads[0].shape == x.shape
            assert all(t.isfinite().all() for t in (out, *grads))
            assert len(x) or all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])


def check_statistics_without_pixels(run, device="cpu"):
    patches = sf.ActivePatches(torch.tensor([[[True, True]], [[False, False]], [[True, False]]], device=device))
    _, mean, rstd = run.forward(torch.randn(patches.rows(2), 6, device=device), None, None, 3, 1e-5, patches, 2)
    assert torch.equal(mean[1], torch.zeros_like(mean[1])) and torch.equal(rstd[1], torch.ones_like(rstd[1]))
    assert mean.all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_an_image_without_pixels_has_mean_0_and_deviation_1(name):
    with use_backend(name, "group_norm"):
        check_statistics_without_pixels(backends.select("group_norm", torch.device("cpu")))


def test_the_library_waits_for_nothing():
    patches = sf.ActivePatches(torch.rand(3, 4, 5) < 0.5)
    x, w, b = (t.requires_grad_() for t in samples(patches, 2, 6, True, torch.float32))
    with use_backend("library", "group_norm"), no_waiting():
        group_norm(x, patches, 2, 3, w, b).sum().backward()


@pytest.mark.parametrize("patches", ["equal", "unequal", "none"], indirect=True)
def test_where_the_patches_of_an_image_begin(patches):
    with no_waiting():
        starts = patch_starts(patches)
    image = patches.coords[:, 0]
    assert starts.tolist() == [int((image < i).sum()) for i in range(patches.batch + 1)]


def test_bad_arguments_are_named(some_patches):
    x = torch.randn(some_patches.rows(2), 6)
    for groups in (0, 4, 12):
        with pytest.raises(ValueError, match=f"groups={groups} does not divide the 6 channels"):
            group_norm(x, some_patches, 2, groups)
    with pytest.raises(ValueError, match="features must be"):
        group_norm(x, some_patches, 1, 3)
    with pytest.raises(TypeError, match="features must be floating point"):
        group_norm(x.long(), some_patches, 2, 3)
    with pytest.raises(ValueError, match="weight must have one value for each of the 6 channels"):
        group_norm(x, some_patches, 2, 3, torch.ones(3))
    with pytest.raises(TypeError, match="bias must be floating point"):
        group_norm(x, some_patches, 2, 3, None, torch.ones(6, dtype=torch.int64))


HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("channels", "groups"), GROUPS)
@pytest.mark.parametrize(("patches", "side"), CASES, indirect=["patches"])
def test_triton(patches, side, channels, groups, on_triton):
    check(patches, side, channels, groups, torch.float32, device=on_triton)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_triton_half_precision(patches, dtype, on_triton):
    check(patches, 3, 65, 13, dtype, device=on_triton)


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
@pytest.mark.parametrize("affine", [True, False])
def test_triton_groups_over_several_tiles(affine, patches, on_triton):
    """Tiles of fewer channels than a group, and of fewer rows than an image, by parts."""
    with tuning.forced({"TILE": 64, "BLOCK_C": 8, "num_warps": 2}):
        for channels, groups in ((20, 1), (26, 2), (12, 12)):
            check(patches, 3, channels, groups, torch.float32, affine, on_triton)


def test_triton_sums_of_a_group_in_several_tiles(monkeypatch, patches, on_triton):
    from spark_fast.ops.group_norm import triton

    monkeypatch.setattr(triton, "VALUES", 16)
    monkeypatch.setattr(triton, "LEAST_TILES", 1)
    with tuning.forced({"TILE": 32, "BLOCK_C": 8, "num_warps": 2}):
        check(patches, 3, 21, 3, torch.float32, device=on_triton)


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
@pytest.mark.parametrize("number", range(3))
def test_triton_in_every_configuration(number, patches, on_triton):
    from spark_fast.ops.group_norm import configs

    with tuning.forced(configs.TILES[number]):
        check(patches, 7, 130, 10, torch.float32, device=on_triton)


def test_triton_many_rows_far_from_zero_keep_their_precision(on_triton):
    check_far_away(on_triton)


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_triton_nan_stays_in_its_image_and_group(patches, on_triton):
    check_nan(patches, on_triton)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_triton_one_value_is_its_own_mean(dtype, on_triton):
    check_one_value(dtype, on_triton)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_half_rows_with_float_weights(dtype, some_patches, on_triton):
    check_float_weights(dtype, some_patches, on_triton)


def test_triton_strided_inputs_and_gradients(some_patches, on_triton):
    check_strided(some_patches, on_triton)


def test_triton_without_images_pixels_or_channels(on_triton):
    check_empty(on_triton)


def test_triton_an_image_without_pixels_has_mean_0_and_deviation_1(on_triton):
    check_statistics_without_pixels(backends.select("group_norm", on_triton), on_triton)


@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_triton_repeats_bit_for_bit(patches, on_triton):
    inputs, there = samples(patches, 8, 24, True, torch.float32, on_triton), moved(patches, on_triton)

    def run(*t):
        return group_norm(t[0], there, 8, 4, *t[1:])

    first, again = ((out, *grads) for out, grads in (value_and_grads(run, *inputs) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_triton_leaves_float64_to_the_library(some_patches, on_triton):
    x = torch.randn(some_patches.rows(1), 6, dtype=torch.float64, device=on_triton)
    with pytest.raises(sf.BackendError, match="float64"):
        group_norm(x, moved(some_patches, on_triton), 1, 3)
