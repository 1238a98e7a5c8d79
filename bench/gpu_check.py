"""Proves and measures the package on a GPU, in one go: `python -m bench.gpu_check`.

Every section runs in a process of its own, with its share of the time that is left, and its cases are on disk before
the next one starts. A failure, a crash or a time limit of one section is recorded, and the next goes on. The exit
status is 1 where anything failed. `--device cpu --tiny --out PATH` tries the script itself without a GPU; it measures
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu.section import (
    FAILED,
    PASSED,
    RESTART,
    RUNNING,
    UNREACHED,
    LostDeviceError,
    Section,
    read_cases,
    slug,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
SHARES = {  # of the time; each is also a module bench.gpu.<name>
    "provenance": 20, "build": 50, "tests": 70, "sanitizer": 40, "ops": 110, "nets": 60, "step": 45, "peers": 15,
    "training": 30, "compiled": 20,
}  # fmt: skip
LEAST = 5.0  # seconds of a section
GRACE = 3.0  # seconds between a section's own deadline and its end by force
TRIES = 4  # processes of a section whose GPU was lost


@dataclass(frozen=True)
class Settings:
    device: str
    tiny: bool
    tune: bool


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="the results; default: bench/results/<gpu>.json")
    parser.add_argument("--budget", type=float, default=460, help="seconds for everything (default: 460)")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="these sections; others in the results stay")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a test of this script")
    parser.add_argument("--tune", action="store_true", help="measure all configurations of the kernels, ship the best")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.out is None and (chosen.device == "cpu" or chosen.tiny):
        parser.error("--device cpu and --tiny need --out: their figures are no results")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    settings = Settings(chosen.device, chosen.tiny, chosen.tune)
    if chosen.section:
        return run_here(chosen.section, chosen.out, chosen.seconds, settings)
    return run_all(chosen, settings)


def run_here(name: str, path: Path, seconds: float, settings: Settings) -> int:
    """One section, in this process."""
    section = Section(path, settings.device, settings.tiny, settings.tune, time.monotonic() + seconds)
    try:
        importlib.import_module(f"bench.gpu.{name}").run(section)
    except LostDeviceError:
        return RESTART
    return 0


def run_all(chosen: argparse.Namespace, settings: Settings) -> int:
    from bench import gpu_tables

    end = time.monotonic() + chosen.budget
    names = [name for name in SHARES if name in (chosen.only or SHARES)]
    if chosen.out is None and "provenance" not in names:
        names.insert(0, "provenance")  # which tells the name of the results
    sections, path = {}, chosen.out
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for number, name in enumerate(names):
            waiting = sum(SHARES[n] for n in names[number:])
            seconds = max(LEAST, (end - time.monotonic()) * SHARES[name] / waiting)
            print(f"{name}: up to {seconds:.0f} s", flush=True)
            sections[name] = run_section(name, Path(folder), seconds, settings)
            print(f"{name}: {sections[name]['status']} in {sections[name]['seconds']:.0f} s", flush=True)
            for case in problems(sections[name]):
                print(f"  {case['case']}: {case['status']}: {case.get('error', '')[:300]}", flush=True)
            path = path or default_path(sections)
            if path is None:
                print("torch sees no GPU here; --out PATH goes on all the same")
                return 1
            result = {"tiny": settings.tiny, "device": settings.device}
            write_json(path, result | {"sections": kept_sections(path, bool(chosen.only), names) | sections})
    print(f"\n{gpu_tables.summary(result | {'sections': sections})}\n\nwritten to {path}")
    return int(any(section["status"] != PASSED for section in sections.values()))


def kept_sections(path: Path, some: bool, names: list[str]) -> dict:
    """Earlier results of the sections that do not run now."""
    if not some or not path.exists():
        return {}
    return {name: section for name, section in json.loads(path.read_text())["sections"].items() if name not in names}


def default_path(sections: dict) -> Path | None:
    """Named after the GPU; None if there is none."""
    gpu = next((case["gpu"] for case in sections["provenance"]["cases"] if "gpu" in case), None)
    return None if gpu is None else ROOT / "bench" / "results" / f"{slug(gpu)}.json"


def run_section(name: str, folder: Path, seconds: float, settings: Settings) -> dict:
    """A section in processes of its own; a new one goes on where the GPU was lost."""
    path, log, start = folder / f"{name}.json", folder / f"{name}.log", time.monotonic()
    end, code = start + seconds, None
    for _ in range(TRIES):
        code = run_process(name, path, log, end - time.monotonic(), settings)
        lost = code == RESTART or (code is not None and code < 0)
        if not lost or time.monotonic() + LEAST > end:
            break
    cases = read_cases(path)
    for case in cases:
        if case["status"] == RUNNING:
            case.update(status=FAILED, error="stopped: out of time" if code is None else "the process ended")
    section = {
        "status": status_of(cases, code), "seconds": round(time.monotonic() - start, 1), "limit": round(seconds, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "cases": cases,
    }  # fmt: skip
    if code != 0:
        section["output"] = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    return section


def run_process(name: str, path: Path, log: Path, seconds: float, settings: Settings) -> int | None:
    """Its exit status, None if it was stopped. Nothing that it started outlives it."""
    command = [sys.executable, "-m", "bench.gpu_check", "--section", name, "--out", str(path)]
    command += ["--device", settings.device, "--seconds", str(max(1.0, seconds - GRACE))]
    command += ["--tiny"] * settings.tiny + ["--tune"] * settings.tune
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(settings), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment(settings: Settings) -> dict[str, str]:
    own = {"SPARK_FAST_BENCH", "TRITON_INTERPRET"}
    found = {name: value for name, value in os.environ.items() if name not in own}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    if settings.tiny:
        found |= {"SPARK_FAST_BENCH": "tiny", "OMP_NUM_THREADS": "1"}
    if settings.device == "cpu":
        found["TRITON_INTERPRET"] = "1"  # so that the kernels of a GPU run
    return found


def status_of(cases: list[dict], code: int | None) -> str:
    """Optional cases count for nothing."""
    needed = [case["status"] for case in cases if not case.get("optional")]
    if code is None:
        last = cases[-1] if cases else {}
        return PASSED if last.get("optional") and set(needed) <= {PASSED} else "out of time"
    if code != 0 or FAILED in needed or not cases:
        return FAILED
    return "out of time" if UNREACHED in needed else PASSED


def problems(section: dict) -> list[dict]:
    return [case for case in section["cases"] if case["status"] not in (PASSED, RUNNING)]


def commit() -> str:
    run = dict(capture_output=True, text=True, cwd=ROOT)
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except OSError:
        return "unknown"
    return (found or "unknown") + (" with changes" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
