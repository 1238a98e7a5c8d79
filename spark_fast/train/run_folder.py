"""The folder of a run: what it holds, how it is opened anew or again, and its logs."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spark_fast.files import write_text
from spark_fast.train.checkpoint import load_checkpoint
from spark_fast.train.config import PretrainConfig


class RunFolder:
    """Names of a run's files, its log and its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.files = path / "files.json"
        self.checkpoint = path / "last.pt"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.backbone = path / "backbone.safetensors"
        self.loss_curve = path / "loss.png"
        self.reconstructions = path / "reconstructions"

    @property
    def resume_hint(self) -> str:
        """The command that goes on with this run."""
        return f"spark-fast pretrain --out {shlex.quote(str(self.path))} --resume"

    def say(self, text: str) -> None:
        """One line on the terminal (above the progress bar) and, with the time, in train.log."""
        tqdm.write(text, file=sys.stderr)
        self.note(text)

    def note(self, text: str) -> None:
        """One line in train.log."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def add_metrics(self, values: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl; numbers that JSON cannot hold become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl. A half line, left by a killed run, is skipped."""
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.exists() else ""
        rows = []
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def cut_metrics(self, step: int) -> None:
        """Drop the metrics of steps after a checkpoint: the resumed run writes them again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def begin(self, config: PretrainConfig, files: list[str]) -> None:
        """Create the folder and write down the settings and the list of images (a resumed run keeps to this list)."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.save_text())
        write_text(self.files, json.dumps(files))

    def stored_files(self) -> list[str] | None:
        """The images that the run began with."""
        return json.loads(self.files.read_text()) if self.files.exists() else None


def stored_config(out: Path) -> PretrainConfig:
    """Settings of the run in a folder. ValueError if there is none."""
    folder = RunFolder(Path(out))
    if folder.config.is_file():
        try:
            return PretrainConfig.from_dict(json.loads(folder.config.read_text()))
        except ValueError as error:
            raise ValueError(f"{folder.config} cannot be read: {error}") from error
    if folder.checkpoint.is_file():
        return PretrainConfig.from_dict(load_checkpoint(folder.checkpoint)["config"])
    raise ValueError(
        f"out={out} holds no run to resume (neither config.json nor last.pt); leave resume out to start one"
    )


def check_new(config: PretrainConfig) -> None:
    """ValueError unless config.out is free for a new run."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"out={out} is not empty. Set resume (--resume) to go on with the run in it, or give another folder"
        )
    if out.resolve().is_relative_to(config.data.resolve()):
        raise ValueError(f"out={out} lies inside data={config.data}: its pictures would become training images")


def check_same(config: PretrainConfig, stored: PretrainConfig) -> None:
    """ValueError if a run cannot go on because settings differ that fix its numbers."""
    changed = config.changed_since(stored)
    if changed:
        raise ValueError(
            f"cannot resume {config.out} with other settings (stored -> given): {'; '.join(changed)}. "
            "Leave them out to keep the stored ones, or start a new run in another folder"
        )
