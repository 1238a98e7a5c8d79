"""timm's and PyTorch's modules on sparse tensors.

Two oracles. A module that looks at no neighbours must do to the active pixels of an image what it does to an image of
them alone: (B, C, 1, K). Any module must do to a sparse tensor without masked pixels what it does to the dense one.
"""

from __future__ import annotations

import pytest
import timm.layers as tl
import torch
from timm.layers import cbam, coord_attn, grn, norm, pool2d_same, selective_kernel, squeeze_excite
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientSqueezeExcite
from timm.models.cspnet import DarkBlock
from torch import nn
from torch.nn.utils import parametrizations

import spark_fast as sf

BATCH, CHANNELS, SIDE, GRID = 3, 16, 4, (2, 3)


class ChannelShuffle(nn.Module):
    """As ShuffleNet does it by hand."""

    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, 4, c // 4, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class SpaceToken(nn.Module):
    """Attention over space in plain PyTorch, channels last."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, -1, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)


class SplitAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = tl.SplitAttn(CHANNELS, kernel_size=1, padding=0, radix=2, norm_layer=nn.BatchNorm2d)

    def forward(self, x):
        return self.module(x)


class ConditionalConv(nn.Module):
    """timm's CondConv2d: a kernel for each image."""

    def __init__(self, **kwargs):
        super().__init__()
        self.conv = tl.CondConv2d(CHANNELS, 8, 3, num_experts=4, bias=True, **kwargs)
        self.routing = nn.Linear(CHANNELS, 4)

    def forward(self, x):
        return self.conv(x, self.routing(x.mean((2, 3))).sigmoid())


class Statistics(nn.Module):
    """Reductions over channels and over space."""

    def forward(self, x):
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1).sqrt()
        z = x.std((2, 3), keepdim=True) + x.amin((2, 3), keepdim=True) + torch.linalg.vector_norm(x, 3, (2, 3), True)
        w = torch.max(x, dim=1, keepdim=True)[0] + x.softmax(1) + nn.functional.normalize(x)
        return y + z * w + x.pow(2).mean((-2, -1), keepdim=True) + x.sum(1, keepdim=True)


