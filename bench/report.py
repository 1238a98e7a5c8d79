"""Turns saved results into docs/performance.md, its plot and the README's table: `python -m bench.report [--check]`.

Tables stand between markers; prose around them stays, and no number in a table is typed by hand. `--check` only
compares (exit status 1, naming what is out of date) and needs no matplotlib.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_tables, plot, sweeps, tables

ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(r"(<!-- table: ([a-z -]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
README_BEGIN, README_END = "<!-- benchmark table: made by bench/report.py -->", "<!-- end of benchmark table -->"
RESULTS = ("cpu.json", "cpu-default-allocator.json", "cpu-pixels.json", "cpu-other.json")
PLOT = "docs/mask_ratio.svg"


def load(root: Path, name: str) -> dict | None:
    path = root / "bench" / "results" / name
    return json.loads(path.read_text()) if path.exists() else None


def tidy(path: Path) -> None:
    """Writes a result with one line per case: small, and a change shows as a change of that line."""
    if path.exists():
        result = json.loads(path.read_text())
        lines = ",\n".join(json.dumps(case) for case in result.pop("benchmarks"))
        head = json.dumps(result, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "benchmarks": [\n{lines}\n ]\n}}\n')


def load_gpus(root: Path) -> list[dict]:
    """The results of `bench.gpu_check`, by file name."""
    found = [json.loads(path.read_text()) for path in sorted((root / "bench" / "results").glob("*.json"))]
    return [result for result in found if isinstance(result, dict) and result.get("sections") and not result["tiny"]]


def sections(
    result: dict | None,
    default: dict | None,
    pixels: dict | None,
    other: dict | None = None,
    gpus: Sequence[dict] = (),
) -> dict[str, str]:
    """The generated parts of docs/performance.md by name; `default`: the results with the default allocator; `pixels`:
    those of random pixel masks; `other`: networks on another machine; `gpus`: those of `bench.gpu_check`."""
    mask_ratio = sweeps.mask_ratio(result)
    if sweeps.series(result):
        mask_ratio += f"\n\n![time against mask ratio]({Path(PLOT).name})\n\n" + sweeps.times(result)
    return {
        "provenance": tables.provenance(result),
        "encoders": tables.encoders(result),
        "steps": tables.steps(result),
        "default allocator": "\n\n".join(
            (tables.encoders(default), tables.steps(default), tables.provenance(default)) if default
            else (tables.NOT_MEASURED,)
        ),
        "another machine": "\n\n".join(
            (tables.encoders(other), tables.steps(other), tables.memory(other), tables.losses(other),
             tables.provenance(other)) if other
            else (tables.NOT_MEASURED,)
        ),
        "parts": tables.modules(result),
        "memory": tables.memory(result),
        "mask ratio": mask_ratio,
        "linear": sweeps.linear(result),
        "convolution": tables.layers(result, "conv"),
        "depthwise": tables.layers(result, "depthwise"),
        "other ops": tables.figures(result, "batch", "layer", "group", "pool", "densify", "patch_loss"),
        "spconv": tables.spconv(result),
        "random pixel masks": sweeps.pixels(pixels),
        "losses": tables.losses(result),
        "gpu": gpu_tables.page(gpus),
        "figures": tables.figures(result, "conv", "depthwise"),
    }  # fmt: skip


def readme_table(result: dict | None) -> str:
    """Encoders and steps, short."""
    rows = []
    for kind, words in (("encoder", "encoder of {}, forward + backward"), ("step", "training step of {}")):
        for info in tables.cases(result, kind):
            times = [tables.ms(info["ms"][side]) for side in ("dense", "sparse")]
            rows.append([words.format(info["net"]), *times, tables.gain(info["ratio"]["dense"])])
    where = ""
    for first in tables.cases(result, "encoder")[:1]:
        where = f"Batch {first['batch']}, {first['img_size']} px, mask ratio {first['mask_ratio']}; "
    heads = ["", "dense, masked (ms)", "sparse (ms)", "gain"]
    return f"{tables.table(heads, rows)}\n\n{where}{tables.provenance(result)}"


def readme_other(other: dict | None) -> str:
    """The gains on another machine, in a sentence."""
    if other is None:
        return ""
    cases = [*tables.cases(other, "encoder"), *tables.cases(other, "step")]
    gains = ", ".join(f"{i['net']}{' step' * (i['kind'] == 'step')} {tables.gain(i['ratio']['dense'])}" for i in cases)
    speed, commit = other["machine_info"]["gemm_gflops"], other["commit_info"]["id"]
    return f"\n\nOn a slower machine, of {speed:.0f} GFLOP/s, and commit {commit}: {gains}."


def filled(text: str, parts: dict[str, str]) -> str:
    """`text` with the parts between their markers; KeyError for a marker that nothing fills, or the other way round."""
    names = [match[1] for match in MARKERS.findall(text)]
    if sorted(names) != sorted(parts):
        raise KeyError(f"markers {sorted(names)} do not fit the tables {sorted(parts)}")
    return MARKERS.sub(lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}", text)


def outputs(root: Path) -> dict[Path, str]:
    """What each generated text file must hold."""
    result, default, pixels, other = (load(root, name) for name in RESULTS)
    performance, readme = root / "docs" / "performance.md", root / "README.md"
    head, rest = readme.read_text().split(README_BEGIN)
    _, tail = rest.split(README_END)
    return {
        performance: filled(performance.read_text(), sections(result, default, pixels, other, load_gpus(root))),
        readme: f"{head}{README_BEGIN}\n{readme_table(result)}{readme_other(other)}\n{README_END}{tail}",
    }


def main(check: bool, root: Path = ROOT) -> int:
    result, picture = load(root, RESULTS[0]), root / PLOT
    wanted = outputs(root)
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    if sweeps.series(result) and (not picture.exists() or plot.digest(result) not in picture.read_text()):
        stale.append(picture)
    if check:
        for path in stale:
            print(f"{path} is not what the saved results say: run `python -m bench.report`")
        return int(bool(stale))
    for name in RESULTS:
        tidy(root / "bench" / "results" / name)
    for path, text in wanted.items():
        path.write_text(text)
    if sweeps.series(result):
        plot.draw(result, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
