"""Proves and measures the package on a GPU, in one go: `python -m bench.gpu_check`.

Every section runs in a process of its own, with its share of the time that is left. What proves the kernels comes
before what measures them, what measures most before what needs most time. The results are written every few seconds, so
that an end by force leaves them. A failure, a crash, a kernel that hangs or a time limit is recorded, and the next case
or section goes on. The exit status is 1 where anything failed. `--tune` measures the kernels' configurations first; the
table goes to spark_fast/ops/tables/ and into the folder of `--out`. `--device cpu --tiny --out PATH` tries the script
itself without a GPU; it measures nothing.
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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from bench.gpu.section import (
    FAILED,
    PASSED,
    RESTART,
    RUNNING,
    UNREACHED,
    LostDeviceError,
    Section,
    overdue,
    read_cases,
    slug,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "spark_fast" / "ops" / "tables"
SHARES = {  # of the time; each is also a module bench.gpu.<name>
    "provenance": 15, "build": 60, "small": 40, "tune": 130, "ops": 100, "nets": 50, "step": 45, "training": 25,
    "tests": 60, "sanitizer": 30, "peers": 5, "compiled": 10,
}  # fmt: skip
BUDGET, TUNING_BUDGET = 460, 575  # seconds
LEAST = 5.0  # seconds of a section
GRACE = 3.0  # seconds between a section's own deadline and its end by force
POLL = 3.0  # seconds between two looks at a running section
TRIES = 8  # processes of a section whose GPU was lost
MOST_LINES = 12  # about the cases of a section that did not pass; the results have all


@dataclass(frozen=True)
class Settings:
    device: str
    tiny: bool
    tune: bool
    cache: Path | None = None  # of what is measured of kernels; the sections share it
    commit: str | None = None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="the results; default: bench/results/<gpu>.json")
    parser.add_argument("--budget", type=float, help=f"seconds for all (default: {BUDGET}, {TUNING_BUDGET} to tune)")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="these sections; others in the results stay")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a test of this script")
    parser.add_argument("--tune", action="store_true", help="measure all configurations of the kernels, ship the best")
    parser.add_argument("--commit", help="what the results are of, where there is no git repository")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.out is None and (chosen.device == "cpu" or chosen.tiny):
        parser.error("--device cpu and --tiny need --out: their figures are no results")
    chosen.tune = chosen.tune or "tune" in (chosen.only or ())
    chosen.budget = chosen.budget or (TUNING_BUDGET if chosen.tune else BUDGET)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.section:
        return run_here(chosen.section, chosen.out, chosen.seconds, Settings(chosen.device, chosen.tiny, chosen.tune))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        cache = Path(folder, "tuning")
        return run_all(chosen, Settings(chosen.device, chosen.tiny, chosen.tune, cache, chosen.commit), Path(folder))


def run_here(name: str, path: Path, seconds: float, settings: Settings) -> int:
    """One section, in this process."""
    section = Section(path, settings.device, settings.tiny, settings.tune, time.monotonic() + seconds)
    try:
        importlib.import_module(f"bench.gpu.{name}").run(section)
    except LostDeviceError:
        return RESTART
    return 0


def run_all(chosen: argparse.Namespace, settings: Settings, folder: Path) -> int:
    from bench import gpu_tables

    end = time.monotonic() + chosen.budget
    wanted = set(chosen.only or SHARES) - {"tune"} | ({"tune"} if settings.tune else set())
    names = [name for name in SHARES if name in wanted]
    if chosen.out is None and "provenance" not in names:
        names.insert(0, "provenance")  # which tells the name of the results
    sections, path = {}, chosen.out
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    result = {"tiny": settings.tiny, "device": settings.device, "sections": sections}

    def progress(name: str, section: dict) -> None:
        sections[name] = section
        if path is not None:
            kept = kept_sections(path, bool(chosen.only), names)
            write_json(path, result | {"sections": kept | sections})
        if name == "tune" and not settings.tiny:
            ship_tables(settings.cache, [TABLES, *([chosen.out.parent] if chosen.out else [])])

    for number, name in enumerate(names):
        waiting = sum(SHARES[n] for n in names[number:])
        seconds = max(LEAST, (end - time.monotonic()) * SHARES[name] / waiting)
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        sections[name] = run_section(name, folder, seconds, settings, progress)
        print(f"{name}: {sections[name]['status']} in {sections[name]['seconds']:.0f} s", flush=True)
        for case in problems(sections[name])[:MOST_LINES]:
            print(f"  {case['case']}: {case['status']}: {case.get('error', '')[:200]}", flush=True)
        path = path or default_path(sections)
        if path is None:
            print("torch sees no GPU here; --out PATH goes on all the same")
            return 1
        progress(name, sections[name])
    print(f"\n{gpu_tables.summary(result)}\n\nwritten to {path}")
    return int(any(section["status"] != PASSED for section in sections.values()))


def ship_tables(cache: Path, folders: list[Path]) -> None:
    """Adds what tuning found so far, one file for each GPU, to the tables in the folders."""
    for found in cache.glob("tuning-*.json"):
        new = json.loads(found.read_text())
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            table = folder / found.name.removeprefix("tuning-") if folder == TABLES else folder / found.name
            old = json.loads(table.read_text())["entries"] if table.exists() else {}
            write_json(table, new | {"entries": old | new["entries"]})


def kept_sections(path: Path, some: bool, names: list[str]) -> dict:
    """Earlier results of the sections that do not run now."""
    if not some or not path.exists():
        return {}
    return {name: section for name, section in json.loads(path.read_text())["sections"].items() if name not in names}


def default_path(sections: dict) -> Path | None:
    """Named after the GPU; None if there is none."""
    gpu = next((case["gpu"] for case in sections["provenance"]["cases"] if "gpu" in case), None)
    return None if gpu is None else ROOT / "bench" / "results" / f"{slug(gpu)}.json"


def run_section(
    name: str, folder: Path, seconds: float, settings: Settings, progress: Callable[[str, dict], None] = lambda *_: None
) -> dict:
    """A section in processes of its own; a new one goes on where the GPU was lost or a case took too long.

    Args:
        progress: gets the section as it is so far, every few seconds.
    """
    path, log, start = folder / f"{name}.json", folder / f"{name}.log", time.monotonic()
    end, code = start + seconds, None

    def described(status: str, cases: list[dict]) -> dict:
        return {
            "status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(seconds, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": settings.commit or commit(), "cases": cases,
        }  # fmt: skip

    for _ in range(TRIES):
        code = run_process(
            name, path, log, end - time.monotonic(), settings,
            lambda: progress(name, described(RUNNING, read_cases(path))),
        )  # fmt: skip
        lost = code == RESTART or (code is not None and code < 0)
        if not lost or time.monotonic() + LEAST > end:
            break
    cases = read_cases(path)
    for case in cases:
        if case["status"] == RUNNING:
            case.update(status=FAILED, error="stopped: out of time" if code is None else "the process ended")
    section = described(status_of(cases, code), cases)
    if code != 0:
        section["output"] = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    return section


def run_process(
    name: str, path: Path, log: Path, seconds: float, settings: Settings, running: Callable[[], None] = lambda: None
) -> int | None:
    """Its exit status, None if it was stopped, RESTART if one of its cases was. Nothing that it started outlives it.

    Args:
        running: called every few seconds meanwhile.
    """
    command = [sys.executable, "-m", "bench.gpu_check", "--section", name, "--out", str(path)]
    command += ["--device", settings.device, "--seconds", str(max(1.0, seconds - GRACE))]
    command += ["--tiny"] * settings.tiny + ["--tune"] * settings.tune
    late, end = None, time.monotonic() + max(1.0, seconds)
    with log.open("ab") as file:
        # A process group, to be ended as a whole. Not a session: that would outlive whoever ends this process by force.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(settings), stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            while late is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(POLL, max(0.1, end - time.monotonic())))
                late = overdue(path)
                running()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if late is None:
        return None
    cases = read_cases(path)
    cases[-1].update(status=FAILED, error=f"stopped: it took more than {late:g} s")
    write_json(path, cases)
    return RESTART


def environment(settings: Settings) -> dict[str, str]:
    own = {"SPARK_FAST_BENCH", "TRITON_INTERPRET"}
    found = {name: value for name, value in os.environ.items() if name not in own}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    if settings.tiny:
        found |= {"SPARK_FAST_BENCH": "tiny", "OMP_NUM_THREADS": "1"}
    if settings.cache:
        found["SPARK_FAST_CACHE"] = str(settings.cache)
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


@cache
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
