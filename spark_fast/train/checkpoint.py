"""Checkpoints of a run, and the backbone for timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from timm.models import load_state_dict

from spark_fast.files import write_atomically
from spark_fast.released import load_released
from spark_fast.spark import SparK
from spark_fast.train.config import PretrainConfig

FORMAT = 1


def save_checkpoint(path: Path, config: PretrainConfig, state: dict[str, Any]) -> None:
    """Write a checkpoint of config and state. Its OSError tells that the one before it is intact, and how to go on."""
    content = {"format": FORMAT, "config": config.to_dict(), **state}
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        kept = f"the one before it, {path}, is intact" if path.exists() else "there is none before it"
        raise OSError(
            cause.errno,
            f"the checkpoint of step {state['step']} could not be written to {path.parent}: {cause.strerror}; {kept}. "
            f"Make room, then go on with: spark-fast pretrain --out {path.parent} --resume",
        ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error of torch.save, which wraps a failed write in a RuntimeError."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package to the CPU. ValueError if it is missing, damaged or something else."""
    content = _read(path)
    if not _is_ours(content):
        raise ValueError(f"{path} is no checkpoint of spark_fast pretraining")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}, this version reads format {FORMAT}")
    return content


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors of all kinds
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole checkpoint (truncated, or not one at all): {first_line}") from error


def _is_ours(content: object) -> bool:
    return isinstance(content, dict) and {"format", "config", "step", "model"} <= set(content)


def build_model(config: PretrainConfig) -> SparK:
    """The network that a configuration describes, with fresh weights from torch's global generator."""
    return SparK(
        config.model,
        img_size=config.size,
        mask_ratio=config.last_mask_ratio,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        decoder_width=config.decoder_width,
        drop_path_rate=config.drop_path_rate,
        mask=config.mask_kind,
    )


def model_from_checkpoint(path: Path) -> tuple[SparK, PretrainConfig]:
    """The trained network of a checkpoint, ours or one of SparK's released ones, and how its images are prepared.

    Of a released one only the network's and the images' shape are known; data and out in its configuration are void.
    """
    if not _is_ours(_read(path)):
        model = load_released(path)
        shape = {"img_size": model.img_size, "in_chans": model.in_chans, "mask_ratio": model.mask_ratio}
        return model, PretrainConfig(data=Path(), out=Path(), **shape)
    content = load_checkpoint(path)
    config = PretrainConfig.from_dict(content["config"])
    model = build_model(config)
    load_weights(model, content["model"], path)
    return model, config


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Strict load_state_dict whose ValueError counts and shows what does not fit, in one line."""
    have = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    both = set(have) & set(given)
    differing = [f"{name} {given[name]} instead of {have[name]}" for name in sorted(both) if have[name] != given[name]]
    faults = {
        "missing": sorted(set(have) - set(given)),
        "unknown": sorted(set(given) - set(have)),
        "of another shape": differing,
    }
    found = [f"{len(names)} {fault} (first: {names[0]})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"the weights in {path} do not fit the network: {', '.join(found)}")
    module.load_state_dict(weights)


def load_backbone(model: SparK, path: Path) -> None:
    """Start from backbone weights alone: a state dict as timm or export_backbone writes it, classifier ignored."""
    if not path.is_file():
        raise ValueError(f"initial_checkpoint={path} does not exist")
    backbone = model.encoder.model
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise ValueError(f"initial_checkpoint={path} cannot be read: {str(error).splitlines()[0]}") from error
    known = backbone.state_dict()
    load_weights(backbone, {name: tensor for name, tensor in weights.items() if name in known}, path)


def export_backbone(model: SparK, path: Path, format: Literal["safetensors", "pth"] = "safetensors") -> Path:
    """Write the backbone's weights as timm.create_model(name, num_classes=0, checkpoint_path=path) reads them."""
    weights = {name: t.detach().cpu().contiguous().clone() for name, t in model.encoder.model.state_dict().items()}
    if format == "safetensors":
        write_atomically(path, lambda file: file.write(to_safetensors(weights)))
    elif format == "pth":
        write_atomically(path, lambda file: torch.save(weights, file))
    else:
        raise ValueError(f"format is {format!r}, need safetensors or pth")
    return path