# Modules that look at single pixels and at all pixels of an image.
GLOBAL = {
    "GroupNorm": lambda: nn.GroupNorm(4, CHANNELS),
    "GroupNorm1": lambda: tl.GroupNorm1(CHANNELS),
    "GroupNormAct": lambda: tl.GroupNormAct(CHANNELS, group_size=4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "InstanceNorm2d tracking": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
    "BatchNormAct2d": lambda: tl.BatchNormAct2d(CHANNELS),
    "FrozenBatchNormAct2d": lambda: tl.FrozenBatchNormAct2d(CHANNELS),
    "LayerNorm2d": lambda: tl.LayerNorm2d(CHANNELS),
    "LayerNormAct2d": lambda: tl.LayerNormAct2d(CHANNELS),
    "LayerNormExp2d": lambda: norm.LayerNormExp2d(CHANNELS),
    "RmsNorm2d": lambda: tl.RmsNorm2d(CHANNELS),
    "SimpleNorm2d": lambda: tl.SimpleNorm2d(CHANNELS),
    "GlobalResponseNorm": lambda: grn.GlobalResponseNorm(CHANNELS, channels_last=False),
    "GlobalResponseNormMlp": lambda: tl.GlobalResponseNormMlp(CHANNELS, 32, use_conv=True),
    "EvoNorm2dB0": lambda: tl.EvoNorm2dB0(CHANNELS),
    "EvoNorm2dB1": lambda: tl.EvoNorm2dB1(CHANNELS),
    "EvoNorm2dB2": lambda: tl.EvoNorm2dB2(CHANNELS),
    "EvoNorm2dS0": lambda: tl.EvoNorm2dS0(CHANNELS, groups=4),
    "EvoNorm2dS0a": lambda: tl.EvoNorm2dS0a(CHANNELS, group_size=4),
    "EvoNorm2dS1": lambda: tl.EvoNorm2dS1(CHANNELS, groups=4),
    "EvoNorm2dS1a": lambda: tl.EvoNorm2dS1a(CHANNELS, groups=4),
    "EvoNorm2dS2": lambda: tl.EvoNorm2dS2(CHANNELS, groups=4),
    "EvoNorm2dS2a": lambda: tl.EvoNorm2dS2a(CHANNELS, groups=4),
    "FilterResponseNormAct2d": lambda: tl.FilterResponseNormAct2d(CHANNELS),
    "FilterResponseNormTlu2d": lambda: tl.FilterResponseNormTlu2d(CHANNELS),
    "SEModule": lambda: tl.SEModule(CHANNELS, rd_channels=8, add_maxpool=True),
    "EffectiveSEModule": lambda: tl.EffectiveSEModule(CHANNELS, add_maxpool=True),
    "SqueezeExciteCl": lambda: nn.Sequential(
        Permute(0, 2, 3, 1), squeeze_excite.SqueezeExciteCl(CHANNELS), Permute(0, 3, 1, 2)
    ),
    "SqueezeExcite of EfficientNet": lambda: EfficientSqueezeExcite(CHANNELS),
    "EcaModule": lambda: tl.EcaModule(CHANNELS),
    "CecaModule": lambda: tl.CecaModule(CHANNELS),
    "ChannelAttn of CBAM": lambda: cbam.ChannelAttn(CHANNELS),
    "LightChannelAttn": lambda: cbam.LightChannelAttn(CHANNELS),
    "GatherExcite": lambda: tl.GatherExcite(CHANNELS, add_maxpool=True, use_mlp=False),
    "GlobalContext": lambda: tl.GlobalContext(CHANNELS, fuse_add=True),
    "GlobalContext mean": lambda: tl.GlobalContext(CHANNELS, use_attn=False),
    "NonLocalAttn": lambda: tl.NonLocalAttn(CHANNELS),
    "SelectiveKernel": lambda: nn.Sequential(Stack(), selective_kernel.SelectiveKernelAttn(CHANNELS)),
    "SplitAttn": SplitAttention,
    "attention": SpaceToken,
    "ConvMlp": lambda: tl.ConvMlp(CHANNELS, 32),
    "LayerScale2d": lambda: tl.LayerScale2d(CHANNELS, 0.5),
    "channel shuffle": ChannelShuffle,
    "nn.ChannelShuffle": lambda: nn.ChannelShuffle(4),
    "statistics": Statistics,
    "GLU": lambda: nn.GLU(1),
    "PReLU": lambda: nn.PReLU(CHANNELS),
    "Softmax2d": nn.Softmax2d,
    "dropout in evaluation": lambda: nn.Sequential(nn.Dropout2d(0.5), nn.Dropout(0.5)),
}
# Modules that look at neighbours as well.
LOCAL = {
    "Conv2d groups, dilation": lambda: nn.Conv2d(CHANNELS, 32, 3, padding=2, dilation=2, groups=4),
    "Conv2d 1x11": lambda: nn.Conv2d(CHANNELS, CHANNELS, (1, 11), padding=(0, 5), groups=CHANNELS),
    "Conv2dSame": lambda: tl.Conv2dSame(CHANNELS, 8, 3, stride=2),
    "AvgPool2dSame": lambda: pool2d_same.AvgPool2dSame(3, stride=2),
    "MaxPool2dSame": lambda: pool2d_same.MaxPool2dSame(3, stride=2),
    "StdConv2d": lambda: tl.StdConv2d(CHANNELS, 8, 3, padding=1),
    "StdConv2dSame": lambda: tl.StdConv2dSame(CHANNELS, 8, 3, stride=2),
    "ScaledStdConv2d": lambda: tl.ScaledStdConv2d(CHANNELS, 8, 3, padding=1),
    "ScaledStdConv2dSame": lambda: tl.ScaledStdConv2dSame(CHANNELS, 8, 3, stride=2, padding="same"),
    "CondConv2d": lambda: ConditionalConv(stride=2, padding=1),
    "CondConv2dSame": lambda: ConditionalConv(stride=2, padding="same"),
    "CondConv2d depthwise": lambda: ConditionalConv(padding=1, groups=8),
    "MixedConv2d": lambda: tl.MixedConv2d(CHANNELS, CHANNELS, [3, 5, 7], depthwise=True),
    "BlurPool2d": lambda: tl.BlurPool2d(CHANNELS),
    "BlurPool2d of 5": lambda: tl.BlurPool2d(CHANNELS, filt_size=5),
    "BlurPool2d constant": lambda: tl.BlurPool2d(CHANNELS, pad_mode="constant"),
    "reflecting convolution": lambda: nn.Conv2d(CHANNELS, 8, 3, padding=1, padding_mode="reflect"),
    "circular convolution": lambda: nn.Conv2d(CHANNELS, 8, 3, padding=1, padding_mode="circular"),
    "padded max pooling": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1)),
    "padded average pooling": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(3, 2)),
    "cropped pooling": lambda: nn.Sequential(nn.ZeroPad2d((-1, 1, -1, 1)), nn.AvgPool2d(1, 2)),
    "SpatialAttn of CBAM": lambda: cbam.SpatialAttn(),
    "LightCbamModule": lambda: cbam.LightCbamModule(CHANNELS),
    "GatherExcite local": lambda: tl.GatherExcite(CHANNELS, extent=2, use_mlp=False),
    "CoordAttn": lambda: coord_attn.CoordAttn(CHANNELS),
    "SelectiveKernel convolution": lambda: tl.SelectiveKernel(CHANNELS, CHANNELS),
    "SplitAttn convolution": lambda: tl.SplitAttn(CHANNELS, groups=2, norm_layer=nn.BatchNorm2d),
    "SpaceToDepth": lambda: nn.Sequential(tl.SpaceToDepth(4), nn.ReLU(), tl.DepthToSpace(4)),
    "PixelUnshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2)),
    "Upsample": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "DarkBlock": lambda: DarkBlock(CHANNELS, CHANNELS),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, 8, 4, stride=2, padding=1),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(CHANNELS, 8, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(CHANNELS, 8, 3, padding=1)),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "DropBlock2d": lambda: Seeded(tl.DropBlock2d(0.2, 3)),
    "DropBlock2d with noise": lambda: Seeded(tl.DropBlock2d(0.2, 2, with_noise=True, couple_channels=False)),
    "DropPath": lambda: Seeded(tl.DropPath(0.5)),
    "adaptive pooling": lambda: Gate(nn.AdaptiveAvgPool2d((1, 3))),
    "adaptive max pooling": lambda: Gate(nn.AdaptiveMaxPool2d(2)),
}


