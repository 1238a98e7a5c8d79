"""Command line: spark-fast pretrain | reconstruct | export | coverage | info."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import spark_fast
from spark_fast.evaluate.grid import save_grid
from spark_fast.files import write_text
from spark_fast.ops import backend
from spark_fast.spark import SparK
from spark_fast.train.checkpoint import export_backbone, model_from_checkpoint
from spark_fast.train.config import PretrainConfig
from spark_fast.train.data import list_images, load_pictures
from spark_fast.train.loop import choose_device, pretrain
from spark_fast.train.run_folder import stored_config
from spark_fast.train.seeds import PICTURE, generator

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    NotImplementedError,  # an operation without a sparse form
    backend.BackendError,
    torch.OutOfMemoryError,
)


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Draw images, what a trained network sees of them, and what it makes of the rest."""

    run: Path | None = None
    """Folder of a pretrain run."""

    checkpoint: Path | None = None
    """Instead of run: a checkpoint file (last.pt, or one of SparK's released ones with decoder)."""

    data: Path | None = None
    """A folder of images or one image. None: the images of the run."""

    out: Path | None = None
    """PNG to write. None: reconstruction.png in the run's folder."""

    count: int = 8
    """Number of images, spread evenly over the folder."""

    seed: int = 0
    """Fixes the masks."""

    device: str = "auto"
    """Device of torch, for instance cpu or cuda:1."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the backbone's weights alone, for timm.create_model(name, num_classes=0, checkpoint_path=...)."""

    out: Path
    """File to write."""

    run: Path | None = None
    """Folder of a pretrain run."""

    checkpoint: Path | None = None
    """Instead of run: a checkpoint file."""

    format: Literal["safetensors", "pth"] | None = None
    """Kind of file. None: by the ending of out."""


@dataclass(frozen=True, kw_only=True)
class CoverageCommand:
    """Check that timm's convolutional networks run sparsely and right: the smallest of each family, or those named."""

    filter: str | None = None
    """Shell pattern of names, for instance 'resnet*'."""

    all: bool = False
    """Every convolutional architecture: for hours."""

    max_parameters: float = 150
    """Leave out networks with more millions of parameters."""

    out: Path | None = None
    """JSON file, written after each network; a later call goes on where it ends."""

    table: Path | None = None
    """Markdown file for the table."""


