"""Densify: norm, mask token and projection of each stage, against the plain formula."""

import copy

import pytest
import simulation
import torch
from simulation import Mask, gap, gradients, random_mask, stir

import spark_fast as sf
from spark_fast import densify

GRID, CHANNELS, WIDTH = (2, 3), [24, 12, 7], 24


def case(active: torch.Tensor, norm: str, channels=CHANNELS, first_side: int = 1):
    """Ours and the plain module with the same parameters, and maps of three stages, coarsest first."""
    torch.manual_seed(0)
    widths = [WIDTH >> k for k in range(len(channels))]
    ours = stir(sf.Densify(channels, widths, norm)).double()
    plain = simulation.Densify(channels, range(len(channels)), WIDTH, norm).double()
    plain.load_state_dict(ours.state_dict())
    b, gh, gw = active.shape
    sides = [first_side * 2**k for k in range(len(channels))]
    return ours, plain, [torch.randn(b, c, gh * s, gw * s).double() for c, s in zip(channels, sides, strict=True)]


MASKS = {
    "equal": random_mask(3, GRID, 2),
    "unequal": torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]).bool(),
    "all": torch.ones(2, *GRID, dtype=torch.bool),
}


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("first_side", [1, 2])  # 2: a patch of twice the stride
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("coarsest", [24, 10])  # with and without a projection there
def test_equals_the_formula(norm, which, first_side, training, coarsest):
    active = MASKS[which]
    ours, plain, maps = case(active, norm, [coarsest, *CHANNELS[1:]], first_side)
    ours.train(training), plain.train(training)
    mine, theirs = ([m.clone().requires_grad_() for m in maps] for _ in range(2))
    patches = sf.ActivePatches(active)
    out = ours([sf.SparseTensor.from_dense(m, patches) for m in mine])
    mask = Mask(active)
    truth = list(plain([mask.apply(m) for m in theirs], mask).values())
    assert len(out) == len(truth) == 3
    upstream = [torch.randn_like(t) for t in truth]
    for o, t in zip(out, truth, strict=True):
        assert o.shape == t.shape and gap(o, t) < 1e-11
    sum((o * u).sum() for o, u in zip(out, upstream, strict=True)).backward()
    sum((t * u).sum() for t, u in zip(truth, upstream, strict=True)).backward()
    for m, t in zip(mine, theirs, strict=True):
        assert gap(m.grad, t.grad, 1e-6) < 1e-9
    a, b = gradients(ours), gradients(plain)
    assert a.keys() == b.keys()
    # Where nothing is masked a token's gradient is 0: the difference of two sums of about 1.
    floor = {n: 1.0 if which == "all" and "mask_tokens" in n else 1e-6 for n in b}
    assert all(gap(a[n], b[n], floor[n]) < 1e-9 for n in b)
    buffers = dict(plain.named_buffers())
    assert all(gap(v, buffers[n]) < 1e-11 for n, v in ours.named_buffers())


def test_masked_pixels_hold_the_token():
    torch.manual_seed(0)
    densify = sf.Densify([8], [8], "none")  # no norm, no projection: what comes out is the filled map
    active = MASKS["unequal"]
    image = torch.randn(3, 8, 4, 6)
    (out,) = densify([sf.SparseTensor.from_dense(image, sf.ActivePatches(active))])
    seen = Mask(active).at(4, 6, torch.float32).bool()
    assert torch.equal(out, torch.where(seen, image, densify.mask_tokens[0]))


def test_tokens_start_small_and_random():
    torch.manual_seed(0)
    for token, channels in zip(sf.Densify([512, 256], [64, 32], "bn").mask_tokens, [512, 256], strict=True):
        assert token.shape == (1, channels, 1, 1)
        assert 0.008 < float(token.detach().std()) < 0.02 and float(token.detach().abs().max()) <= 0.02


@pytest.mark.parametrize("norm", ["bn", "ln"])
@pytest.mark.parametrize("change", ["norm hook", "projection hook", "momentum"])
def test_what_is_not_its_own_runs_as_it_is(norm, change):
    """A hook is called and may change what passes; a module's own settings count. The rest stays to rounding."""
    active = MASKS["unequal"]
    ours, _, maps = case(active, norm)
    other = copy.deepcopy(ours)
    calls = []
    if change == "momentum":
        for module in (m for m in other.norms if norm == "bn"):
            module.momentum = None  # a cumulative average: after the first batch, the batch's own statistics
    else:
        for module in other.norms if change == "norm hook" else [other.projs[0]]:
            module.register_forward_hook(lambda module, args, out: calls.append(out))
    patches = sf.ActivePatches(active)
    results = []
    for module in (ours, other):
        leaves = [m.clone().requires_grad_() for m in maps]
        out = module([sf.SparseTensor.from_dense(m, patches) for m in leaves])
        upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in out]
        torch.autograd.backward(out, upstream)
        results.append([*out, *(m.grad for m in leaves), *gradients(module).values()])
    assert all(gap(a, b, 1e-6) < 1e-11 for a, b in zip(*results, strict=True))
    assert len(calls) == {"norm hook": 3, "projection hook": 1, "momentum": 0}[change]
    if change == "momentum" and norm == "bn":
        assert not torch.equal(other.norms[0].running_mean, ours.norms[0].running_mean)
    assert all(int(m.num_batches_tracked) == 1 for m in (*ours.norms, *other.norms) if norm == "bn")


@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_no_pass_of_its_own_for_token_and_fill(norm, monkeypatch):
    """The token is part of the norm's bias before a 3x3 projection; where there is none the norm fills the maps."""
    active = MASKS["equal"]
    ours, _, maps = case(active, norm)
    ran = []
    for name in ("project", "batch_norm_scatter", "layer_norm_scatter"):
        real = getattr(densify, name)
        monkeypatch.setattr(
            densify, name, lambda *a, name=name, real=real, **k: ran.append((name, k.get("relative"))) or real(*a, **k)
        )
    patches = sf.ActivePatches(active)
    ours([sf.SparseTensor.from_dense(m, patches) for m in maps])
    first = {"bn": "batch_norm_scatter", "ln": "layer_norm_scatter"}[norm]
    assert ran == [(first, None), ("project", True), ("project", True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_near(norm, dtype, autocast):
    """Parameters of the rows' dtype, or float32 ones under autocast."""
    active = MASKS["equal"]
    ours, plain, maps = case(active, norm)
    module = copy.deepcopy(ours).to(torch.float32 if autocast else dtype)
    patches, mask = sf.ActivePatches(active), Mask(active)
    inputs = [sf.SparseTensor.from_dense(m.to(dtype), patches) for m in maps]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = module(inputs)
    truth = plain([mask.apply(m.to(dtype).double()) for m in maps], mask).values()
    for o, t in zip(out, truth, strict=True):
        assert o.dtype == dtype and gap(o, t) < 4 * torch.finfo(dtype).eps
    sum(o.float().square().sum() for o in out).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_hooks_on_every_projection_run_and_change_nothing_else(name):
    torch.manual_seed(0)
    spark = sf.SparK(name, img_size=64, patch_size=32, decoder_width=320).eval()
    images, active = torch.randn(2, 3, 64, 64), spark.random_mask(2)
    before, seen = spark(images, active), []
    for module in (*spark.densify.projs, spark.decoder.proj):
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    torch.testing.assert_close(spark(images, active), before)
    assert set(seen) == {*spark.densify.projs, spark.decoder.proj}
    for module in (*spark.densify.projs, spark.decoder.proj):
        module.register_forward_hook(lambda module, args, out: out * 100)
    assert abs(spark(images, active) - before) > 1e-3
