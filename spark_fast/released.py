"""Checkpoints in the formats of SparK's released code.

Two kinds of file exist. The *spark-style* one holds the whole pre-training model (encoder, densify layers, decoder)
with its architecture's name; the *backbone-only* one holds the encoder's weights alone, for fine-tuning. Their ResNets
use timm's key names, their ConvNeXts those of the original ConvNeXt repository.
"""

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import checkpoint_filter_fn as rename_convnext_to_timm
from torch import Tensor

from spark_fast.files import write_atomically
from spark_fast.spark import SparK

# released name -> ours; the backbone's part of a key is renamed separately
PREFIXES = (
    ("sparse_encoder.sp_cnn.", "encoder.model."),
    ("dense_decoder.", "decoder."),
    ("densify_norms.", "densify.norms."),
    ("densify_projs.", "densify.projs."),
    ("mask_tokens.", "densify.mask_tokens."),
)
UNUSED = ("imn_m", "imn_s", "norm_black")  # buffers that the released code writes and never reads
WRAPPERS = ("module", "state_dict", "model")
HEADS = ("encoder.model.fc.", "encoder.model.head.")  # a classifier takes no part in pre-training
BACKBONE = "encoder.model."


def load_released(path: str | os.PathLike[str], model: str | None = None) -> SparK:
    """Build a SparK from a checkpoint file of the released code.

    path: a spark-style file (a dict with `module` and `arch`) or a backbone-only state dict, which may be wrapped in
    `module`, `state_dict` or `model`. model: the timm name of the architecture; needed for a backbone-only file, and
    must agree with the file's own `arch` otherwise.

    From a spark-style file everything comes from the file: image size, channels, decoder width, number of stages,
    densify norm and mask ratio. From a backbone-only file comes the encoder alone: the densify layers, the mask tokens
    and the decoder are freshly initialised and a warning says so; the image size is 224. Classifier weights are
    ignored. Files are read with `weights_only=True`. The model is on the CPU, in float32 and in train mode.

    Raises FileNotFoundError; ValueError if the file is not such a checkpoint, if `model` contradicts it, or if keys or
    shapes differ (one message lists them all).
    """
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model must be the name of a timm architecture or None, not {type(model).__name__}")
    content = _read(path)
    state = _state_dict(path, content)
    if any(key.startswith("sparse_encoder.") for key in state):
        return _load_whole(path, content, state, model)
    if model is None:
        raise ValueError(
            f"path={str(path)!r} holds a backbone alone, without the name of its architecture: "
            "say which it is with model=, for example model='resnet50'"
        )
    spark = SparK(model, in_chans=_in_chans(path, state))
    warnings.warn(
        f"{str(path)!r} holds the encoder only: the densify layers and the decoder are freshly initialised",
        stacklevel=2,
    )
    prefixed = {BACKBONE + key: value for key, value in state.items()}
    return _fill(path, spark, _rename_backbone(prefixed, spark), BACKBONE)


def _read(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, AttributeError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), "it ends early")
        raise ValueError(
            f"path={str(path)!r} cannot be read as a checkpoint of tensors and plain values: it is truncated, of "
            f"another format, or holds other Python objects ({type(error).__name__}: {reason})"
        ) from error


