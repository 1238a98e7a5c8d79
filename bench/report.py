"""Turns saved results into the benchmark table of the README: `python bench/report.py [--check]`.

The table stands between two markers; nothing in it is typed by hand. `--check` only compares (exit status 1 if the
README is out of date).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "cpu.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark table: made by bench/report.py -->", "<!-- end of benchmark table -->"


def table(result: dict) -> str:
    """The Markdown table and its provenance."""
    lines = [
        "| encoder, forward + backward | batch | dense, masked (ms) | sparse (ms) | gain |",
        "|---|---|---|---|---|",
    ]
    for case in result["benchmarks"]:
        info = case["extra_info"]
        lines.append(
            f"| {info['model']}, {info['img_size']} px, mask ratio {info['mask_ratio']}, {info['dtype']} "
            f"| {info['batch']} | {info['dense_ms']:.0f} | {info['sparse_ms']:.0f} | {info['ratio']:.2f}x |"
        )
    machine, rounds = result["machine_info"], result["benchmarks"][0]["extra_info"]["rounds"]
    provenance = (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch']}, "
        f"Python {machine['python']}, {result['datetime'][:10]}, commit {result['commit_info']['id']}; medians of "
        f"{rounds} alternating rounds in one process."
    )
    lines += ["", provenance]
    return "\n".join(lines)


def main(check: bool) -> int:
    readme = README.read_text()
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{table(json.loads(RESULT.read_text()))}\n{END}{tail}"
    if check:
        return int(new != readme)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
