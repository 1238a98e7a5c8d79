"""The dense-masked simulation of SparK: the oracle that the sparse code is tested against.

Everything runs as ordinary dense PyTorch on zero-filled maps (B, C, H, W), and each layer's output is multiplied by the
mask at that layer's resolution. Nothing here imports spark_fast, so that an error there cannot hide here.

Parameters have the names that they have in `spark_fast.SparK`, so a state dict maps by identity:

    encoder.model.<timm key>                                the backbone
    densify.norms.<i>.* densify.projs.<i>.* densify.mask_tokens.<i>        stage i, counted from the coarsest
    decoder.dec.<k>.up_sample.*, decoder.dec.<k>.conv.<0, 1, 3, 4>.*       block k, counted from the coarsest
    decoder.proj.*                                          the last 1x1 convolution
"""

import copy
import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Containers whose own forward only calls its children, adds, permutes or scales per channel: they keep zeros at zero.
CONTAINERS = {
    "ResNet", "Bottleneck", "BasicBlock", "Sequential", "ConvNeXt", "ConvNeXtStage", "ConvNeXtBlock", "Mlp",
    "ModuleList",
}  # fmt: skip
KEEPS_ZERO = {"ReLU", "ReLU6", "GELU", "SiLU", "Identity", "Dropout", "DropPath"}
HEADS = ("global_pool", "fc", "head")  # a classifier takes no part


class Mask:
    """The active patches of a batch, `grid` (B, gh, gw) bool, repeated to any resolution."""

    def __init__(self, grid: Tensor):
        self.grid = grid

    def __deepcopy__(self, memo: dict) -> "Mask":
        return self  # the hooks of a copied simulation still refer to this object

    def at(self, height: int, width: int, dtype: torch.dtype) -> Tensor:  # -> (B, 1, height, width), 1 = active
        gh, gw = self.grid.shape[1:]
        if height % gh or width % gw:
            raise ValueError(f"a map of {height}x{width} is not divisible by the grid {gh}x{gw}")
        fine = self.grid.repeat_interleave(height // gh, 1).repeat_interleave(width // gw, 2)
        return fine[:, None].to(dtype)

    def apply(self, dense: Tensor) -> Tensor:
        """Zero at masked pixels whatever is there, NaN and inf included."""
        active = self.at(*dense.shape[2:], dense.dtype)
        return torch.where(active.bool(), dense, torch.zeros((), dtype=dense.dtype))


def batch_norm(layer: nn.Module, x: Tensor, active: Tensor) -> Tensor:
    """Batch normalisation over the active pixels: x (B, C, H, W), active (B, 1, H, W) of 0 and 1."""
    shape = (1, -1, 1, 1)
    if layer.training or layer.running_mean is None:
        count = active.sum()
        mean = (x * active).sum((0, 2, 3)) / count
        var = ((x - mean.view(shape)).square() * active).sum((0, 2, 3)) / count
        if layer.training and layer.running_mean is not None:
            with torch.no_grad():
                layer.num_batches_tracked += 1
                rate = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
                layer.running_mean += rate * (mean - layer.running_mean)
                layer.running_var += rate * (var * count / (count - 1) - layer.running_var)
    else:
        mean, var = layer.running_mean, layer.running_var
    y = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
    if layer.affine:
        y = y * layer.weight.view(shape) + layer.bias.view(shape)
    return y * active


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, active: Tensor) -> Tensor:
    """Normalisation over the channels of each pixel: x (B, C, H, W)."""
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    y = (x - mean) / (var + eps).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return y * active


def mask_layers(model: nn.Module, mask: Mask) -> nn.Module:
    """A deep copy of a dense model in which every layer's output is multiplied by `mask`.

    `mask.grid` may be exchanged between calls. A layer unknown here raises TypeError: an oracle must not guess.
    """
    model = copy.deepcopy(model)

    def masked_output(layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
        channels_last = isinstance(layer, nn.Linear | nn.LayerNorm) and not type(layer).__name__.endswith("2d")
        if channels_last:  # (B, H, W, C)
            return out * mask.at(out.shape[1], out.shape[2], out.dtype).permute(0, 2, 3, 1)
        return out * mask.at(out.shape[2], out.shape[3], out.dtype)

    def masked_norm(layer: nn.Module, x: Tensor) -> Tensor:
        return batch_norm(layer, x, mask.at(x.shape[2], x.shape[3], x.dtype))

    for name, layer in model.named_modules():
        if name.split(".")[0] in HEADS:
            continue
        if type(layer) is nn.BatchNorm2d:
            layer.forward = types.MethodType(masked_norm, layer)
        elif isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.Linear | nn.LayerNorm):
            layer.register_forward_hook(masked_output)
        elif type(layer).__name__ not in CONTAINERS | KEEPS_ZERO:
            raise TypeError(f"the simulation has no rule for {type(layer).__name__}")
    return model


