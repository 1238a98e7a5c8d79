"""SparK: sparse and hierarchical masked image modelling of a convnet (ICLR 2023)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spark_fast.decoder import Decoder
from spark_fast.densify import Densify
from spark_fast.encoder import Encoder
from spark_fast.loss import fill_masked, patch_loss
from spark_fast.mask import FixedMask, MaskKind, MaskRatio, check_range, find_mask, is_exact, keep_count
from spark_fast.patches import ActivePatches
from spark_fast.tensor import SparseTensor


class SparK(nn.Module):
    """Masks images, encodes what is visible, predicts the rest.

    Args:
        model: a timm model name, or a module written for (B, C, H, W); see `Encoder`.
        img_size: height and width in pixels, or one number for both; a multiple of `patch_size`.
        mask_ratio: share of the patches that is hidden. Two numbers (low, high): each image's is drawn from between.
        patch_size: a mask patch's side in pixels, a multiple of the network's total stride; default: that stride.
        in_chans: image channels.
        decoder_width: channels of the decoder at the coarsest scale.
        stages: how many of the network's maps are used, from the coarsest; default: all of stride 4 and more.
        densify_norm: "bn", "ln", "none", or "auto": as the network's own norms.
        feature_layers, drop_path_rate, model_kwargs: see `Encoder`.
        mask: the kind of mask that `forward` draws: "random", "block", "grid", "mesh" or a name of `register_mask`; a
            function with the arguments of `random_patch_mask`; or a bool tensor (gh, gw), True = visible, for every
            image, whose share of hidden patches is then the mask_ratio.

    Attributes:
        encoder, densify, decoder: the three parts. `encoder.model` is the backbone.
        grid: (gh, gw) patches. len_keep: visible patches per image, None where that is known by counting only: with a
            range of ratios, and with a function that does not promise it (see `register_mask`).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        model: str | nn.Module,
        img_size: int | tuple[int, int] = 224,
        mask_ratio: float | tuple[float, float] = 0.6,
        patch_size: int | None = None,
        in_chans: int = 3,
        decoder_width: int = 768,
        stages: int | None = None,
        densify_norm: str = "auto",
        feature_layers: list[str] | None = None,
        drop_path_rate: float = 0.0,
        model_kwargs: dict | None = None,
        mask: str | MaskKind | torch.Tensor = "random",
    ):
        super().__init__()
        self.img_size = _size(img_size)
        self.in_chans = in_chans
        self.mask = find_mask(mask)
        self.encoder = Encoder(
            model, in_chans, stages, feature_layers, drop_path_rate, model_kwargs, self.img_size
        )  # fmt: skip
        stride = self.encoder.total_stride
        self.patch_size = stride if patch_size is None else patch_size
        self.grid = _grid(self.img_size, self.patch_size, stride)
        if isinstance(self.mask, FixedMask):
            self.mask.check(self.grid)
            mask_ratio = self.mask.mask_ratio
        self.set_mask_ratio(mask_ratio)
        if stride > 1 and self.encoder.strides[0] == 1:
            raise ValueError(
                "stages, feature_layers: a map of stride 1 has no place in the decoder, which ends there; leave it out"
            )
        # It doubles the size at each scale: for a stride that is no power of two to the nearest, then it is resized.
        self.decoder = Decoder(1 << round(math.log2(stride)), decoder_width, in_chans)
        # Scale k of the decoder has 1 / 2**k of the total stride; stages are listed from the coarsest.
        self.scales = [(stride // s).bit_length() - 1 for s in reversed(self.encoder.strides)]
        self.densify_norm = _own_norm(self.encoder) if densify_norm == "auto" else densify_norm
        widths = [decoder_width >> k for k in self.scales]
        self.densify = Densify(self.encoder.channels[::-1], widths, self.densify_norm)

    def random_mask(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        mask_ratio: MaskRatio | None = None,
    ) -> torch.Tensor:
        """A mask of the model's kind for `batch` images: bool (B, gh, gw), True = visible.

        Args:
            generator, device: see `random_patch_mask`.
            mask_ratio: instead of the model's; also a tensor (B,), one ratio per image.

        Raises:
            TypeError, ValueError: the model's `mask` is a function that returned something else.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        active = self.mask(batch, self.grid, ratio, generator, device)
        if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
            got = active.dtype if isinstance(active, torch.Tensor) else type(active).__name__
            raise TypeError(f"mask must return a bool tensor (True = visible); got {got}")
        if tuple(active.shape) != (batch, *self.grid):
            raise ValueError(
                f"mask must return (B, gh, gw) = ({batch}, {self.grid[0]}, {self.grid[1]}); got {tuple(active.shape)}"
            )
        return active if device is None else active.to(device)

    def set_mask_ratio(self, mask_ratio: float | tuple[float, float]) -> None:
        """Another share of hidden patches from now on, as a schedule of ratios wants.

        Raises:
            TypeError, ValueError: it is none, or it hides no patch or all of this grid.
        """
        most = check_range(self.grid, mask_ratio)[1] if isinstance(mask_ratio, tuple | list) else mask_ratio
        keep = keep_count(self.grid, most)
        if most > 0 and keep == self.grid[0] * self.grid[1]:
            raise ValueError(
                f"mask_ratio={most} hides no patch of a grid of {self.grid[0]}x{self.grid[1]}, so that there is "
                "nothing to predict: raise mask_ratio, use larger images or a smaller patch_size"
            )
        if isinstance(self.mask, FixedMask) and mask_ratio != self.mask.mask_ratio:
            raise ValueError(f"mask_ratio={mask_ratio}, but the mask is a tensor that hides {self.mask.mask_ratio:g}")
        self.mask_ratio = mask_ratio
        self.len_keep = keep if is_exact(self.mask, mask_ratio) else None

    def forward(self, images: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """The reconstruction loss over the masked patches, a scalar.

        Args:
            images: (B, in_chans, height, width), normalised, the parameters' dtype (any floating one under autocast).
            active: bool (B, gh, gw), True = visible; by default drawn at random, as `mask` says.

        Raises:
            TypeError, ValueError: `images` or `active` do not fit the model.
        """
        patches = self._patches(images, active)
        return patch_loss(self.predict(images, patches), images, patches)

    def predict(self, images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
        """Prediction (B, in_chans, height, width) of the per-patch normalised pixels, from the visible pixels alone."""
        maps = self.encoder(SparseTensor.from_dense(images, patches))
        dense = self.densify(maps[::-1])
        by_scale = dict(zip(self.scales, dense, strict=True))
        out = self.decoder([by_scale.get(k) for k in range(max(by_scale) + 1)])
        if out.shape[2:] == images.shape[2:]:
            return out
        return F.interpolate(out, images.shape[2:], mode="bilinear")  # of a stride that is no power of two

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """Images with visible patches as given and masked ones as predicted, in evaluation mode.

        The prediction is of normalised patches; each is scaled back by the true patch's mean and deviation, as in the
        paper's figures.

        Args, raises: as for `forward`.

        Returns:
            (B, in_chans, height, width).
        """
        patches = self._patches(images, active)
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            return fill_masked(self.predict(images, patches), images, patches)
        finally:
            for module, training in modes:
                module.training = training

    def _patches(self, images: torch.Tensor, active: torch.Tensor | None) -> ActivePatches:
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor (B, {self.in_chans}, H, W); got {got}")
        expected = (self.in_chans, *self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), as this model was made "
                f"(in_chans, img_size); got {tuple(images.shape)}"
            )
        parameter = next(self.parameters())
        device, dtype = parameter.device, parameter.dtype
        if images.device != device:
            raise ValueError(f"images are on {images.device}, the model's parameters on {device}; move one with .to()")
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images are {images.dtype}, the model's parameters {dtype}: use images.to({dtype}), model.to("
                f"{images.dtype}) or torch.autocast"
            )
        if images.shape[0] == 0:
            raise ValueError("images: the batch is empty")
        if active is None:
            return ActivePatches(self.random_mask(images.shape[0], device=images.device), self.len_keep)
        if isinstance(active, torch.Tensor) and active.dtype == torch.bool:
            if tuple(active.shape) != (images.shape[0], *self.grid):
                raise ValueError(
                    f"active must be (B, gh, gw) = ({images.shape[0]}, {self.grid[0]}, {self.grid[1]}); got "
                    f"{tuple(active.shape)}. SparK.random_mask makes one"
                )
            if active.device != images.device:
                raise ValueError(f"active is on {active.device}, images on {images.device}; move one with .to()")
        return ActivePatches(active)

    def extra_repr(self) -> str:
        return (
            f"img_size={self.img_size}, patch_size={self.patch_size}, grid={self.grid}, mask_ratio={self.mask_ratio}, "
            f"len_keep={self.len_keep}, strides={self.encoder.strides}, densify_norm={self.densify_norm}"
        )


def _size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = tuple(img_size) if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        raise ValueError(f"img_size must be a positive integer or (height, width); got {img_size!r}")
    return size


def _grid(img_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    if not isinstance(patch_size, int) or patch_size < stride or patch_size % stride:
        raise ValueError(
            f"patch_size must be a multiple of the network's total stride {stride}, so that a patch is a whole number "
            f"of pixels in every map; got {patch_size}"
        )
    if any(s % patch_size for s in img_size):
        raise ValueError(
            f"img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size {patch_size}; the nearest that is: "
            f"{'x'.join(str(max(1, round(s / patch_size)) * patch_size) for s in img_size)}"
        )
    return img_size[0] // patch_size, img_size[1] // patch_size


def _own_norm(encoder: Encoder) -> str:
    modules = list(encoder.model.modules())
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        return "bn"
    return "ln" if any(isinstance(m, nn.LayerNorm) for m in modules) else "none"
