"""Whole networks as benchmark cases: encoders with generic weights, and SparK written as plain dense PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import spark_fast as sf
from bench.layers import pairs
from bench.settings import PATCH, TINY
from spark_fast.evaluate.speed import MaskedDense

SMALL = {
    "resnet": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}


def model_kwargs(name: str) -> dict:
    """Arguments that make the network small in a tiny run."""
    return next((small for family, small in SMALL.items() if TINY and name.startswith(family)), {})


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Makes a fresh network's parameters generic: zero-initialised norms and layer scales of 1e-6 would hide errors."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("gamma", "bn3.weight")):
                parameter.add_(0.3)
    return model


def conv_mlp_state(state: dict[str, torch.Tensor], like: nn.Module) -> dict[str, torch.Tensor]:
    """`state` with Linear weights (O, C) as 1x1 convolutions (O, C, 1, 1) wherever `like` has those."""
    return {name: state[name].view(value.shape) for name, value in like.state_dict().items()}


def dense_forms(encoder: sf.Encoder) -> dict[str, sf.Encoder]:
    """The same network as one writes it for speed: ConvNeXt's MLPs as Linear on (B, H, W, C) or as 1x1 convolutions."""
    if not encoder.name.startswith("convnext"):
        return {"as given": encoder}
    other = sf.Encoder(encoder.name, model_kwargs={"conv_mlp": True, **model_kwargs(encoder.name)})
    other.load_state_dict(conv_mlp_state(encoder.state_dict(), other))
    return {"linear": encoder, "convolution": other}


def useful_flops(encoder: sf.Encoder, images: torch.Tensor, active: torch.Tensor) -> float:
    """Of forward + backward of the convolutions and linear layers, active pixels only."""
    dense, total = MaskedDense(encoder, active).eval(), 0.0
    seen: dict[tuple, int] = {}

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 3 * 2 * active.sum().item() * (output.shape[1] // active.shape[1]) ** 2 * module.weight.numel()
        elif inputs[0].shape[2] >= active.shape[1]:  # not on a squeezed map
            side = inputs[0].shape[2] // active.shape[1]
            window = (side, module.kernel_size[0], module.stride[0], module.padding[0])
            if window not in seen:
                seen[window] = pairs(active, *window)
            passes = 3 if module.in_channels > 3 else 2  # nobody asks for the gradient of the images
            total += passes * 2 * seen[window] * module.in_channels // module.groups * module.out_channels

    for module in dense.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        dense(images)
    return total


class UpBlock(nn.Module):
    """Twice the resolution; parameters named as in `spark_fast.decoder`."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.up_sample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True),
            nn.Conv2d(channels, half, 3, padding=1, bias=False), nn.BatchNorm2d(half),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.up_sample(x))


class PlainDecoder(nn.Module):
    """The decoder in plain PyTorch; run it in channels-last."""

    def __init__(self, decoder: sf.Decoder):
        super().__init__()
        blocks, width = len(decoder.dec), decoder.width
        self.dec = nn.ModuleList(UpBlock(width >> k) for k in range(blocks))
        self.proj = nn.Conv2d(width >> blocks, decoder.proj.out_channels, 1)
        self.load_state_dict(decoder.state_dict())

    def forward(self, maps: list[torch.Tensor | None]) -> torch.Tensor:
        x = maps[0]
        for k, block in enumerate(self.dec):
            if 0 < k < len(maps) and maps[k] is not None:
                x = x + maps[k]
            x = block(x)
        return self.proj(x)


class PlainDensify(nn.Module):
    """Norm, fill and projection of dense maps, coarsest first.

    Batch norms cover the whole map, which only training mode shows; masked statistics would cost more.
    """

    def __init__(self, densify: sf.Densify):
        super().__init__()
        self.norms = nn.ModuleList(_plain_norm(norm) for norm in densify.norms)
        self.projs = nn.ModuleList(_plain_projection(proj) for proj in densify.projs)
        self.mask_tokens = nn.ParameterList(nn.Parameter(t.detach().clone()) for t in densify.mask_tokens)
        self.load_state_dict(densify.state_dict())

    def forward(self, maps: list[torch.Tensor], active: torch.Tensor) -> list[torch.Tensor]:  # active (B, gh, gw)
        dense = []
        for x, norm, proj, token in zip(maps, self.norms, self.projs, self.mask_tokens, strict=True):
            if isinstance(norm, nn.LayerNorm):
                x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = norm(x)
            mask = F.interpolate(active[:, None].float(), size=x.shape[2:]).bool()
            dense.append(proj(torch.where(mask, x, token.to(x.dtype))))
        return dense


def _plain_norm(norm: nn.Module) -> nn.Module:
    if isinstance(norm, nn.BatchNorm2d):
        return nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    return nn.LayerNorm(norm.normalized_shape, norm.eps) if isinstance(norm, nn.LayerNorm) else nn.Identity()


def _plain_projection(proj: nn.Module) -> nn.Module:
    if not hasattr(proj, "weight"):
        return nn.Identity()
    out, channels, kernel, _ = proj.weight.shape
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2)


class DenseSparK(nn.Module):
    """SparK with everything dense and channels-last, for one mask."""

    def __init__(self, spark: sf.SparK, encoder: sf.Encoder, active: torch.Tensor):
        super().__init__()
        self.encoder = MaskedDense(encoder, active)
        self.densify, self.decoder = PlainDensify(spark.densify), PlainDecoder(spark.decoder)
        self.scales, self.active = spark.scales, active
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.densify(self.encoder(images)[::-1], self.active)
        by_scale = dict(zip(self.scales, maps, strict=True))
        prediction = self.decoder([by_scale.get(k) for k in range(max(by_scale) + 1)])
        return plain_loss(prediction, images, self.active)


def plain_loss(prediction: torch.Tensor, images: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Mean squared error against the per-patch normalised pixels, over the masked patches: computed for all of them."""
    target, guess = _patchify(images), _patchify(prediction)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = (guess - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)  # (B, gh, gw)
    masked = (~active).to(error.dtype)
    return (error * masked).sum() / masked.sum()


def _patchify(images: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, gh, gw, values of a patch)
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(b, h // PATCH, w // PATCH, -1)
