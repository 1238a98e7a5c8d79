"""Compiles every Triton kernel in every shipped configuration ahead of time, for sm_80 and sm_90, without a GPU.

`python -m bench.triton_report` writes docs/triton_report.md and bench/results/triton_report.json; `--json PATH` writes
the figures there instead and leaves the repository alone. Exit status 1 where a kernel spills registers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.triton_cases import Case, cases
from spark_fast.ops import triton_launch, tuning
from spark_fast.ops.triton_launch import Launch, recording

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90)


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration, compiled for one architecture."""

    kernel: str
    case: str
    config: str
    arch: int
    registers: int  # of a thread
    stack: int  # bytes of a thread that do not fit its registers
    shared: int  # bytes of a block
    products: str  # the instruction of its matrix products: wgmma, mma, fma or none


def launches() -> Iterator[tuple[str, Launch]]:
    """(case, launch), each kernel with the same arguments and constants once."""
    seen = set()
    for case in cases():
        for launch in record(case):
            if launch.key not in seen:
                seen.add(launch.key)
                yield case.name, launch


def record(case: Case) -> list[Launch]:
    found = []
    with recording() as made:
        case.run()
    found += made
    for config in case.configs:
        with tuning.forced(config), recording() as made:
            case.run()
        found += made
    return found


def compile_launch(job: tuple[int, int]) -> Compiled:
    """Compiles the launch of that number, for that architecture."""
    number, arch = job
    case, launch = _launches()[number]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    constants = {place[name]: value for name, value in launch.constants.items()}
    aligned = {place[name]: [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage, ptx = _resources(built.asm["cubin"]), built.asm["ptx"]
    blocks = {k: v for k, v in launch.constants.items() if k.startswith("BLOCK")} | launch.options
    return Compiled(
        launch.name, case, " ".join(f"{k.removeprefix('BLOCK_').removeprefix('num_')}={v}" for k, v in blocks.items()),
        arch, usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, _products(ptx, built.asm["ttgir"]),
    )  # fmt: skip


_found: list[tuple[str, Launch]] = []


def _launches() -> list[tuple[str, Launch]]:
    if not _found:
        _found.extend(launches())
    return _found


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _products(ptx: str, ttgir: str) -> str:
    if "tt.dot" not in ttgir and "ttng.warp_group_dot" not in ttgir:
        return "none"
    return next((name for name in ("wgmma", "mma") if re.search(rf"\b{name}\.", ptx)), "fma")


def compile_all(processes: int) -> list[Compiled]:
    if triton_launch.interpreted():
        raise SystemExit("unset TRITON_INTERPRET: in the interpreter kernels cannot be compiled")
    jobs = [(number, arch) for number in range(len(_launches())) for arch in ARCHS]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        return list(pool.map(compile_launch, jobs, chunksize=8))


def table(results: list[Compiled]) -> str:
    """One line per kernel, case and configuration: registers, shared memory and instruction on each architecture."""
    lines = [
        "| kernel | configuration | "
        + " | ".join(f"sm_{arch}: registers, KiB shared, products" for arch in ARCHS)
        + " |",
        "|---|---|" + "---|" * len(ARCHS),
    ]
    rows: dict[tuple[str, str, str], dict[int, Compiled]] = {}
    for result in results:
        rows.setdefault((result.case, result.kernel, result.config), {})[result.arch] = result
    previous = None
    for (case, kernel, config), found in rows.items():
        if case != previous:
            lines.append(f"| **{case}** | |" + " |" * len(ARCHS))
            previous = case
        cells = [_cell(found[arch]) for arch in ARCHS]
        lines.append(f"| `{kernel}` | {config} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(of: Compiled) -> str:
    spilled = f", **{of.stack} bytes spilled**" if of.stack else ""
    return f"{of.registers}, {of.shared / 1024:.1f}, {of.products}{spilled}"


def page(results: list[Compiled]) -> str:
    import triton

    spills = sum(r.stack > 0 for r in results)
    return (
        "# Triton kernels, compiled ahead of time\n\n"
        "Made by `python -m bench.triton_report`; the tests compile the same list and fail where a thread needs stack\n"
        "(spilled registers). Compiled without a GPU: these are properties of the machine code, not measurements.\n"
        "A line is a kernel with one set of constants; kernels that several cases share stand under the first.\n\n"
        f"Triton {triton.__version__}, torch {torch.__version__}: {len(results)} kernels, {spills} with spills.\n\n"
        f"{table(results)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here, and nothing else")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    results = compile_all(arguments.processes)
    text = "[\n" + ",\n".join(json.dumps(dataclasses.asdict(r)) for r in results) + "\n]\n"
    (arguments.json or ROOT / "bench/results/triton_report.json").write_text(text)
    if arguments.json is None:
        (ROOT / "docs/triton_report.md").write_text(page(results))
    spilled = [r for r in results if r.stack]
    for r in spilled:
        print(f"spills {r.stack} bytes: {r.kernel} {r.config} sm_{r.arch}, {r.case}", file=sys.stderr)
    print(f"{len(results)} kernels compiled, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