class Block(nn.Module):
    """Twice the resolution, half the channels."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.up_sample = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
            nn.Conv2d(channels, half, 3, padding=1, bias=False), nn.BatchNorm2d(half),
        )  # fmt: skip


class Decoder(nn.Module):
    def __init__(self, width: int, blocks: int, out_channels: int):
        super().__init__()
        self.dec = nn.ModuleList(Block(width // 2**k) for k in range(blocks))
        self.proj = nn.Conv2d(width // 2**blocks, out_channels, 1)

    def forward(self, maps: dict[int, Tensor]) -> Tensor:  # block index -> (B, width / 2**index, h, w)
        x = 0.0
        for k, block in enumerate(self.dec):
            if k in maps:
                x = x + maps[k]
            x = block.conv(block.up_sample(x))
        return self.proj(x)


class Densify(nn.Module):
    """Norm, mask token and projection of each stage, coarsest first; `depths[i]` is the decoder block that it feeds."""

    def __init__(self, channels: Sequence[int], depths: Sequence[int], width: int, norm: str):
        super().__init__()
        self.norm, self.depths = norm, list(depths)
        make = {
            "bn": nn.BatchNorm2d,
            "ln": lambda c: nn.LayerNorm(c, eps=1e-6),
            "none": lambda c: nn.Identity(),
        }[norm]
        self.norms = nn.ModuleList(make(c) for c in channels)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c in channels)
        self.projs = nn.ModuleList()
        for i, (c, k) in enumerate(zip(channels, depths, strict=True)):
            out = width // 2**k
            kernel = 3 if i else 1
            same = i == 0 and c == out
            self.projs.append(nn.Identity() if same else nn.Conv2d(c, out, kernel, padding=kernel // 2))

    def forward(self, maps: Sequence[Tensor], mask: Mask) -> dict[int, Tensor]:
        out = {}
        for i, x in enumerate(maps):
            active = mask.at(*x.shape[2:], x.dtype)
            layer = self.norms[i]
            if self.norm == "bn":
                x = batch_norm(layer, x, active)
            elif self.norm == "ln":
                x = layer_norm(x, layer.weight, layer.bias, layer.eps, active)
            filled = x * active + self.mask_tokens[i] * (1 - active)
            out[self.depths[i]] = self.projs[i](filled)
        return out


def patchify(images: Tensor, grid: tuple[int, int]) -> Tensor:  # (B, C, H, W) -> (B, gh, gw, values of a patch)
    b, c, h, w = images.shape
    gh, gw = grid
    return images.reshape(b, c, gh, h // gh, gw, w // gw).permute(0, 2, 4, 1, 3, 5).reshape(b, gh, gw, -1)


def unpatchify(patches: Tensor, shape: Sequence[int]) -> Tensor:
    b, c, h, w = shape
    gh, gw = patches.shape[1:3]
    return patches.reshape(b, gh, gw, c, h // gh, w // gw).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def patch_loss(images: Tensor, prediction: Tensor, active: Tensor) -> Tensor:
    """Mean squared error against the per-patch normalised pixels, averaged over the masked patches of the batch."""
    grid = tuple(active.shape[1:])
    target, guess = patchify(images, grid), patchify(prediction, grid)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)  # unbiased
    target = (target - mean) / (var + 1e-6).sqrt()
    error = (guess - target).square().mean(-1)  # (B, gh, gw)
    return error[~active].mean()


class Simulation(nn.Module):
    """SparK as dense-masked PyTorch.

    backbone: a timm ResNet or ConvNeXt, untouched; `names`: its modules that give the maps, finest first, with their
    `channels` and `strides`. `width`: the decoder's; `norm`: "bn", "ln" or "none".
    """

    def __init__(
        self, backbone: nn.Module, names: Sequence[str], channels: Sequence[int], strides: Sequence[int],
        width: int = 768, norm: str = "bn", in_chans: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.mask = Mask(torch.ones(1, 1, 1, dtype=torch.bool))
        self.encoder = nn.Module()
        self.encoder.model = mask_layers(backbone, self.mask)
        self.names = list(names)
        total = strides[-1]
        depths = [int(math.log2(total // s)) for s in reversed(strides)]
        self.densify = Densify(channels[::-1], depths, width, norm)
        self.decoder = Decoder(width, int(math.log2(total)), in_chans)

    def encode(self, images: Tensor, active: Tensor) -> list[Tensor]:  # -> zero-filled maps, finest first
        self.mask.grid = active
        maps = {}
        modules = dict(self.encoder.model.named_modules())
        hooks = [
            modules[name].register_forward_hook(lambda m, i, out, name=name: maps.__setitem__(name, out))
            for name in self.names
        ]
        self.encoder.model.forward_features(self.mask.apply(images))
        for hook in hooks:
            hook.remove()
        return [maps[name] for name in self.names]

    def predict(self, images: Tensor, active: Tensor) -> Tensor:  # -> (B, C, H, W), per-patch normalised pixels
        maps = self.encode(images, active)[::-1]
        return self.decoder(self.densify(maps, self.mask))

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        return patch_loss(images, self.predict(images, active), active)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, active: Tensor) -> Tensor:
        training = self.training
        guess = patchify(self.eval().predict(images, active), tuple(active.shape[1:]))
        self.train(training)
        given = patchify(images, tuple(active.shape[1:]))
        guess = guess * (given.var(-1, keepdim=True) + 1e-6).sqrt() + given.mean(-1, keepdim=True)
        return unpatchify(torch.where(active[..., None], given, guess), images.shape)

    def copy_from(self, spark: nn.Module) -> "Simulation":
        """Take the parameters and running statistics of a SparK, by name; a name without a partner is an error."""
        theirs, mine = spark.state_dict(), self.state_dict()
        parameters = {name for name, _ in spark.named_parameters()}
        unknown = sorted(parameters - set(mine))
        missing = sorted(name for name in set(mine) - set(theirs) if ".head." not in name)  # SparK may drop the head
        if unknown or missing:
            raise KeyError(f"SparK has parameters unknown to the simulation: {unknown}; it lacks: {missing}")
        self.load_state_dict({name: theirs[name] for name in mine if name in theirs}, strict=False)
        return self


def maps_of(backbone: nn.Module, count: int = 4) -> tuple[list[str], list[int], list[int]]:
    """Names, channels and strides (finest first) of the last `count` maps of a timm ResNet or ConvNeXt."""
    prefix = "layer" if hasattr(backbone, "layer1") else "stages."
    first = 1 if prefix == "layer" else 0
    infos = [info for info in backbone.feature_info if info["module"].startswith(prefix)]
    names = [f"{prefix}{i + first}" for i in range(len(infos))]
    channels, strides = [i["num_chs"] for i in infos], [i["reduction"] for i in infos]
    return names[-count:], channels[-count:], strides[-count:]


def dense_maps(backbone: nn.Module, images: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The feature maps of the untouched dense model."""
    maps = {}
    modules = dict(backbone.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, i, out, n=n: maps.__setitem__(n, out)) for n in names]
    backbone.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [maps[n] for n in names]


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make a fresh net's parameters generic: norms off (1, 0), layer scale near 1, biases and running stats not 0.

    A fresh timm net hides errors: residual branches end in a zero BatchNorm weight and ConvNeXt's layer scale is 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "gamma":
            p.copy_(1 + 0.1 * noise(p))
        elif "mask_tokens" in name or leaf == "bias":
            p.copy_(0.1 * noise(p))
        elif p.dim() == 1:
            p.copy_(1 + 0.2 * noise(p))
        if name.endswith("bn3.weight"):
            p.mul_(0.3)  # a residual branch of full strength makes float32 gradients chaotic in train mode
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * noise(b))
        elif name.endswith("running_var"):
            b.copy_(1 + 0.2 * noise(b).clamp(-3, 3))
    return model


def random_mask(batch: int, grid: tuple[int, int], keep: int, seed: int = 0) -> Tensor:
    """(B, gh, gw) bool with `keep` active patches in every image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(1)
    return (order < keep).reshape(batch, *grid)


def gap(ours: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|ours - truth| / max(|truth|, floor), Frobenius norms in float64; NaN where either is not finite."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / max(float(truth.norm()), floor, torch.finfo(torch.float64).tiny))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient; zeros where none was computed (an unused head)."""
    return {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
