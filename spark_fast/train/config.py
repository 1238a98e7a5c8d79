"""Settings of a pre-training run: one definition for Python, the command line and config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spark_fast.mask import find_mask, is_exact

BASE_LR = 2e-4  # per 256 images in a batch
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DROP_PATH = {
    "resnet50": 0.05,
    "resnet101": 0.08,
    "resnet152": 0.10,
    "resnet200": 0.15,
    "convnext_small": 0.2,
    "convnext_base": 0.3,
    "convnext_large": 0.4,
}

# Settings of the machine or of the log; all others define the numbers of a run and are fixed once it has begun.
MAY_CHANGE_ON_RESUME = frozenset(
    ("data", "out", "resume", "initial_checkpoint", "device", "workers", "threads", "cuda_graph", "log_every")
    + ("checkpoint_every", "checkpoint_minutes", "reconstruct_every")
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train a convolutional network on a folder of images, without labels."""

    data: Path
    """Folder of images, nested or not. Labels are neither needed nor used."""

    out: Path
    """Folder for everything the run writes. It must be new or empty unless resume is set."""

    model: str = "resnet50"
    """Name of a timm convolutional network."""

    epochs: int = 1600
    """Passes over the data."""

    batch_size: int = 256
    """Images per optimiser step, all accumulated micro-batches together."""

    img_size: int | tuple[int, int] = 224
    """Image side in pixels, or height and width. Multiples of the patch side."""

    mask_ratio: float | tuple[float, float] = 0.6
    """Share of the patches that is masked. 0.6 suits a 7x7 grid (224 px), 0.75 a 12x12 grid (384 px). Two numbers: each
    image's share is drawn from between them; a GPU then waits in each step for the count of patches."""

    mask_ratio_end: float | None = None
    """Share in the last epoch, reached epoch by epoch from mask_ratio. None: mask_ratio throughout."""

    mask_ratio_schedule: Literal["linear", "cosine"] = "linear"
    """The way from mask_ratio to mask_ratio_end."""

    mask_kind: str = "random"
    """Kind of mask: random, block (rectangles are masked), grid (a regular lattice is visible), mesh (one colour of a
    checkerboard is visible), or a name that your program gave a function of its own with register_mask."""

    patch_size: int | None = None
    """Side of a patch in pixels. None: the total stride of the network."""

    in_chans: int = 3
    """Channels of an image: 1 (grey), 3 (RGB) and 4 (RGBA) from any image file; other numbers from .npy
    files of shape (H, W, C). Arrays of uint8 and uint16 are scaled to 0..1, others are taken as they are."""

    decoder_width: int = 768
    """Channels of the decoder at its coarsest scale; they halve with each finer scale."""

    drop_path: float | None = None
    """Stochastic depth rate. None: the published recipe for the larger ResNets and ConvNeXts, 0 for all others."""

    opt: Literal["lamb", "adamw"] = "lamb"
    """Optimiser."""

    lr: float | None = None
    """Peak learning rate. None: 2e-4 * batch_size / 256."""

    betas: tuple[float, float] | None = None
    """Averaging coefficients of the optimiser. None: (0.9, 0.999) for ConvNeXt, (0.9, 0.95) for all others."""

    warmup_epochs: float = 40.0
    """Epochs of linear learning-rate warm-up, at most a tenth of the run: a run of 50 epochs warms up for 5."""

    weight_decay: float = 0.04
    """Weight decay at the start."""

    weight_decay_end: float = 0.2
    """Weight decay at the end (cosine in between)."""

    clip_grad: float | None = 5.0
    """Largest global gradient norm. None: no clipping."""

    epoch_repeats: int = 1
    """How often an epoch shows each image, each time with another crop. Raise it for small folders."""

    grad_accum_steps: int = 1
    """Micro-batches per optimiser step: less memory; batch statistics then cover batch_size / grad_accum_steps."""

    amp_dtype: Literal["none", "bfloat16", "float16"] = "none"
    """Mixed precision. float16 needs a GPU."""

    mean: tuple[float, ...] | None = None
    """Mean per channel of pixels in 0..1. None: ImageNet's for 3 channels, else its average."""

    std: tuple[float, ...] | None = None
    """Standard deviation per channel. None: as for mean."""

    scale: tuple[float, float] = (0.67, 1.0)
    """Share of the image's area that the random crop covers, smallest and largest."""

    hflip: float = 0.5
    """Probability of a horizontal flip."""

    initial_checkpoint: Path | None = None
    """Backbone weights to start from (a state dict as timm or `export` writes it). None: random weights. A resumed
    run does not read it again."""

    seed: int = 0
    """Fixes every random choice: weights, order, crops, masks, drop path."""

    device: str = "auto"
    """Device of torch, for instance cpu or cuda:1. auto: the GPU if there is one."""

    workers: int | None = None
    """Processes that read images; 0 reads in the training process. The numbers do not depend on it. None: one per CPU
    core, at most 8."""

    threads: int | None = None
    """Threads of torch on the CPU. None: torch's own choice."""

    cuda_graph: bool = False
    """Record a step, the optimiser's part included, as a CUDA graph, so that small kernels need not wait for Python.
    The numbers depend on it by rounding only. Needs a CUDA GPU; not with amp_dtype float16."""

    checkpoint_every: int = 10
    """Epochs between checkpoints; one is written at the end and on Ctrl-C too."""

    checkpoint_minutes: float = 10.0
    """Minutes after which a checkpoint is written even if checkpoint_every is not due."""

    reconstruct_every: int = 20
    """Epochs between pictures of reconstructions (one more at the end). 0: none."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""

    resume: bool = False
    """Go on with the run in `out`, with its settings."""

    def __post_init__(self) -> None:
        for name in ("data", "out", "initial_checkpoint"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("img_size", "mask_ratio", "betas", "mean", "std", "scale"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def worker_count(self) -> int:
        """Processes that read images."""
        if self.workers is not None:
            return self.workers
        # Containers often allow fewer cores than the machine has; macOS cannot tell.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return BASE_LR * self.batch_size / 256 if self.lr is None else self.lr

    @property
    def drop_path_rate(self) -> float:
        """Stochastic depth rate given or, by the model's name, the recipe's."""
        if self.drop_path is not None:
            return self.drop_path
        return DROP_PATH.get(self.model.partition(".")[0], 0.0)

    @property
    def optimizer_betas(self) -> tuple[float, float]:
        """Averaging coefficients given or, by the model's name, the recipe's."""
        if self.betas is not None:
            return self.betas
        return (0.9, 0.999) if "convnext" in self.model else (0.9, 0.95)

    @property
    def last_mask_ratio(self) -> float | tuple[float, float]:
        """Masked share of the last epoch, which pictures of reconstructions have too."""
        return self.mask_ratio if self.mask_ratio_end is None else self.mask_ratio_end

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, one value per channel each."""
        return (
            self.mean or _per_channel(IMAGENET_MEAN, self.in_chans),
            self.std or _per_channel(IMAGENET_STD, self.in_chans),
        )

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Steps of warm-up: warmup_epochs, but at most a tenth of the run."""
        return round(min(self.warmup_epochs, 0.1 * self.epochs) * steps_per_epoch)

    def check(self) -> PretrainConfig:
        """Return self; raise TypeError or ValueError naming the first setting that cannot be."""
        for name in ("data", "out"):
            _require(isinstance(getattr(self, name), Path), TypeError, name, getattr(self, name), "a path")
        shown = type(self.model).__name__ if isinstance(self.model, nn.Module) else self.model
        meant = "the name of a timm model; with a network of your own write the loop around spark_fast.SparK"
        _require(isinstance(self.model, str), TypeError, "model", shown, meant)
        for name, least in _LEAST_INTEGER.items():
            _check_integer(name, getattr(self, name), least)
        for name, (low, high) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high)
        for name, choices in _CHOICES.items():
            wanted = "one of " + ", ".join(choices)
            _require(getattr(self, name) in choices, ValueError, name, getattr(self, name), wanted)
        for name in ("resume", "cuda_graph"):
            _require(isinstance(getattr(self, name), bool), TypeError, name, getattr(self, name), "True or False")
        if self.cuda_graph and self.amp_dtype == "float16":
            wanted = "False with amp_dtype='float16', whose loss scale changes from step to step; bfloat16 needs none"
            raise _error(ValueError, "cuda_graph", self.cuda_graph, wanted)
        self._check_shapes()
        self._check_masks()
        return self

    def _check_masks(self) -> None:
        is_range, end = isinstance(self.mask_ratio, tuple), self.mask_ratio_end
        for ratio in self.mask_ratio if is_range else (self.mask_ratio,):
            _check_ratio("mask_ratio", ratio)
        if is_range:
            ordered = len(self.mask_ratio) == 2 and self.mask_ratio[0] <= self.mask_ratio[1]
            _require(ordered, ValueError, "mask_ratio", self.mask_ratio, "one number, or the lowest and the highest")
        if end is not None:
            _check_ratio("mask_ratio_end", end)
            wanted = f"None with mask_ratio={self.mask_ratio}, from which each image draws its own"
            _require(not is_range, ValueError, "mask_ratio_end", end, wanted)
        _require(
            isinstance(self.mask_kind, str), TypeError, "mask_kind", self.mask_kind, "a name; register_mask gives one"
        )
        equal = end is None and is_exact(find_mask(self.mask_kind, "mask_kind"), self.mask_ratio)
        wanted = "False unless all masks of the run show equally many patches: one mask_ratio, no mask_ratio_end"
        _require(equal or not self.cuda_graph, ValueError, "cuda_graph", self.cuda_graph, wanted)

    def _check_shapes(self) -> None:
        sides = self.img_size if isinstance(self.img_size, tuple) else (self.img_size,)
        _require(len(sides) in (1, 2), ValueError, "img_size", self.img_size, "one side, or height and width")
        for side in sides:
            _check_integer("img_size", side, 1)
        for name, length in (("betas", 2), ("scale", 2), ("mean", self.in_chans), ("std", self.in_chans)):
            values = getattr(self, name)
            if values is None:
                continue
            wanted = f"{length} numbers" + (f" (in_chans={self.in_chans})" if name in ("mean", "std") else "")
            _require(isinstance(values, tuple) and len(values) == length, ValueError, name, values, wanted)
            for value in values:
                _check_number(name, value, *((0, 1) if name in ("betas", "scale") else (-math.inf, math.inf)))
        _require(max(self.betas or (0,)) < 1, ValueError, "betas", self.betas, "numbers below 1")
        _require(0 < self.scale[0] <= self.scale[1], ValueError, "scale", self.scale, "0 < smallest <= largest <= 1")
        _require(min(self.std or (1,)) > 0, ValueError, "std", self.std, "numbers above 0")
        if self.batch_size % self.grad_accum_steps:
            wanted = f"a divisor of batch_size={self.batch_size}, so that all micro-batches are equal"
            raise _error(ValueError, "grad_accum_steps", self.grad_accum_steps, wanted)

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain types, for JSON and checkpoints; paths are absolute."""
        plain = dataclasses.asdict(self)
        return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in plain.items()}

    def save_text(self) -> str:
        """The settings as the text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> PretrainConfig:
        """Inverse of to_dict. A setting this version does not know raises ValueError."""
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}. Known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**settings)

    def changed_since(self, stored: PretrainConfig) -> list[str]:
        """Settings that fix a run's numbers and differ from the stored ones, as 'name: stored -> given'."""
        return [
            f"{name}: {getattr(stored, name)} -> {getattr(self, name)}"
            for name in self.__dataclass_fields__
            if name not in MAY_CHANGE_ON_RESUME and getattr(self, name) != getattr(stored, name)
        ]


