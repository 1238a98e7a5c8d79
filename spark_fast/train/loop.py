"""Pre-training: one loop, from a configuration to weights that timm loads."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spark_fast.evaluate.curve import draw_loss_curve
from spark_fast.evaluate.grid import save_grid
from spark_fast.memory import keep_memory
from spark_fast.spark import SparK
from spark_fast.train.checkpoint import (
    build_model,
    export_backbone,
    load_backbone,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from spark_fast.train.config import PretrainConfig
from spark_fast.train.cuda_graph import RecordedStep
from spark_fast.train.data import Batch, list_images, load_pictures, make_loader, steps_per_epoch
from spark_fast.train.progress import Progress
from spark_fast.train.run_folder import RunFolder, check_new, check_same, stored_config
from spark_fast.train.schedule import learning_rate, make_optimizer, mask_ratio, set_schedule, weight_decay
from spark_fast.train.seeds import INIT, PICTURE, STEP, derive_seed, generator
from spark_fast.train.tensor_step import TensorStep

PICTURES = 8  # images in a grid of reconstructions


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run after it had saved its state."""


@dataclass(frozen=True)
class PretrainResult:
    """Where a finished run left its results."""

    out: Path
    steps: int
    final_loss: float
    checkpoint: Path
    backbone: Path
    metrics: Path
    loss_curve: Path
    reconstructions: Path | None


