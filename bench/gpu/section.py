"""One section of the check in its own process: its cases, each recorded on disk before and after it runs."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNING, PASSED, FAILED, UNREACHED, ABSENT = "running", "passed", "failed", "no time left", "not available"
RESTART = 75  # exit status: the GPU is unusable for this process, a new one may go on
LOST = re.compile(
    r"illegal memory access|misaligned address|device-side assert|unspecified launch failure|CUDA-capable|"
    r"illegal instruction|illegal address|invalid program counter|hardware stack error|launch timed out|ECC error|"
    r"EXECUTION_FAILED"
)


class NotAvailableError(Exception):
    """What a case needs is not there: no failure, but no result either."""


class LostDeviceError(Exception):
    """No later CUDA call of this process can succeed."""


@dataclass
class Section:
    """What a section's module gets.

    Attributes:
        path: the file of its cases.
        device: "cuda" or "cpu"; tiny: small shapes, which measure nothing; tune: measure the kernels' configurations.
        deadline: of time.monotonic(); a case begins only before it.
        cases: what was recorded so far, by an earlier process of this section too.
    """

    path: Path
    device: str = "cuda"
    tiny: bool = False
    tune: bool = False
    deadline: float = float("inf")
    cases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cases = read_cases(self.path)
        for case in self.cases:
            if case["status"] == RUNNING:
                case.update(status=FAILED, error="the process ended in the middle of it")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def case(
        self, name: str, run: Callable[[], dict[str, Any]], optional: bool = False, limit: float | None = None
    ) -> dict[str, Any] | None:
        """Runs and records one case: `run` returns what is known of it. An exception is recorded and goes no further.

        Args:
            optional: neither its failure nor its absence makes the section fail.
            limit: seconds after which the check ends this process, whose kernel may hang, and another goes on.

        Raises:
            LostDeviceError: after a CUDA error that no process survives.
        """
        if any(case["case"] == name for case in self.cases):
            return None
        entry: dict[str, Any] = {"case": name, "status": RUNNING if self.left > 0 else UNREACHED}
        entry |= {"optional": True} if optional else {}
        entry |= {"limit": limit} if limit and not self.tiny else {}
        self.cases.append(entry)
        self.save()
        if entry["status"] == UNREACHED:
            return None
        start, lost = time.monotonic(), None
        try:
            entry |= run()
            entry["status"] = PASSED if not entry.get("error") else FAILED
        except NotAvailableError as error:
            entry.update(status=ABSENT, error=str(error))
        except Exception as error:
            entry.update(status=FAILED, error=f"{type(error).__name__}: {error}"[:2000], trace=_where(error))
            lost = error if LOST.search(str(error)) else None
        entry["seconds"] = round(time.monotonic() - start, 2)
        self.save()
        if lost is not None:
            raise LostDeviceError(str(lost))
        return entry if entry["status"] == PASSED else None

    def save(self) -> None:
        write_json(self.path, self.cases)


def _where(error: Exception) -> list[str]:
    """Places of the innermost calls, without the machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def overdue(path: Path) -> float | None:
    """The limit of the running case, if it is over it: its file was written when it began."""
    last = next(iter(read_cases(path)[-1:]), {})
    limit = last.get("limit") if last.get("status") == RUNNING else None
    return limit if limit and time.time() - path.stat().st_mtime > limit else None


def read_cases(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write_json(path: Path, content: object) -> None:
    """The old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def slug(gpu: str) -> str:
    """As `spark_fast.ops.tuning.slug`, without importing torch."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