_LEAST_INTEGER = {
    "epochs": 1,
    "batch_size": 1,
    "patch_size": 1,
    "in_chans": 1,
    "decoder_width": 1,
    "epoch_repeats": 1,
    "grad_accum_steps": 1,
    "seed": 0,
    "workers": 0,
    "threads": 1,
    "checkpoint_every": 1,
    "reconstruct_every": 0,
    "log_every": 1,
}
_RANGES = {
    "drop_path": (0, 0.99),
    "lr": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "weight_decay_end": (0, math.inf),
    "clip_grad": (1e-12, math.inf),
    "hflip": (0, 1),
    "checkpoint_minutes": (1e-3, math.inf),
}
_CHOICES = {
    "opt": ("lamb", "adamw"),
    "amp_dtype": ("none", "bfloat16", "float16"),
    "mask_ratio_schedule": ("linear", "cosine"),
}


def _per_channel(rgb: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return rgb if channels == 3 else (round(sum(rgb) / 3, 4),) * channels


def _error(kind: type[Exception], name: str, value: object, wanted: str) -> Exception:
    return kind(f"{name} is {value!r}, need {wanted}")


def _require(condition: bool, kind: type[Exception], name: str, value: object, wanted: str) -> None:
    if not condition:
        raise _error(kind, name, value, wanted)


def _check_integer(name: str, value: object, least: int) -> None:
    if value is None and name in ("patch_size", "threads", "workers"):
        return
    wanted = f"an integer >= {least}"
    _require(isinstance(value, int) and not isinstance(value, bool), TypeError, name, value, wanted)
    _require(value >= least, ValueError, name, value, wanted)


def _check_ratio(name: str, value: object) -> None:
    _check_number(name, value, 0, 1)
    _require(0 < value < 1, ValueError, name, value, "a number between 0 and 1")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if value is None and name in ("drop_path", "lr", "clip_grad"):
        return
    _require(isinstance(value, (int, float)) and not isinstance(value, bool), TypeError, name, value, "a number")
    bounds = "a finite number" if high == math.inf and low == -math.inf else f"a number in {low}..{high}"
    _require(math.isfinite(value) and low <= value <= high, ValueError, name, value, bounds)
