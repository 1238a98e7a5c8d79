"""The report of the benchmarks, on made-up results: losses stay visible, and stale files are noticed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"cpu": "a processor", "threads": 2, "instruction_set": "avx2", "torch": "2.99", "python": "3.12"}


@pytest.fixture
def report(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.report")


def case(kind: str, dense: float, sparse: float, **info) -> dict:
    info |= {"kind": kind, "batch": 8, "ms": {"dense": dense, "sparse": sparse}, "ratio": {"dense": dense / sparse}}
    return {"name": "made up", "extra_info": info, "stats": {}}


def layer(direction: str, dense: float, sparse: float, gather: float, **info) -> dict:
    info = {"op": "conv", "net": "resnet", "layer": "3x3", "kernel": 3, "stride": 1, "groups": 1, "side": 8} | info
    made = case("op", dense, sparse, channels=64, out_channels=64, direction=direction, **info)
    made["extra_info"]["ms"]["gather"], made["extra_info"]["ratio"]["gather"] = gather, gather / sparse
    return made


def swept(net: str, ratio: float, dense: float, sparse: float) -> dict:
    return case("sweep", dense, sparse, sweep="mask ratio", net=net, mask_ratio=ratio)


def result(*cases: dict) -> dict:
    return {
        "machine_info": MACHINE,
        "commit_info": {"id": "abc1234"},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": list(cases),
    }


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with documents and made-up results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "docs")
    made = result(
        case("encoder", 1000, 500, net="resnet50", img_size=224, mask_ratio=0.6),
        case("encoder", 1000, 400, net="convnext_small", img_size=224, mask_ratio=0.6),
        case("step", 900, 1000, net="resnet50", img_size=224, mask_ratio=0.6),
        layer("forward", 3, 1, 2), layer("grad_input", 3, 1, 0.5), layer("grad_weight", 1, 2, 4),
    )  # fmt: skip
    (tmp_path / "bench" / "results" / "cpu.json").write_text(json.dumps(made))
    return tmp_path


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, found
    return found[0]


def test_aims_met_and_missed(report, root):
    assert report.main(check=False, root=root) == 0
    text = (root / "docs" / "performance.md").read_text()
    assert "2.00x | >= 2.4x | **missed**" in line_with(text, "| resnet50 |", "2.4x")
    assert "2.50x | >= 2.4x | yes" in line_with(text, "| convnext_small |", "2.4x")
    assert "**0.90x** | >= 1.6x | **missed**" in line_with(text, "| resnet50 |", "1.6x")


def test_a_direction_that_loses_is_bold_and_listed(report, root):
    report.main(check=False, root=root)
    text = (root / "docs" / "performance.md").read_text()
    row = line_with(text, "3x3, side 8, 64 to 64", ">= 2.2x")
    assert "3.00x | 3.00x | **0.50x** | 7 | 4 | 1.75x | >= 2.2x | **missed** | 1.62x" in row
    assert "grad-weight 0.50x" in line_with(text, "Slower than dense:")
    assert "grad-input 0.50x" in line_with(text, "Slower than gathering")


def test_prose_and_provenance_stay(report, root):
    path = root / "docs" / "performance.md"
    path.write_text(path.read_text().replace("## Losses\n", "## Losses\n\nBy hand.\n"))
    report.main(check=False, root=root)
    assert "By hand." in path.read_text()
    assert "a processor, 2 threads, avx2, torch 2.99, Python 3.12, 2030-01-02, commit abc1234" in path.read_text()
    assert "| encoder of resnet50, forward + backward | 1000 | 500 | 2.00x |" in (root / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_a_number_changed_by_hand_is_noticed(report, root, name, capsys):
    report.main(check=False, root=root)
    assert report.main(check=True, root=root) == 0
    path = root / name
    path.write_text(path.read_text().replace("2.00x", "2.10x"))
    assert report.main(check=True, root=root) == 1
    assert name in capsys.readouterr().out


def test_a_marker_that_nothing_fills_is_an_error(report, root):
    path = root / "docs" / "performance.md"
    path.write_text(path.read_text().replace("<!-- table: steps -->", "<!-- table: stairs -->"))
    with pytest.raises(KeyError, match="stairs"):
        report.main(check=True, root=root)


def test_tidy_keeps_the_values(report, tmp_path):
    made = result(case("encoder", 2, 1, net="a"), case("encoder", 4, 1, net="b"))
    (tmp_path / "cpu.json").write_text(json.dumps(made, indent=4))
    report.tidy(tmp_path / "cpu.json")
    text = (tmp_path / "cpu.json").read_text()
    assert json.loads(text) == made
    assert sum('"made up"' in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([(0.0, 1.1), (0.6, 2.0)], "faster at every ratio measured"),
        ([(0.0, 1.01), (0.6, 2.0)], "equal at 0, faster above"),
        ([(0.0, 0.8), (0.4, 1.2), (0.6, 2.0)], "faster from 0.20 on"),
        ([(0.0, 0.5), (0.6, 0.9)], "slower at the highest ratio measured"),
    ],
)
def test_crossover(report, gains, words):
    assert report.sweeps.crossover(gains) == words


def test_plot_is_the_same_for_the_same_results(report, root):
    pytest.importorskip("matplotlib", reason="the plot needs the extra 'bench'")
    path = root / "bench" / "results" / "cpu.json"
    saved = json.loads(path.read_text())
    saved["benchmarks"] += [swept("resnet50", r, 10, 11 * (1 - r)) for r in (0.0, 0.6, 0.9)]
    path.write_text(json.dumps(saved))
    assert report.main(check=False, root=root) == 0
    picture = root / "docs" / "mask_ratio.svg"
    first = picture.read_text()
    assert "faster from" in line_with((root / "docs" / "performance.md").read_text(), "| resnet50 |", ">= 0.85x")
    report.main(check=False, root=root)
    assert picture.read_text() == first and "dc:date" not in first
    assert report.main(check=True, root=root) == 0
    saved["benchmarks"][-1]["extra_info"]["ms"]["sparse"] = 7
    path.write_text(json.dumps(saved))
    assert report.main(check=True, root=root) == 1


def test_random_pixel_masks_say_from_which_density_sparse_is_faster(report, root):
    def pixels(density: float, dense: float, sparse: float, **more) -> dict:
        made = case("pixels", dense, sparse, channels=64, threads=1, density=density, rows_in=100)
        made["extra_info"]["ms"] |= {"sparse with tables": sparse + 1} | more
        return made

    cases = [pixels(0.9, 10, 12), pixels(0.1, 10, 1, **{"spconv": 4, "spconv with rulebook": 5}), pixels(0.5, 10, 5)]
    (root / "bench" / "results" / "cpu-pixels.json").write_text(json.dumps(result(*cases)))
    report.main(check=False, root=root)
    text = (root / "docs" / "performance.md").read_text()
    assert "- 64 channels, 1 thread: faster from 50% downwards (2.00x there), slower at 90%." in text
    assert "| 10 % | 100 | 10 | 1 | 10x | 2 | 5.00x | 4 | 5 | 4.00x |" in text
    assert "| 90 % | 100 | 10 | 12 | **0.83x** | 13 | **0.77x** |  |  |  |" in text
    assert report.sweeps.faster_below([(0.1, 2.0), (0.5, 1.5)]) == "faster at every density measured, up to 50%"
    assert report.sweeps.faster_below([(0.1, 0.9), (0.5, 0.5)]) == "slower at 10% already"
