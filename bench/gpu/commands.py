"""Commands with a time limit, and what they printed up to it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.settings import ROOT


@dataclass(frozen=True)
class Done:
    """`code`: None where the limit ended it."""

    code: int | None
    output: str


def run_command(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Done:
    """Both outputs together. What the command leaves running ends with the section's process group."""
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        file.seek(0)
        return Done(code, file.read().decode(errors="replace"))


def tail(text: str, lines: int = 15) -> list[str]:
    return text.splitlines()[-lines:]