@dataclass
class State:
    """All that a step changes. loss_sum and steps belong to the line of metrics.jsonl that is due next."""

    model: SparK
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_sum: torch.Tensor
    finite: torch.Tensor
    step: int = 0
    steps: int = 0
    recorded: RecordedStep | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": {"loss_sum": self.loss_sum.item(), "steps": self.steps},
        }

    def load(self, content: dict[str, Any], path: Path) -> None:
        load_weights(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        self.loss_sum.fill_(content["window"]["loss_sum"])
        self.steps = content["window"]["steps"]


def pretrain(config: PretrainConfig | None = None, **settings: Any) -> PretrainResult:
    """Pre-train a convnet on a folder of images; settings are the fields of PretrainConfig.

    With resume=True, settings that are left out are those of the run in `out`. A resumed run takes the same steps as
    one that was never stopped; on the CPU its weights are equal bit for bit.

    Raises ValueError or TypeError for settings and data that cannot be, FloatingPointError when the loss or a gradient
    is not finite, OSError when a file cannot be written, RunInterrupted after Ctrl-C or SIGTERM.
    """
    config = _complete(config, settings).check()
    folder, device = RunFolder(config.out), choose_device(config.device)
    if config.amp_dtype == "float16" and device.type == "cpu":
        raise ValueError("amp_dtype is 'float16', which needs a GPU; use bfloat16 or none on the CPU")
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph is True, which needs a CUDA GPU; the device is {device}. Leave cuda_graph out")
    content, files = _open(config, folder)
    per_epoch = steps_per_epoch(config, len(files))
    pictures, _ = load_pictures(config, files, PICTURES)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_memory()
    state = _make_state(config, device, fresh=content is None)
    if content:
        state.load(content, folder.checkpoint)
    else:
        folder.begin(config, files)
    folder.cut_metrics(state.step)
    _announce(config, folder, state, len(files), per_epoch, device)
    _train(config, folder, state, files, per_epoch, device, pictures)
    return _finish(config, folder, state, pictures)


def _complete(config: PretrainConfig | None, settings: dict[str, Any]) -> PretrainConfig:
    if config is not None and not isinstance(config, PretrainConfig):
        raise TypeError(f"config is a {type(config).__name__}, need a PretrainConfig or keyword settings alone")
    if config is None and settings.get("resume") is True and "out" in settings:
        config = stored_config(settings["out"])
    return dataclasses.replace(config, **settings) if config else PretrainConfig(**settings)


def choose_device(name: str) -> torch.device:
    """The device that a setting names; auto is the GPU if there is one. ValueError if torch does not have it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {name!r}, need auto, cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _open(config: PretrainConfig, folder: RunFolder) -> tuple[dict[str, Any] | None, list[str]]:
    """The checkpoint to go on from, if any, and the images of the run."""
    if not config.resume:
        check_new(config)
        return None, list_images(config.data)
    stored = stored_config(config.out)
    content = load_checkpoint(folder.checkpoint) if folder.checkpoint.exists() else None
    check_same(config, PretrainConfig.from_dict(content["config"]) if content else stored)
    return content, folder.stored_files() or list_images(config.data)


def _make_state(config: PretrainConfig, device: torch.device, fresh: bool) -> State:
    torch.manual_seed(derive_seed(config.seed, INIT))
    model = build_model(config)
    if config.mask_ratio_end is not None:
        model.set_mask_ratio(config.mask_ratio)  # fits the grid? The ratio at the end does, and those between then too
    if config.initial_checkpoint and fresh:
        load_backbone(model, config.initial_checkpoint)
    model.to(device).train()
    return State(
        model,
        make_optimizer(model, config),
        torch.amp.GradScaler(device.type, enabled=config.amp_dtype == "float16"),
        loss_sum=torch.zeros((), device=device),
        finite=torch.ones((), dtype=torch.bool, device=device),
    )


def _announce(
    config: PretrainConfig, folder: RunFolder, state: State, images: int, per_epoch: int, device: torch.device
) -> None:
    start = "from the start"
    if config.resume:
        where = f"step {state.step}" if state.step else "the start: the run was stopped before its first checkpoint"
        start = f"resumed at {where}, with the settings in {folder.config}"
    folder.say(
        f"{config.model}: {images} images, {config.epochs} epochs of {per_epoch} steps of {config.batch_size} images, "
        f"{config.size[0]}x{config.size[1]} px, {config.opt} at {config.peak_lr:.3g}, {device} "
        f"({torch.get_num_threads()} threads), amp {config.amp_dtype}; {start}"
    )


def _train(
    config: PretrainConfig,
    folder: RunFolder,
    state: State,
    files: list[str],
    per_epoch: int,
    device: torch.device,
    pictures: torch.Tensor,
) -> None:
    total, warmup = config.epochs * per_epoch, config.warmup_steps(per_epoch)
    loader = make_loader(config, files, state.step, total, pin=device.type == "cuda")
    reported: set[str] = set()
    with _stop_signal() as stop, Progress(folder, total, state.step, config.batch_size) as progress:
        for step, batch in zip(range(state.step, total), loader, strict=True):
            _report_unreadable(batch, folder, config, reported)
            rate = learning_rate(step, total, warmup, config.peak_lr)
            decay = weight_decay(step, total, config.weight_decay, config.weight_decay_end)
            set_schedule(state.optimizer, rate, decay)
            masked = _set_mask_ratio(config, state.model, step // per_epoch)
            grad_norm = _step(config, state, batch.images.to(device, non_blocking=True), step)
            done = state.step = step + 1
            progress.advance()

            if device.type == "cpu":  # costs nothing there; on a GPU it would wait for the step
                _check_finite(state, folder)
            if done % config.log_every == 0 or done == total:
                _check_finite(state, folder)
                loss = (state.loss_sum / state.steps).item()
                row = {"step": done, "epoch": round(done / per_epoch, 4), "loss": loss, "lr": rate}
                row |= {"weight_decay": decay, "mask_ratio": masked, "grad_norm": grad_norm.item()}
                row["images_per_s"] = round(progress.show(loss, rate), 2)
                folder.add_metrics(row)
                state.loss_sum.zero_()
                state.steps = 0
            if done == total or stop or _checkpoint_due(config, state, per_epoch):
                _save(config, folder, state)
            if stop and done < total:
                text = f"stopped after step {done} of {total}; the state is saved. Go on with: {folder.resume_hint}"
                folder.note(text)
                raise RunInterrupted(text)
            if config.reconstruct_every and done < total and done % (config.reconstruct_every * per_epoch) == 0:
                draw_reconstructions(config, folder, state.model, pictures, f"epoch_{done // per_epoch:04d}")


def _set_mask_ratio(config: PretrainConfig, model: SparK, epoch: int) -> float | tuple[float, float]:
    """Gives the model the mask ratio of an epoch; the ratio."""
    if config.mask_ratio_end is None:
        return config.mask_ratio
    ends = config.mask_ratio, config.mask_ratio_end
    ratio = mask_ratio(epoch, config.epochs, *ends, config.mask_ratio_schedule)
    model.set_mask_ratio(ratio)
    return ratio


def _step(config: PretrainConfig, state: State, images: torch.Tensor, step: int) -> torch.Tensor:
    """One optimiser step on images (B, C, H, W), with gradients averaged over micro-batches; the gradient norm."""
    if config.cuda_graph and state.recorded is None:
        changed = (state.loss_sum, state.finite)
        update = TensorStep(state.optimizer)
        state.recorded = RecordedStep(lambda x: _gradients(config, state, x), update, state.model, changed, images)
    torch.manual_seed(derive_seed(config.seed, STEP, step))  # masks and drop path
    if state.recorded is not None:
        norm = state.recorded(images)
    else:
        state.optimizer.zero_grad(set_to_none=True)
        norm = _gradients(config, state, images)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.steps += 1
    return norm


def _gradients(config: PretrainConfig, state: State, images: torch.Tensor) -> torch.Tensor:
    """Adds the clipped gradients of a step to what the parameters have, and its loss to the sum; the gradient norm.

    Nothing here waits for a GPU, so that it can be recorded.
    """
    dtype = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.amp_dtype]
    parts = config.grad_accum_steps
    for part in images.chunk(parts):
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = state.model(part) / parts
        state.scaler.scale(loss).backward()
        state.loss_sum += loss.detach()
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad or math.inf)
    # float16 overflows now and then by design: the scaler skips that step, only the loss must be finite.
    state.finite &= state.loss_sum.isfinite() & (norm.isfinite() if config.amp_dtype != "float16" else True)
    return norm


def _checkpoint_due(config: PretrainConfig, state: State, per_epoch: int) -> bool:
    late = time.monotonic() - state.saved_at > 60 * config.checkpoint_minutes
    return late or state.step % (config.checkpoint_every * per_epoch) == 0


def _save(config: PretrainConfig, folder: RunFolder, state: State) -> None:
    _check_finite(state, folder)
    if not all(tensor.isfinite().all() for tensor in state.model.state_dict().values()):
        _fail_not_finite("a weight", state, folder)
    save_checkpoint(folder.checkpoint, config, state.to_dict())
    state.saved_at = time.monotonic()


def _check_finite(state: State, folder: RunFolder) -> None:
    if not state.finite.item():
        _fail_not_finite("the loss or its gradient", state, folder)


def _fail_not_finite(what: str, state: State, folder: RunFolder) -> None:
    kept = f"{folder.checkpoint} is from before it" if folder.checkpoint.exists() else "no checkpoint was written"
    text = (
        f"{what} is not finite (noticed after step {state.step}); {kept}. A lower lr, a longer warm-up, "
        "amp_dtype none or a look at the images' values may help"
    )
    folder.note(text)
    raise FloatingPointError(text)


def _report_unreadable(batch: Batch, folder: RunFolder, config: PretrainConfig, reported: set[str]) -> None:
    for path, reason in batch.unreadable:
        if path not in reported:
            reported.add(path)
            folder.say(f"warning: {config.data / path} cannot be read, another image takes its place ({reason})")
    if batch.error:
        folder.note(batch.error)
        raise ValueError(batch.error)


def draw_reconstructions(
    config: PretrainConfig, folder: RunFolder, model: SparK, pictures: torch.Tensor, name: str
) -> Path:
    """Draw the fixed pictures under their fixed mask, so that pictures of different epochs can be compared.

    The masks have the last epoch's ratio."""
    folder.reconstructions.mkdir(exist_ok=True)
    path = folder.reconstructions / f"{name}.png"
    source = generator(config.seed, PICTURE)
    active = model.random_mask(len(pictures), source, mask_ratio=config.last_mask_ratio)
    save_grid(path, model, pictures, active, *config.normalization)
    return path


def _finish(config: PretrainConfig, folder: RunFolder, state: State, pictures: torch.Tensor) -> PretrainResult:
    export_backbone(state.model, folder.backbone)
    rows = folder.read_metrics()
    draw_loss_curve([(row["epoch"], row["loss"]) for row in rows], folder.loss_curve)
    picture = None
    if config.reconstruct_every:
        picture = draw_reconstructions(config, folder, state.model, pictures, f"epoch_{config.epochs:04d}")
    folder.say(f"finished: loss {rows[-1]['loss']:.4f}, backbone for timm in {folder.backbone}")
    return PretrainResult(
        out=folder.path,
        steps=state.step,
        final_loss=rows[-1]["loss"],
        checkpoint=folder.checkpoint,
        backbone=folder.backbone,
        metrics=folder.metrics,
        loss_curve=folder.loss_curve,
        reconstructions=picture,
    )


class StopFlag:
    """True once Ctrl-C or SIGTERM has come."""

    def __init__(self) -> None:
        self.raised = False

    def __bool__(self) -> bool:
        return self.raised


@contextmanager
def _stop_signal() -> Iterator[StopFlag]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in two; a second one acts at once."""
    flag, previous = StopFlag(), {}

    def stop(number: int, frame: object) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.raised = True

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