@dataclass(frozen=True)
class Info:
    """Show versions, and which backend runs each operation and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 if a check failed, 2 for an error the user can mend, 130 after Ctrl-C.

    Such errors are one line. --debug anywhere, or SPARK_FAST_DEBUG=1 in the environment, shows the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("SPARK_FAST_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(_parse(arguments))
    except KeyboardInterrupt as error:
        print(f"spark-fast: {error or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"spark-fast: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__


def _parse(arguments: list[str]) -> PretrainConfig | Reconstruct | Export | CoverageCommand | Info:
    with_defaults = tyro.conf.subcommand("pretrain", prefix_name=False, **_stored_defaults(arguments))
    commands = (
        Annotated[PretrainConfig, with_defaults]
        | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct", prefix_name=False)]
        | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
        | Annotated[CoverageCommand, tyro.conf.subcommand("coverage", prefix_name=False)]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(commands, prog="spark-fast", description=_DESCRIPTION, args=arguments)


_DESCRIPTION = "Sparse masked pre-training of convolutional networks. --debug shows tracebacks of errors."


def _stored_defaults(arguments: list[str]) -> dict[str, PretrainConfig]:
    """With `pretrain --resume`, options that are left out are those of the run in --out."""
    if arguments[:1] != ["pretrain"] or "--resume" not in arguments:
        return {}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    out = parser.parse_known_args(arguments)[0].out
    if out is None:
        return {}
    return {"default": stored_config(out)}


def _run(command: PretrainConfig | Reconstruct | Export | CoverageCommand | Info) -> int:
    if isinstance(command, PretrainConfig):
        _pretrain(command)
    elif isinstance(command, Reconstruct):
        _reconstruct(command)
    elif isinstance(command, Export):
        _export(command)
    elif isinstance(command, CoverageCommand):
        return _coverage(command)
    else:
        _info()
    return 0


def _pretrain(config: PretrainConfig) -> None:
    result = pretrain(config)
    written = {"checkpoint": result.checkpoint, "backbone": result.backbone, "metrics": result.metrics}
    written |= {"loss curve": result.loss_curve, "reconstructions": result.reconstructions}
    for name, path in written.items():
        if path is not None:
            print(f"{name:16}{path}")


def _load(run: Path | None, checkpoint: Path | None) -> tuple[SparK, PretrainConfig]:
    """The network of a run or a checkpoint file, and the settings that tell how its images are prepared."""
    if (run is None) == (checkpoint is None):
        raise ValueError("give either --run FOLDER or --checkpoint FILE")
    if run is not None and not run.is_dir():
        raise ValueError(f"run={run} is not a folder of a pretrain run")
    return model_from_checkpoint(run / "last.pt" if run else checkpoint)


def _reconstruct(command: Reconstruct) -> None:
    if command.count < 1 or command.seed < 0:
        raise ValueError(f"count is {command.count} and seed {command.seed}, need count >= 1 and seed >= 0")
    if command.run is None and (command.data is None or command.out is None):
        raise ValueError("with --checkpoint, give --data (images) and --out (a PNG) too")
    device = choose_device(command.device)
    model, config = _load(command.run, command.checkpoint)
    data = command.data or config.data
    if data.is_file():
        data, files = data.parent, [data.name]
    else:
        files = list_images(data)
    images, names = load_pictures(dataclasses.replace(config, data=data), files, command.count)
    out = command.out or command.run / "reconstruction.png"
    active = model.random_mask(len(images), generator=generator(command.seed, PICTURE))
    save_grid(out, model.to(device), images, active, *config.normalization, names=names)
    print(f"{len(images)} reconstructions in {out}")


def _export(command: Export) -> None:
    endings = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth"}
    kind = command.format or endings.get(command.out.suffix)
    if kind is None:
        raise ValueError(f"out={command.out} ends in none of {', '.join(endings)}; rename it or give --format")
    model, config = _load(command.run, command.checkpoint)
    if command.out.is_dir():
        raise ValueError(f"out={command.out} is a folder, need a file name")
    command.out.parent.mkdir(parents=True, exist_ok=True)
    export_backbone(model, command.out, kind)
    size = f", in_chans={config.in_chans}" if config.in_chans != 3 else ""
    name = f"{config.model!r}" if command.run else "the network's name"
    print(f"timm.create_model({name}, num_classes=0{size}, checkpoint_path={str(command.out)!r})")


def _coverage(command: CoverageCommand) -> int:
    from spark_fast.evaluate import coverage

    if command.filter is not None and command.all:
        raise ValueError("give --filter or --all, not both")
    for name, path in (("out", command.out), ("table", command.table)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}={path} lies in a folder that does not exist: {path.parent}")
    results = coverage.run(command.filter, command.all, int(command.max_parameters * 1e6), command.out)
    rows = results.networks
    if command.table is not None:
        write_text(command.table, coverage.table(results))
    failed = [row.name for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return FAILED if failed else 0


def _info() -> None:
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    versions = {"spark_fast": spark_fast.__version__, "torch": torch.__version__}
    versions |= {package: _version(package) for package in ("torchvision", "timm", "triton", "numpy", "pillow")}
    for package, version in versions.items():
        print(f"{package:12} {version}")
    print(f"CPU          {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPU          {', '.join(devices) or 'none'} (torch built for CUDA {torch.version.cuda})")
    print("\nBackend per operation (* = runs):")
    for row in backend.report():
        mark = "*" if row["chosen"] else " "
        state = "available" if row["available"] else "not available"
        reason = f": {row['reason']}" if row["reason"] else ""
        print(f"{mark} {row['op']:12} {row['device']:5} {row['backend']:10} {state}{reason}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
