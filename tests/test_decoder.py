"""The decoder against a plainly written one with the same names."""

import copy

import pytest
import simulation
import torch
from simulation import gap, gradients, stir

from spark_fast import Decoder


def maps_for(width: int, sizes: dict[int, tuple[int, int]], batch: int = 2) -> dict[int, torch.Tensor]:
    return {k: torch.randn(batch, width // 2**k, *hw, dtype=torch.float64) for k, hw in sizes.items()}


@pytest.mark.parametrize(
    ("stride", "width", "channels", "sizes"),
    [
        (32, 64, 3, {0: (2, 3), 1: (4, 6), 2: (8, 12), 3: (16, 24)}),
        (32, 32, 1, {0: (1, 1)}),
        (32, 64, 5, {0: (3, 1), 2: (12, 4)}),  # no map at one of the scales
        (16, 48, 3, {0: (2, 2), 1: (4, 4), 3: (16, 16)}),
        (8, 8, 4, {0: (3, 2), 1: (6, 4), 2: (12, 8)}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_plain_decoder(stride, width, channels, sizes, training):
    torch.manual_seed(0)
    ours = stir(Decoder(stride, width, channels)).double().train(training)
    plain = simulation.Decoder(width, stride.bit_length() - 1, channels).double().train(training)
    plain.load_state_dict(ours.state_dict())
    maps = maps_for(width, sizes)
    out = ours([maps.get(k) for k in range(max(sizes) + 1)])
    truth = plain(maps)
    assert out.shape == (2, channels, sizes[0][0] * stride, sizes[0][1] * stride)
    assert gap(out, truth) < 1e-11
    upstream = torch.randn_like(truth)
    out.backward(upstream), truth.backward(upstream)
    mine, theirs = gradients(ours), gradients(plain)
    floor = 1e-5 * max(float(g.norm()) for g in theirs.values())
    assert mine.keys() == theirs.keys()
    assert all(gap(mine[n], theirs[n], floor) < 1e-9 for n in theirs)
    buffers = dict(plain.named_buffers())
    assert all(gap(b, buffers[n]) < 1e-11 for n, b in ours.named_buffers())


def test_initial_values():
    torch.manual_seed(0)
    decoder = Decoder(32, 768, 3)
    for block in decoder.dec:
        for k in (0, 3):
            assert float(block.conv[k].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert block.conv[k].bias is None
        up = block.up_sample.weight.detach()
        # kaiming-normal, fan_out of a transposed convolution's (in, out, 4, 4) weight as torch counts it
        assert float(up.std()) == pytest.approx((2 / (up.shape[0] * 16)) ** 0.5, rel=0.1)
        assert not block.up_sample.bias.any()
        for k in (1, 4):
            assert (block.conv[k].weight == 1).all() and not block.conv[k].bias.any()
    assert not decoder.proj.bias.any()


@pytest.mark.parametrize("width", [0, 16, 33, 100])
def test_bad_width(width):
    with pytest.raises(ValueError, match="width"):
        Decoder(32, width)


class Doubled(torch.nn.ReLU6):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def cumulative(block) -> None:
    block.conv[1].momentum = block.conv[4].momentum = None


def untracked(block) -> None:
    for k in (1, 4):
        block.conv[k] = torch.nn.BatchNorm2d(block.conv[k].num_features, track_running_stats=False, dtype=torch.float64)


def other_activation(block) -> None:
    block.conv[2] = Doubled(inplace=False)


def other_norm(block) -> None:
    block.conv[1] = torch.nn.GroupNorm(1, block.conv[1].num_features, dtype=torch.float64)


@pytest.mark.parametrize("change", [cumulative, untracked, other_activation, other_norm])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_whose_parts_were_changed_runs_them(change, training):
    torch.manual_seed(0)
    block = stir(Decoder(2, 32, 3)).double().dec[0]
    change(block)
    block.train(training)
    plain = torch.nn.Sequential(copy.deepcopy(block.up_sample), *copy.deepcopy(block.conv))
    for k in (1, 4):
        plain[k].__class__ = torch.nn.Conv2d
    for _ in range(2):
        x = torch.randn(2, 32, 4, 6, dtype=torch.float64)
        assert gap(block(x), plain(x)) < 1e-11
    ours, theirs = dict(block.conv.named_buffers()), dict(plain.named_buffers())
    assert all(gap(ours[n], theirs[f"{int(n.split('.')[0]) + 1}.{n.split('.')[1]}"]) < 1e-11 for n in ours)
