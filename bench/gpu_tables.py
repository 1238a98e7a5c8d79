"""Tables from what `bench.gpu_check` wrote: its last lines, and the GPU section of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import aims, tables

NOT_MEASURED = "not yet measured"


def cases(result: dict, section: str) -> list[dict]:
    return result["sections"].get(section, {}).get("cases", [])


def figures(result: dict) -> Iterator[tuple[str, dict, str, float, bool]]:
    """(section, case, compared with, value, is it a share) of everything compared."""
    for section in result["sections"]:
        for case in cases(result, section):
            for against, value in case.get("gains", {}).items():
                yield section, case, against, value, False
            for against, value in case.get("shares", {}).items():
                yield section, case, against, value, True


def aim_of(section: str, case: dict, against: str, share: bool) -> aims.GpuAim | None:
    wanted = (section, case["case"], against, share)
    return next((a for a in aims.gpu() if (a.section, a.case, a.against, a.at_most) == wanted), None)


def verdict(met: bool | None) -> str:
    return {None: NOT_MEASURED, True: "yes", False: "missed"}[met]


def summary(result: dict) -> str:
    """The last lines of a run: each comparison with its aim, and each section's end."""
    rows = [("section", "case", "gain", "aim", "met")]
    for section, case, against, value, share in figures(result):
        aim = None if result.get("tiny") else aim_of(section, case, against, share)
        over = "" if against == "dense" else f" over {against}"
        rows.append(
            (section, case["case"], f"{value:.2f}x{over}", *((aim.words, verdict(aim.met(case))) if aim else ("", "")))
        )
    if result.get("tiny"):
        rows.append(("", "tiny shapes: these figures mean nothing", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ends = [f"{name}: {_end(section)}" for name, section in result["sections"].items()]
    return "\n".join([*lines, "", *ends])


def _end(section: dict) -> str:
    counts: dict[str, int] = {}
    for case in section["cases"]:
        counts[case["status"]] = counts.get(case["status"], 0) + 1
    return f"{section['status']} ({', '.join(f'{n} {status}' for status, n in counts.items())})"


def page(results: Sequence[dict]) -> str:
    """The GPU section: for each GPU its aims, sections and figures; without any, every aim as not yet measured."""
    if not results:
        return f"No GPU's results are saved: {NOT_MEASURED}.\n\n{aims_table({'sections': {}})}"
    parts = []
    for result in results:
        parts += [
            f"### {provenance(result)}",
            aims_table(result),
            ends_table(result),
            ops_table(result),
            nets_table(result),
        ]
    return "\n\n".join(parts)


def provenance(result: dict) -> str:
    machine = next((case for case in cases(result, "provenance") if "gpu" in case), {"gpu": "unknown GPU"})
    smi = next((case for case in cases(result, "provenance") if "driver_version" in case), {})
    parts = [machine["gpu"]]
    parts += [f"driver {smi['driver_version']}"] if smi else []
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "cudnn", "python") if machine.get(name)]
    sections = result["sections"].values()
    parts += sorted({section["date"][:10] for section in sections})
    parts.append("commit " + ", ".join(sorted({section["commit"] for section in sections})))
    return ", ".join(parts)


def aims_table(result: dict) -> str:
    rows = []
    for aim in aims.gpu():
        case = next((c for c in cases(result, aim.section) if c["case"] == aim.case), {})
        value = aim.reached(case)
        reached = NOT_MEASURED if value is None else tables.gain(value)
        met = verdict(aim.met(case))
        rows.append([aim.section, aim.case, aim.against, reached, aim.words, f"**{met}**" if met == "missed" else met])
    return tables.table(["section", "case", "against", "reached", "aim", "met"], rows)


def ends_table(result: dict) -> str:
    rows = []
    for name, section in result["sections"].items():
        bad = [c for c in section["cases"] if c["status"] != "passed"]
        words = "; ".join(f"{c['case']}: {c['status']}" for c in bad)
        rows.append([name, section["status"], f"{section['seconds']:.0f}", words])
    return tables.table(["section", "end", "seconds", "cases that did not pass"], rows)


def ops_table(result: dict) -> str:
    rows = []
    for case in (c for c in cases(result, "ops") if "us" in c):
        ours = ", ".join(f"{name} {us:.4g}" for name, us in case["us"].items() if not name.startswith("dense"))
        rates = [f"{case[rate]:.3g}" if rate in case else "" for rate in ("tflops", "tbs")]
        dense = f"{case['us'][case['dense_form']]:.4g}"
        rows.append(
            [case["case"], ours, dense, tables.gain(case["gains"]["dense"]), *rates, f"{100 * case['of_floor']:.0f} %"]
        )
    return tables.table(["case", "ours (us)", "dense (us)", "gain", "TFLOP/s", "TB/s", "of the floor"], rows)


def nets_table(result: dict) -> str:
    rows = []
    for section in ("nets", "step", "compiled", "peers"):
        for case in (c for c in cases(result, section) if "ms" in c):
            times = ", ".join(f"{name} {tables.ms(ms)}" for name, ms in case["ms"].items())
            gains = ", ".join(f"{tables.gain(value)} over {name}" for name, value in case.get("gains", {}).items())
            rows.append([case["case"], str(case.get("batch", "")), times, gains])
    return tables.table(["case", "batch", "ms", "gain"], rows)
