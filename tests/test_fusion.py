"""Operations that join those before them: which do, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import spark_fast as sf
from spark_fast import fusion

CHANNELS = 6


@pytest.fixture
def joined(monkeypatch):
    """What was computed, in order: (activation, whether there is a shortcut) of norms, "mlp", "linear", and ("scale",
    whether there is a shortcut)."""
    calls = []
    norm, mlp, linear = fusion.batch_apply, fusion.mlp, fusion.PendingLinear.compute
    scale = fusion.PendingScale.compute

    def recorded(features, mean, rstd, training, weight, bias, activation, residual):
        calls.append((activation, residual is not None))
        return norm(features, mean, rstd, training, weight, bias, activation, residual)

    monkeypatch.setattr(fusion, "batch_apply", recorded)
    monkeypatch.setattr(fusion, "mlp", lambda *a: calls.append("mlp") or mlp(*a))
    monkeypatch.setattr(
        fusion.PendingScale, "compute", lambda self: calls.append(("scale", self.residual is not None)) or scale(self)
    )
    monkeypatch.setattr(fusion.PendingLinear, "compute", lambda self: calls.append("linear") or linear(self))
    return calls


class Block(nn.Module):
    """A convolution, then whatever `end(block, y, x)` makes of its result y and the block's input x."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.side = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.up, self.down = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS, bias=False)
        self.drop, self.gamma = nn.Dropout(0.0), nn.Parameter(torch.randn(CHANNELS))
        self.end = end

    def forward(self, x):
        return self.end(self, self.conv(x), x)


