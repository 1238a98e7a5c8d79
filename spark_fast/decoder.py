"""The hierarchical decoder: a light U-Net from the coarsest map to the image (paper, section 3.2)."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from spark_fast.ops.conv import dense_conv2d, up_conv2d
from spark_fast.ops.linear import linear
from spark_fast.ops.norm import batch_norm_dense


class DenseConv2d(nn.Conv2d):
    """nn.Conv2d with a 3x3 kernel and padding 1 (`spark_fast.ops.conv.dense_conv2d`)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dense_conv2d(input, self.weight, self.bias)


class UpBlock(nn.Module):
    """Doubles the resolution: (B, in, H, W) -> (B, out, 2H, 2W), to which `skip` of that shape, if any, is added."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(in_channels, in_channels, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            DenseConv2d(in_channels, in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU6(inplace=True),
            DenseConv2d(in_channels, out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        up, conv = self.up_sample, self.conv
        if is_own(up, nn.ConvTranspose2d) and is_own(conv[0], DenseConv2d) and conv[0].bias is None:
            x = up_conv2d(x, up.weight, up.bias, conv[0].weight)
        else:
            x = conv[0](up(x))
        x = conv[3](_norm_activation(x, conv[1], conv[2]))
        return _norm_activation(x, conv[4], None, skip)


def is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is `module` what this package made, with nothing hooked onto it, so that a fused op may stand for its forward?"""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = type(module) is kind and not hooks
    if own and kind is nn.ConvTranspose2d:
        settings = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
        own = settings == ((4, 4), (2, 2), (1, 1), (0, 0), (1, 1)) and module.groups == 1 and module.bias is not None
    return own


def _norm_activation(
    x: torch.Tensor, norm: nn.Module, activation: nn.Module | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """activation(norm(x) + residual), in one pass if they are what `UpBlock` made; others run as they are."""
    fused = is_own(norm, nn.BatchNorm2d) and norm.momentum is not None
    fused = fused and (residual is None or residual.dtype == x.dtype)
    if not fused or not (activation is None or is_own(activation, nn.ReLU6)):
        x = norm(x)
        x = x if residual is None else x + residual
        return x if activation is None else activation(x)
    running, use_batch = running_statistics(norm)
    return batch_norm_dense(
        x, *running, norm.weight, norm.bias, use_batch, norm.momentum, norm.eps,
        None if activation is None else "relu6", residual,
    )  # fmt: skip


def running_statistics(norm: nn.BatchNorm2d) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], bool]:
    """What `norm` gives its function when it runs now, which is counted: running mean and variance, and whether the
    batch's own statistics are used."""
    track = norm.training and norm.track_running_stats
    if track and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    use_batch = norm.training or norm.running_mean is None
    return (norm.running_mean, norm.running_var) if track or not use_batch else (None, None), use_batch


class Decoder(nn.Module):
    """log2(total_stride) blocks, each halving the width and doubling the resolution, then a 1x1 convolution.

    Args:
        total_stride: the encoder's, a power of two.
        width: channels at the coarsest map; must be divisible by `total_stride`.
        out_chans: image channels.

    Raises:
        ValueError: `width` does not fit.
    """

    def __init__(self, total_stride: int, width: int = 768, out_chans: int = 3):
        super().__init__()
        if width < total_stride or width % total_stride:
            raise ValueError(
                f"decoder_width must be a multiple of the total stride {total_stride} (it is halved at each scale); "
                f"got {width}"
            )
        self.width = width
        blocks = total_stride.bit_length() - 1
        widths = [width >> k for k in range(blocks + 1)]
        self.dec = nn.ModuleList(UpBlock(a, b) for a, b in itertools.pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], out_chans, 1)
        self.apply(_init)

    def forward(self, maps: list[torch.Tensor | None]) -> torch.Tensor:
        """Prediction (B, out_chans, H, W).

        Args:
            maps: entry k is added before block k: (B, width >> k, h << k, w << k), or None. The first is not None.
        """
        x = maps[0]
        for k, block in enumerate(self.dec, start=1):
            skip = maps[k] if k < min(len(maps), len(self.dec)) else None
            x = block(x) if skip is None else block(x, skip)
        if not is_own(self.proj, nn.Conv2d):
            return self.proj(x)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        pixels = linear(rows, self.proj.weight.flatten(1), self.proj.bias)
        return pixels.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