class Seeded(nn.Module):
    """A random module that draws the same each time."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        torch.manual_seed(5)
        return self.module(x)


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


class Stack(nn.Module):
    """(B, C, H, W) -> (B, 2, C, H, W), and the module after it weighs the two."""

    def forward(self, x):
        return torch.stack([x, x * 2], dim=1)


class Gate(nn.Module):
    """Adaptive pooling leaves the map, which a sum over what it pools comes back to."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return x * self.pool(x).sum((2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def built(make, training: bool) -> nn.Module:
    """The module with parameters and statistics that are all different."""
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
        for name, b in module.named_buffers():
            if "running" in name:
                b.uniform_(0.5, 1.5)
    return module.train(training)


def tolerance(name: str) -> dict[str, float]:
    """timm's EvoNorm and filter response norm compute their variances in float32."""
    return {"rtol": 1e-4, "atol": 1e-4} if name.startswith(("EvoNorm", "Filter")) else {}


def differentiate(out, inputs, module) -> list[torch.Tensor]:
    grads = torch.autograd.grad(out, [inputs, *module.parameters()], torch.ones_like(out).cumsum(-1), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in grads]


def compact(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows (B * K, C) as images (B, C, 1, K) of the active pixels."""
    return rows.view(batch, -1, rows.shape[1]).transpose(1, 2).unsqueeze(2)


def in_both_modes(names) -> list[tuple[str, bool]]:
    """Each name in evaluation and in training mode, but for what draws rows at random in training."""
    return [(name, training) for name in names for training in (False, True) if not training or "dropout" not in name]


@pytest.mark.parametrize(("name", "training"), in_both_modes(GLOBAL))
def test_a_module_does_to_the_active_pixels_what_it_does_to_an_image_of_them(name, training):
    module = built(GLOBAL[name], training)
    again = built(GLOBAL[name], training)
    again.load_state_dict(module.state_dict())
    patches = sf.ActivePatches(sf.random_patch_mask(BATCH, GRID, 0.5))
    rows = torch.randn(patches.rows(SIDE), CHANNELS, requires_grad=True)
    out = module(sf.SparseTensor(rows, patches, SIDE))
    dense = again(compact(rows, BATCH))
    if not isinstance(out, torch.Tensor) and "SelectiveKernel" not in name:
        assert isinstance(out, sf.SparseTensor)
        out = compact(out.features, BATCH)
    torch.testing.assert_close(out, dense, **tolerance(name))
    for mine, theirs in zip(differentiate(out, rows, module), differentiate(dense, rows, again), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(name))
    for mine, theirs in zip(module.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(name))


@pytest.mark.parametrize(
    "name", [n for n in GLOBAL if "attention" not in n and "NonLocal" not in n and "Context" not in n]
)
def test_images_with_different_numbers_of_pixels(name):
    module = built(GLOBAL[name], False)
    active = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]], dtype=torch.bool)
    patches = sf.ActivePatches(active)
    rows = torch.randn(patches.rows(SIDE), CHANNELS, requires_grad=True)
    out = module(sf.SparseTensor(rows, patches, SIDE))
    images = rows.split([int(n) * SIDE**2 for n in active.sum((1, 2))])
    dense = [module(compact(image, 1)) for image in images]
    if isinstance(out, torch.Tensor):
        torch.testing.assert_close(out, torch.cat(dense), **tolerance(name))
        return
    expected = torch.cat([d[0, :, 0].t() for d in dense])
    torch.testing.assert_close(out.features, expected, **tolerance(name))
    mine, theirs = (torch.autograd.grad(o.sin().sum(), rows)[0] for o in (out.features, expected))
    torch.testing.assert_close(mine, theirs, **tolerance(name))


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize(("name", "training"), in_both_modes({**GLOBAL, **LOCAL}))
def test_without_masked_pixels_it_is_the_dense_module(name, training):
    make = {**GLOBAL, **LOCAL}[name]
    module, again = built(make, training), built(make, training)
    again.load_state_dict(module.state_dict())
    patches = sf.ActivePatches(torch.ones(BATCH, *GRID, dtype=torch.bool))
    images = torch.randn(BATCH, CHANNELS, GRID[0] * SIDE, GRID[1] * SIDE, requires_grad=True)
    out = module(sf.SparseTensor.from_dense(images, patches))
    dense = again(images)
    if not isinstance(out, torch.Tensor):
        assert out.shape == dense.shape
        out = out.to_dense()
    torch.testing.assert_close(out, dense, **tolerance(name))
    for mine, theirs in zip(differentiate(out, images, module), differentiate(dense, images, again), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(name))


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize("name", {**GLOBAL, **LOCAL})
def test_what_is_masked_changes_nothing(name):
    """Masked pixels may be NaN, and get no gradient; the result has none of them."""
    module = built({**GLOBAL, **LOCAL}[name], True)
    active = sf.random_patch_mask(BATCH, GRID, 0.5)
    patches = sf.ActivePatches(active)
    mask = active[:, None].repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)
    images = torch.randn(BATCH, CHANNELS, GRID[0] * SIDE, GRID[1] * SIDE)
    images = torch.where(mask, images, torch.nan).requires_grad_()
    out = module(sf.SparseTensor.from_dense(images, patches))
    rows = out if isinstance(out, torch.Tensor) else out.features
    assert rows.isfinite().all()
    if rows.requires_grad:
        (grad,) = torch.autograd.grad(rows.sum(), images, allow_unused=True)
        assert grad is None or (grad.isfinite().all() and not grad.masked_select(~mask).any())


COMPILED = (
    "GroupNorm", "SEModule", "GlobalContext", "NonLocalAttn", "SelectiveKernel", "SplitAttn", "CondConv2d",
    "BlurPool2d", "channel shuffle", "CoordAttn", "statistics", "Upsample", "Conv2dSame",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_modules_are_one_graph(name):
    if name == "GlobalContext" and torch.__version__ < "2.13":
        pytest.skip("older torch.compile does not trace a product of two sequences")
    module = built({**GLOBAL, **LOCAL}[name], False)
    patches = sf.ActivePatches(sf.random_patch_mask(BATCH, GRID, 0.5))
    x = sf.SparseTensor(torch.randn(patches.rows(SIDE), CHANNELS), patches, SIDE)
    out, compiled = module(x), torch.compile(module, backend="eager", fullgraph=True)(x)
    rows = (o if isinstance(o, torch.Tensor) else o.features for o in (compiled, out))
    torch.testing.assert_close(*rows)