class Net(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, 4)
        self.blocks = nn.ModuleList(Block(end) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return [x]


def add_in_place(block, y, x):
    y = block.bn(y)
    y += x
    return F.relu(y, inplace=True)


def add_a_projection(block, y, x):
    y = block.bn(y)
    x = block.side(x)
    y += x
    return F.relu(y)


def activate_and_read_both(block, y, x):
    before = block.bn(y)
    return F.relu(before) * 2 + before


def add_twice(block, y, x):
    y = block.bn(y) + x
    return F.relu(y + x)


def last(function):
    """An end of the block: `function(block, y)` with the channels last."""
    return lambda block, y, x: function(block, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


def mlp_of_convolutions(block, y, x):
    up, down = (layer.weight[:, :, None, None] for layer in (block.up, block.down))
    return F.conv2d(F.gelu(F.conv2d(y, up, block.up.bias)), down, None, (1, 1), "same")


def mlp_and_hidden(block, y):
    before = block.up(y)
    hidden = F.gelu(before)
    return block.down(hidden) + block.down(before) + block.down(hidden * 2)


def convnext(block, y, x):
    y = block.down(F.gelu(block.up(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
    return y.mul(block.gamma.reshape(1, -1, 1, 1)) + x


def scale_in_place(block, y, x):
    y = y * block.gamma[:, None, None]
    y += x
    return y


# name -> (the end, what is joined in each block)
ENDS = {
    "relu": (lambda block, y, x: F.relu(block.bn(y)), [("relu", False)]),
    "silu": (lambda block, y, x: nn.SiLU()(block.bn(y) + x), [("silu", True)]),
    "relu in place": (lambda block, y, x: nn.ReLU(inplace=True)(block.bn(y)), [("relu", False)]),
    "relu_": (lambda block, y, x: block.bn(y).relu_(), [("relu", False)]),
    "method": (lambda block, y, x: block.bn(y).relu(), [("relu", False)]),
    "ReLU6": (lambda block, y, x: nn.ReLU6(inplace=True)(block.bn(y)), [("relu6", False)]),
    "F.relu6": (lambda block, y, x: F.relu6(block.bn(y)), [("relu6", False)]),
    "hardtanh": (lambda block, y, x: F.hardtanh(block.bn(y)), [(None, False)]),
    "silu in place": (lambda block, y, x: F.silu(block.bn(y), inplace=True), [("silu", False)]),
    "gelu": (lambda block, y, x: F.gelu(block.bn(y)), [(None, False)]),
    "norm alone": (lambda block, y, x: block.bn(y), [(None, False)]),
    "sum": (lambda block, y, x: F.relu(block.bn(y) + x), [("relu", True)]),
    "sum from the left": (lambda block, y, x: (x + block.bn(y)).relu_(), [("relu", True)]),
    "torch.add": (lambda block, y, x: torch.relu(torch.add(block.bn(y), x)), [("relu", True)]),
    "scaled sum": (lambda block, y, x: torch.add(block.bn(y), x, alpha=2), [(None, False)]),
    "no relu": (lambda block, y, x: block.bn(y) + x, [(None, True)]),
    "add in place": (add_in_place, [("relu", True)]),
    "projection": (add_a_projection, ["linear", (None, False), ("relu", True)]),
    "into the shortcut": (lambda block, y, x: (x * 1).add_(block.bn(y)), [(None, False)]),
    "twice itself": (lambda block, y, x: (lambda z: z + z)(block.bn(y)), [(None, False)]),
    "both": (activate_and_read_both, [("relu", False), (None, False)]),
    "two sums": (add_twice, [(None, True)]),
    "mlp": (last(lambda block, y: block.down(F.gelu(block.up(y)))), ["mlp"]),
    "mlp, nothing dropped": (last(lambda block, y: block.down(block.drop(nn.GELU()(block.up(y))))), ["mlp"]),
    "mlp of convolutions": (mlp_of_convolutions, ["mlp"]),
    "linear": (last(lambda block, y: block.down(block.up(y))), ["linear", "linear"]),
    "other gelu": (last(lambda block, y: block.down(F.gelu(block.up(y), approximate="tanh"))), ["linear", "linear"]),
    "two gelus": (last(lambda block, y: block.down(F.gelu(F.gelu(block.up(y))))), ["linear", "linear"]),
    "mlp with a norm inside": (
        last(lambda block, y: block.down(F.layer_norm(F.gelu(block.up(y)), (4 * CHANNELS,)))),
        ["linear", "linear"],
    ),
    "mlp and its inside": (last(mlp_and_hidden), ["mlp", "linear", "linear", "linear", "linear"]),
    "convnext": (convnext, ["mlp", ("scale", True)]),
    "scale": (lambda block, y, x: y * block.gamma[:, None, None], [("scale", False)]),
    "scale, then add": (scale_in_place, [("scale", True)]),
    "scale from the left": (lambda block, y, x: block.gamma[None, :, None, None] * y + x, [("scale", True)]),
    "scale, channels last": (last(lambda block, y: torch.mul(y, block.gamma)), [("scale", False)]),
    "scale and relu": (lambda block, y, x: F.relu(y * block.gamma[:, None, None] + x), [("scale", True)]),
    "scale of a norm": (
        lambda block, y, x: block.bn(y) * block.gamma[:, None, None] + x,
        [(None, False), ("scale", True)],
    ),
    "scale of all": (lambda block, y, x: y * block.gamma[0] + x, []),
    "scale in place": (lambda block, y, x: (y * 1).mul_(block.gamma[:, None, None]) + x, []),
    "scale of images": (lambda block, y, x: y * block.gamma[: len(y), None, None, None] + x, []),
    "number": (lambda block, y, x: F.relu(block.bn(y) + 1), [(None, False)]),
}


def images(dtype=torch.float64):
    active = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 1]]], dtype=torch.bool)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sf.SparseTensor.from_dense(pixels.to(dtype), sf.ActivePatches(active))


def encoder(end, dtype=torch.float64) -> sf.Encoder:
    torch.manual_seed(1)
    return sf.Encoder(Net(end)).to(dtype).train()


def run(model, x, fused=True):
    """The map, all gradients and all statistics; not fused: the model on the same rows, without its encoder's help."""
    model = copy.deepcopy(model)
    (out,) = model(x) if fused else model.model(x)
    weights = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out.features * weights.to(out.dtype)).sum().backward()
    return out.features.detach(), [p.grad for p in model.parameters() if p.grad is not None], list(model.buffers())


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("training", [True, False])
def test_norms_join_what_follows(training, name, joined):
    end, expected = ENDS[name]
    model = encoder(end).train(training)
    joined.clear()  # of probing
    ours = run(model, images())
    assert joined == 2 * expected
    plain = run(model, images(), fused=False)
    assert len(joined) == 2 * len(expected)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_050", "densenet121", "resnetv2_50", "efficientnet_b0", "convnext_atto"]
)
def test_networks_compute_what_they_did(name, joined):
    torch.manual_seed(0)
    model = sf.Encoder(name).double().train()
    active = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]], dtype=torch.bool)
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for fused in (True, False):
        at = copy.deepcopy(model)
        at.fuse = fused
        maps = at(sf.SparseTensor.from_dense(pixels, sf.ActivePatches(active)))
        sum(m.features.square().mean() for m in maps).backward()
        results.append(([m.features for m in maps], [p.grad for p in at.parameters()], list(at.buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert sum(call not in ("linear", (None, False), ("scale", False)) for call in joined) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_sum_is_rounded_once(dtype):
    model = encoder(add_in_place, torch.float32)
    exact = run(model.double(), images())[0]
    model.float()
    with torch.autocast("cpu", dtype):
        ours, plain = (run(model, images(torch.float32), fused)[0] for fused in (True, False))
    assert ours.dtype == plain.dtype == dtype
    error, allowed = ((t.double() - exact).abs().mean() for t in (ours, plain))
    assert error < allowed


def test_a_pending_result_answers_without_its_rows(joined):
    def end(block, y, x):
        for out, channels in ((block.bn(y), CHANNELS), (F.conv2d(y, block.up.weight[:, :, None, None]), 4 * CHANNELS)):
            assert out.shape == (y.shape[0], channels, *y.shape[2:]) and out.dtype == y.dtype and out.ndim == 4
            assert out.numel() == y.numel() // CHANNELS * channels and out.device == y.device
            assert out.is_floating_point() and not out.is_cuda
        assert not joined
        return block.bn(y)

    model = encoder(lambda block, y, x: block.bn(y))
    for block in model.model.blocks:
        block.end = end
    del model.model.blocks[1]
    joined.clear()
    model(images())
    assert joined == [(None, False)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_who_reads_without_gradients_does_not_cut_them(mode):
    def end(block, y, x):
        out = block.bn(y)
        with mode():
            assert out.features.isfinite().all()
        return F.relu(out)

    model = encoder(ENDS["relu"][0])
    plain = run(model, images(), fused=False)
    for block in model.model.blocks:
        block.end = end
    torch.testing.assert_close(run(model, images()), plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "mlp of convolutions", "convnext", "scale", "scale, channels last"])
def test_results_are_cast_as_their_parts_are(name):
    model = encoder(ENDS[name][0], torch.float32)
    exact = run(copy.deepcopy(model).double(), images())[0]
    with torch.autocast("cpu", torch.bfloat16):
        (ours, grads, _), (plain, plain_grads, _) = (
            run(model, images(torch.float32), fused) for fused in (True, False)
        )
    assert ours.dtype == plain.dtype and [g.dtype for g in grads] == [g.dtype for g in plain_grads]
    assert_as_exact(ours, plain, exact, name)


def test_a_linear_map_outside_of_autocast_is_cast_as_inside():
    """What it is cast to is known when it is called, wherever its rows are read."""
    rows = []

    def end(block, y, x):
        with torch.autocast("cpu", torch.bfloat16):
            up = F.conv2d(y, block.up.weight[:, :, None, None])
        rows.append(up.features.dtype)
        return y

    encoder(end, torch.float32)(images(torch.float32))
    assert rows == [torch.bfloat16] * len(rows)


def test_an_mlp_keeps_one_hidden_map():
    model = encoder(ENDS["mlp"][0])
    kept = []
    for fused in (True, False):
        out = model(images()) if fused else model.model(images())
        nodes, seen, sizes = [out[0].features.grad_fn], set(), {}
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [at for at, _ in node.next_functions]
            tensors = getattr(node, "saved_tensors", ()) or [getattr(node, "_saved_self", None)]
            sizes.update({t.data_ptr(): t.shape for t in tensors if isinstance(t, torch.Tensor)})
        kept.append(sum(shape == (out[0].features.shape[0], 4 * CHANNELS) for shape in sizes.values()))
    assert kept == [2, 4]


def test_a_wrong_linear_map_is_named_where_it_is_called():
    def end(block, y, x):
        with pytest.raises(ValueError, match=r"linear: .*weight \(out, channels\)"):
            F.linear(y.permute(0, 2, 3, 1), block.down.weight)
        with pytest.raises(TypeError, match="weight is"):
            F.conv2d(y, block.up.weight[:, :, None, None].half())
        return y

    encoder(end)(images())


def test_a_shortcut_that_is_written_to_later_was_read_before():
    def end(block, y, x):
        shortcut = x * 1
        out = block.bn(y) + shortcut
        shortcut.mul_(3)
        return F.relu(out)

    model = encoder(end)
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


def test_a_write_unseen_is_an_error():
    def end(block, y, x):
        shortcut = x * 1
        rows = shortcut.features
        out = block.bn(y) + shortcut
        rows.mul_(3)
        return F.relu(out)

    with pytest.raises(RuntimeError, match="changed in place before"):
        encoder(end)(images())


def test_statistics_are_there_at_once_and_in_order():
    """One norm for two maps, the second of which is read first."""
    seen = []

    def end(block, y, x):
        before = block.bn.running_mean.clone()
        first = block.bn(y)
        seen.append(not torch.equal(before, block.bn.running_mean))
        second = block.bn(x)
        return F.relu(second) - F.relu(first)

    model = encoder(end)
    seen.clear()
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)
    assert all(seen)


def test_nothing_is_pending_when_the_encoder_is_done(joined):
    """What a hook holds is not computed from the weights of a later step."""
    held = []
    model = encoder(lambda block, y, x: F.relu(block.bn(y)))
    bn = model.model.blocks[0].bn
    bn.register_forward_hook(lambda module, args, output: held.extend((args[0].features, output)))
    (out,) = model(images())
    assert joined.count((None, False)) == 1
    rows, normal = held
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.testing.assert_close(normal.features, (rows - rows.mean(0)) / (rows.var(0, correction=0) + bn.eps).sqrt())
    joined.clear()
    for later in (out, normal):
        F.relu(bn(later))
    assert not joined


def test_without_gradients_nothing_is_pending(joined):
    model = encoder(add_in_place)
    with torch.no_grad():
        model(images())
    assert not joined
    model.requires_grad_(False)(images())
    assert not joined


def test_an_error_in_the_model_ends_the_run(joined):
    held = []

    def end(block, y, x):
        held.append(block.bn(y))
        raise ZeroDivisionError

    model = encoder(lambda block, y, x: block.bn(y))
    for block in model.model.blocks:
        block.end = end
    with pytest.raises(ZeroDivisionError):
        model(images())
    joined.clear()
    assert held[0].features.isfinite().all() and joined == [(None, False)]
    assert not held[0].fusion.open


class Checkpointed(Net):
    """The second block is computed again in the backward; the first one's result may be pending before it."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return [checkpoint(self.blocks[1], x, use_reentrant=False)]


@pytest.mark.parametrize("name", ["no relu", "relu in place", "projection", "norm alone", "both", "mlp", "linear"])
def test_regions_that_are_computed_again(name, joined):
    torch.manual_seed(1)
    model = sf.Encoder(Checkpointed(ENDS[name][0])).double().eval()
    plain = Net(ENDS[name][0]).double().eval()
    plain.load_state_dict(model.model.state_dict())
    for size in (1, 2):  # a region's first run and its second are alike in each step
        ours, theirs = copy.deepcopy(model), copy.deepcopy(plain)
        for net in (ours, theirs):
            (out,) = net(images())
            (out.features * size).square().sum().backward()
        grads = [[p.grad for p in net.parameters()] for net in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    assert joined


def test_a_region_keeps_nothing_more():
    torch.manual_seed(1)
    model = sf.Encoder(Checkpointed(add_in_place)).double().train()
    made = []
    for block in model.model.blocks:
        block.conv.register_forward_hook(
            lambda module, args, output: made.append(StorageWeakRef(output.features.untyped_storage()))
        )
    out = model(images())
    assert [storage.expired() for storage in made] == [False, True]
    del out


def relu_in_no_grad(block, y, x):
    y = block.bn(y)
    with torch.no_grad():
        gate = F.relu(y)
    return y * gate


def sum_in_no_grad(block, y, x):
    y = block.bn(y)
    with torch.no_grad():
        gate = y + x
    return y * gate


def gelu_in_no_grad(block, y):
    y = block.up(y)
    with torch.no_grad():
        gate = F.gelu(y)
    return block.down(y * gate)


def in_place_in_no_grad(block, y, x):
    y = block.bn(y)
    with torch.no_grad():
        y.relu_()
    return y * 1


@pytest.mark.parametrize("end", [relu_in_no_grad, sum_in_no_grad, last(gelu_in_no_grad), in_place_in_no_grad])
def test_what_is_computed_without_gradients_is_a_constant(end):
    model = encoder(end)
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


def region(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def mlp_from_its_gelu_on(block, y):
    return region(lambda h: block.down(F.gelu(h)), block.up(y))


# The region begins with what would join the pending result from outside of it.
REGIONS = {
    "relu": lambda block, y, x: region(lambda h: block.conv(F.relu(h)), block.bn(y)),
    "relu in place": lambda block, y, x: region(lambda h: block.conv(h.relu_()), block.bn(y)),
    "sum": lambda block, y, x: region(lambda h, s: block.conv(F.relu(h + s)), block.bn(y), x),
    "gelu": last(mlp_from_its_gelu_on),
}


@pytest.mark.parametrize("name", REGIONS)
def test_nothing_in_a_region_joins_what_is_outside(name):
    model = encoder(REGIONS[name])
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_what_drops_nothing_gives_what_pytorch_gives(inplace, training):
    """Its input itself."""

    def end(block, y, x):
        before = block.bn(y)
        after = F.dropout(before, 0.0, training, inplace)
        after += x
        return before * 2 + after

    model = encoder(end)
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


def test_a_constant_scale_keeps_no_map(joined):
    def end(block, y, x):
        y = y * 1
        scaled = y * block.gamma.detach()[:, None, None]
        y += x
        return scaled + y

    model = encoder(end)
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)
    assert not joined


def test_a_number_promotes_no_dtype():
    channel = images(torch.bfloat16)
    channel = channel.with_features(channel.features[:, :1])
    channel.fusion = fusion.Fusion()
    number = torch.ones((), requires_grad=True)
    assert (channel * number).dtype == torch.bfloat16
    assert (channel * number.reshape(1)).dtype == torch.float32


def test_orders_of_dimensions_are_not_mixed_up():
    x = images()
    rows = torch.randn(len(x.features), 32, dtype=torch.float64, requires_grad=True)
    x = x.with_features(rows)  # (2, 32, 32, 32)
    x.fusion = fusion.Fusion()
    last_channels = x.permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match="sparse tensors of shapes"):
        F.batch_norm(x, None, None, training=True) + last_channels


def test_a_shortcut_that_went_through_the_dense_map_may_be_written_to():
    def end(block, y, x):
        shortcut = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        out = block.bn(y) + shortcut
        shortcut.add_(1)
        return F.relu(out) + shortcut

    with pytest.warns(UserWarning, match="dense"):
        sf.rules.registry._warned.clear()
        model = encoder(end)
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", [F.relu, F.gelu])
def test_own_rules_come_first(function, monkeypatch):
    monkeypatch.setitem(sf.rules.registry.RULES, function, lambda x, **_: x.with_features(x.features * 7))
    mlp = last(lambda block, y: block.down(function(block.up(y))))
    model = encoder(mlp if function is F.gelu else lambda block, y, x: function(block.bn(y)))
    torch.testing.assert_close(run(model, images()), run(model, images(), fused=False), rtol=1e-12, atol=1e-13)


def test_other_data_of_a_weight_is_an_error():
    """As where a layer computes with rounded weights for a moment."""

    def end(block, y, x):
        exact = block.up.weight.data
        block.up.weight.data = exact.round()
        y = block.up(y.permute(0, 2, 3, 1))
        block.up.weight.data = exact
        return block.down(F.gelu(y)).permute(0, 3, 1, 2)

    with pytest.raises(RuntimeError, match="changed in place before"):
        encoder(end)(images())


@pytest.mark.parametrize("first", [None, torch.bfloat16])
def test_linear_maps_of_two_types_are_no_mlp(first, joined):
    def end(block, y):
        with torch.autocast("cpu", first or torch.bfloat16, enabled=first is not None):
            y = F.gelu(block.up(y))
        with torch.autocast("cpu", torch.float16):
            return block.down(y).float()

    model = encoder(last(end), torch.float32)
    ours, plain = (run(model, images(torch.float32), fused)[0] for fused in (True, False))
    assert "mlp" not in joined
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_pending_result_is_pickled_as_its_rows():
    def end(block, y, x):
        y = block.bn(y)
        again = pickle.loads(pickle.dumps(y))
        torch.testing.assert_close(again.features, y.features)
        return y

    encoder(end)(images())


def test_it_can_be_turned_off(joined):
    model = encoder(add_in_place)
    model.fuse = False
    model(images())
    assert not joined
