"""Compiles every Triton kernel in every shipped configuration and type, for sm_80 and sm_90, without a GPU.

`python -m bench.triton_report` writes docs/triton_report.md and bench/results/triton_report.json; what is there
already, of the same source and Triton, is not compiled again unless `--again` is given. `--tests PATH` does what the
tests need: it lists all kernels and compiles a part of them (`tested`), writes both to PATH and leaves the repository
alone. Exit status 1 where a kernel spills registers.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.triton_cases import Case, cases
from spark_fast.ops import triton_launch, tuning
from spark_fast.ops.triton_launch import Launch, recording

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "bench/results/triton_report.json"
ARCHS = (80, 90)


@dataclass(frozen=True)
class Found:
    """A launch of a kernel, and where it came up first."""

    case: Case
    chosen: bool  # by the launcher; False: one of the case's `configs`
    launch: Launch

    @property
    def config(self) -> str:
        blocks = {k: v for k, v in self.launch.constants.items() if k.startswith("BLOCK")} | self.launch.options
        return " ".join(f"{k.removeprefix('BLOCK_').removeprefix('num_')}={v}" for k, v in blocks.items())


@dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration for one architecture."""

    kernel: str
    case: str
    config: str
    arch: int
    source: str  # a digest of all that goes into the compiler


@dataclass(frozen=True)
class Compiled(Kernel):
    registers: int  # of a thread
    stack: int  # bytes of a thread that do not fit its registers
    shared: int  # bytes of a block
    products: str  # the instruction of its matrix products: wgmma, mma, fma or none


@cache
def launches() -> list[Found]:
    """Each kernel with the same arguments and constants once."""
    first: dict[tuple, Found] = {}
    for case in cases():
        for config in (None, *case.configs):
            with tuning.forced(config) if config else nullcontext(), recording() as made:
                case.run()
            for launch in made:
                first.setdefault(launch.key, Found(case, config is None, launch))
    return list(first.values())


def every_job() -> list[tuple[int, int]]:
    """(number of the launch, architecture) of all kernels."""
    return [(number, arch) for number in range(len(launches())) for arch in ARCHS]


def tested() -> list[tuple[int, int]]:
    """The jobs of the tests: every configuration of every kernel once in bfloat16, for both architectures, and once in
    float32, for sm_80; for sm_90 what every case chooses in bfloat16, and every kernel in float16."""
    jobs, seen = [], set()
    for number, found in enumerate(launches()):
        name, dtype = found.launch.name, found.case.dtype
        new = (name, None if dtype == torch.float16 else found.config, dtype)
        chosen = found.chosen and dtype == torch.bfloat16
        if dtype != torch.float16 and new not in seen:
            jobs.append((number, 80))
        if dtype != torch.float32 and (new not in seen or chosen):
            jobs.append((number, 90))
        seen.add(new)
    return jobs


@cache
def text(kernel: Any) -> str:
    """The text of a kernel, of the functions that it calls, and the numbers that it reads from its module."""
    texts, functions = [], [kernel.fn]
    for function in functions:
        texts.append(inspect.getsource(function))
        for name in sorted(function.__code__.co_names):
            value = function.__globals__.get(name)
            value = getattr(value, "fn", value)  # of a function that Triton compiles
            if inspect.isfunction(value) and value not in functions:
                functions.append(value)
            elif isinstance(value, (int, float, str)) or type(value).__name__ == "constexpr":
                texts.append(f"{name} = {value}")
    return "\n".join(texts)


def describe(job: tuple[int, int]) -> Kernel:
    number, arch = job
    found = launches()[number]
    source = sha256(f"{found.launch.key}\n{text(found.launch.kernel)}".encode()).hexdigest()[:12]
    return Kernel(found.launch.name, found.case.name, found.config, arch, source)


def compile_launch(job: tuple[int, int]) -> Compiled:
    """Compiles the launch of that number, for that architecture."""
    number, arch = job
    launch = launches()[number].launch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: (i,) for i, name in enumerate(launch.kernel.arg_names)}
    constants = {place[name]: value for name, value in launch.constants.items()}
    aligned = {place[name]: [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage = _resources(built.asm["cubin"])
    return Compiled(
        **dataclasses.asdict(describe(job)),
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=built.metadata.shared,
        products=_products(built.asm["ptx"], built.asm["ttgir"]),
    )


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


def compile_all(jobs: list[tuple[int, int]], processes: int, known: dict[Kernel, Compiled]) -> list[Compiled]:
    unknown = [job for job in jobs if describe(job) not in known]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        made = dict(zip(unknown, pool.map(compile_launch, unknown, chunksize=8), strict=True))
    return [made[job] if job in made else known[describe(job)] for job in jobs]


def committed() -> dict[Kernel, Compiled]:
    """The figures of the report, if this Triton made them."""
    import triton

    content = json.loads(FIGURES.read_text())
    if content["triton"] != triton.__version__:
        return {}
    names = [field.name for field in dataclasses.fields(Kernel)]
    return {Kernel(*(row[name] for name in names)): Compiled(**row) for row in content["kernels"]}


def figures(results: list[Compiled]) -> str:
    import triton

    rows = ",\n".join(json.dumps(dataclasses.asdict(r)) for r in results)
    return f'{{"triton": {json.dumps(triton.__version__)}, "kernels": [\n{rows}\n]}}\n'


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
        "Made by `python -m bench.triton_report`, for every configuration in every type. Compiled without a GPU:\n"
        "these are properties of the machine code, not measurements. A line is a kernel with one set of constants;\n"
        "kernels that several cases share stand under the first.\n\n"
        "The tests fail where a kernel's source is not the one that was compiled for this report, or where a thread\n"
        f"needs stack (spilled registers). They compile {len(tested())} of the kernels again: every configuration of\n"
        "every kernel once in bfloat16, for both architectures, and once in float32, for sm_80; for sm_90 what every\n"
        "case chooses in bfloat16, and every kernel in float16.\n\n"
        f"Triton {triton.__version__}, torch {torch.__version__}: {len(results)} kernels, {spills} with spills.\n\n"
        f"{table(results)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, help="compile what the tests do, write it here, and nothing else")
    parser.add_argument("--again", action="store_true", help="compile all kernels, also those that have not changed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if triton_launch.interpreted():
        raise SystemExit("unset TRITON_INTERPRET: in the interpreter kernels cannot be compiled")
    import triton

    if arguments.tests:
        results = compile_all(tested(), arguments.processes, known={})
        rows = {"all": [describe(job) for job in every_job()], "compiled": results}
        content = {name: [dataclasses.asdict(row) for row in of] for name, of in rows.items()}
        arguments.tests.write_text(json.dumps({"triton": triton.__version__, **content}))
    else:
        results = compile_all(every_job(), arguments.processes, {} if arguments.again else committed())
        FIGURES.write_text(figures(results))
        (ROOT / "docs/triton_report.md").write_text(page(results))
    spilled = [r for r in results if r.stack]
    for r in spilled:
        print(f"spills {r.stack} bytes: {r.kernel} {r.config} sm_{r.arch}, {r.case}", file=sys.stderr)
    print(f"{len(results)} kernels compiled, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