def _state_dict(path: str | os.PathLike[str], content: Any) -> dict[str, Tensor]:
    """The tensors of a file, without wrapper, `config` entry and the prefix that DistributedDataParallel adds."""
    inner = content
    for _ in WRAPPERS:  # wrappers may be nested
        name = next((w for w in WRAPPERS if isinstance(inner, Mapping) and isinstance(inner.get(w), Mapping)), None)
        if name is None:
            break
        inner = inner[name]
    entries = {k: v for k, v in inner.items() if k != "config"} if isinstance(inner, Mapping) else {}
    others = sorted(str(k) for k, v in entries.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
    if not entries or others:
        found = f"it also has the entries {others[:10]}" if others else f"a {type(inner).__name__} without tensors"
        raise ValueError(f"path={str(path)!r} is no state dict (names -> tensors) of the released code: {found}")
    if all(key.startswith("module.") for key in entries):
        entries = {key.removeprefix("module."): value for key, value in entries.items()}
    return entries


def _load_whole(
    path: str | os.PathLike[str], content: Mapping[str, Any], state: dict[str, Tensor], model: str | None
) -> SparK:
    arch = content.get("arch")
    if arch is None and model is None:
        raise ValueError(f"path={str(path)!r} has no entry `arch`: name the architecture with model=")
    # a timm name may carry the tag of its weights: resnet50.a1_in1k
    if arch is not None and model is not None and model.split(".")[0] != arch:
        raise ValueError(f"model={model!r} contradicts path={str(path)!r}, which was written for arch={arch!r}")
    config = content.get("module", {}).get("config") or {}
    renamed = {}
    for key, value in state.items():
        prefix = next((p for p in PREFIXES if key.startswith(p[0])), None)
        if prefix is not None:
            renamed[prefix[1] + key.removeprefix(prefix[0])] = value
        elif key not in UNUSED:
            renamed[key] = value  # reported as unexpected
    width = renamed.get("decoder.dec.0.up_sample.weight")
    stages = sum(key.startswith("densify.mask_tokens.") for key in renamed)
    if width is None or not stages:
        raise ValueError(f"path={str(path)!r} has no `dense_decoder.dec.0.up_sample.weight` or no `mask_tokens.*`")
    spark = SparK(
        arch or model,
        img_size=_img_size(path, content, config, state),
        mask_ratio=config.get("mask_ratio", 0.6),
        in_chans=_in_chans(path, {k: v for k, v in renamed.items() if k.startswith(BACKBONE)}),
        decoder_width=width.shape[0],
        stages=stages,
        densify_norm=_densify_norm(renamed),
    )
    return _fill(path, spark, _rename_backbone(renamed, spark), "")


def _img_size(
    path: str | os.PathLike[str], content: Mapping[str, Any], config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[int, int]:
    size = content.get("input_size", config.get("sparse_encoder.input_size"))
    if size is None and "norm_black" in state:
        size = tuple(state["norm_black"].shape[-2:])
    if size is None:
        raise ValueError(f"path={str(path)!r} does not say its image size: no `input_size` and no `norm_black`")
    return (size, size) if isinstance(size, int) else tuple(size)


def _in_chans(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> int:
    """Input channels of the first convolution in the file's order."""
    first = next((value for value in state.values() if value.dim() == 4), None)
    if first is None:
        raise ValueError(f"path={str(path)!r} holds no convolution weight")
    return first.shape[1]


def _densify_norm(state: Mapping[str, Tensor]) -> str:
    if "densify.norms.0.running_mean" in state:
        return "bn"
    return "ln" if "densify.norms.0.weight" in state else "none"


def _rename_backbone(state: dict[str, Tensor], spark: SparK) -> dict[str, Tensor]:
    """ConvNeXt keys of the original repository -> timm's; everything else unchanged."""
    backbone = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    if not any(key.startswith("downsample_layers.") for key in backbone):
        return state
    # As 1x1 kernels the linear weights pass timm's renaming unchecked: a wrong shape is reported with the others.
    raised = {k: v[..., None, None] if v.dim() == 2 else v for k, v in backbone.items()}
    renamed = {BACKBONE + k: v for k, v in rename_convnext_to_timm(raised, spark.encoder.model).items()}
    targets = spark.state_dict()
    for key, value in renamed.items():
        if key in targets and value.shape == (*targets[key].shape, 1, 1):
            renamed[key] = value[..., 0, 0]
    return {k: v for k, v in state.items() if not k.startswith(BACKBONE)} | renamed


def _fill(path: str | os.PathLike[str], spark: SparK, state: Mapping[str, Tensor], part: str) -> SparK:
    """Copy `state` into the parameters and buffers of `spark` whose name starts with `part`."""
    targets = {k: v for k, v in spark.state_dict().items() if k.startswith(part) and not k.startswith(HEADS)}
    state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(targets[k].shape)} in the model"
        for k in sorted(targets.keys() & state.keys())
        if state[k].shape != targets[k].shape
    ]
    faults = [
        ("missing from the file", sorted(targets.keys() - state.keys())),
        ("unexpected in the file", sorted(state.keys() - targets.keys())),
        ("of another shape", shapes),
    ]
    if any(names for _, names in faults):
        lists = "\n".join(f"  {what} ({len(names)}): {', '.join(names)}" for what, names in faults if names)
        arch = _architecture(spark) or "the model"
        raise ValueError(f"path={str(path)!r} does not fit {arch}; keys as in SparK.state_dict():\n{lists}")
    spark.load_state_dict(state, strict=False)
    return spark


def _architecture(spark: SparK) -> str | None:
    config = getattr(spark.encoder.model, "pretrained_cfg", None) or {}
    return config.get("architecture")


def save_released(model: SparK, path: str | os.PathLike[str], epoch: int = 0) -> None:
    """Write a spark-style checkpoint of the released code, without optimizer state.

    The model's backbone must be a timm ResNet or ConvNeXt, and its patch size the encoder's total stride: the format
    knows no other. The file appears complete or not at all. Raises ValueError.
    """
    arch = _architecture(model)
    kind = type(model.encoder.model).__name__
    if arch is None or kind not in ("ResNet", "ConvNeXt"):
        raise ValueError(f"model has a {kind} backbone: the released format holds timm's ResNet and ConvNeXt only")
    if model.patch_size != model.encoder.total_stride:
        raise ValueError(
            f"model has patch_size={model.patch_size} and stride {model.encoder.total_stride}: "
            "the released format needs them equal"
        )
    state = _released_names(model)
    size = model.img_size[0] if model.img_size[0] == model.img_size[1] else tuple(model.img_size)
    state["imn_m"] = state["imn_s"] = torch.zeros(1, model.in_chans, 1, 1)
    state["norm_black"] = torch.zeros(1, model.in_chans, *model.img_size)
    state["config"] = {
        "mask_ratio": model.mask_ratio,
        "densify_norm_str": _densify_norm(model.state_dict()),
        "sbn": any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()),
        "hierarchy": len(model.densify.mask_tokens),
        "sparse_encoder.input_size": size,
        "dense_decoder.width": model.decoder.dec[0].up_sample.in_channels,
    }
    content = {
        "module": state, "arch": arch, "input_size": size, "epoch": epoch, "optimizer": {}, "performance_desc": "",
        "is_pretrain": True, "args": "",
    }  # fmt: skip
    write_atomically(Path(path), lambda file: torch.save(content, file))


def _released_names(model: SparK) -> dict[str, Any]:
    """Our state dict under the released names; tensors without a place in the format are left out (classifier)."""
    convnext = type(model.encoder.model).__name__ == "ConvNeXt"
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        old = next((p for p in PREFIXES if key.startswith(p[1])), None)
        if old is None or key.startswith(HEADS):
            continue
        name = key.removeprefix(old[1])
        if convnext and old[1] == BACKBONE:
            name = _original_convnext_name(name)
            if "pwconv" in name and value.dim() == 4:  # 1x1 convolutions there are linear layers here
                value = value[..., 0, 0]
        state[old[0] + name] = value.detach().cpu()
    return state


def _original_convnext_name(key: str) -> str:
    key = re.sub(r"^stem\.", "downsample_layers.0.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", key)
    return key.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv")
