"""Every command and example of the README and of docs/masks.md works; the README's benchmark table is the one made from
the saved results."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)( notest)?\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
MASKS = BLOCK.findall((ROOT / "docs" / "masks.md").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a folder of images, as the README's reader has it."""
    place = tmp_path_factory.mktemp("readme")
    (place / "photos" / "nested").mkdir(parents=True)
    for i in range(4):
        pixels = numpy.random.default_rng(i).integers(0, 255, (120, 140, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(place / "photos" / ("nested" if i % 2 else ".") / f"{i}.png")
    return place


@pytest.mark.slow
def test_python_examples_run_in_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    examples = [code for language, skipped, code in BLOCKS if language == "python" and not skipped]
    assert len(examples) >= 4
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    assert names["result"].final_loss > 0
    assert names["filled"].shape == (2, 3, 224, 224)
    assert names["dense"].shape == names["same"].shape == (4, 64, 32, 48)


def commands_of(kind: str, blocks: list = BLOCKS) -> list[list[str]]:
    """The arguments of every `spark-fast` command in blocks of this kind: "" or " notest"."""
    codes = [code.replace("\\\n", "") for language, note, code in blocks if (language, note) == ("sh", kind)]
    lines = [line for code in codes for line in code.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("spark-fast")]


def test_commands_for_a_gpu_are_understood(folder, monkeypatch, capsys):
    """As far as the setting that needs one."""
    from spark_fast.cli import main

    monkeypatch.chdir(folder)
    commands = commands_of(" notest")
    assert commands
    for command in commands:
        assert main([*command, "--device", "cpu"]) == 2
        assert "cuda_graph is True, which needs a CUDA GPU" in capsys.readouterr().err


def smaller(command: list[str], model: str = "resnet18", side: str = "64") -> list[str]:
    """The command with a smaller network, image and run."""
    sizes = {"resnet50": model, "300": "1", "64": "4"}
    command = [sizes.get(word, word) for word in command]
    if command[0] == "pretrain":
        command += ["--img-size", side, "--decoder-width", "32", "--workers", "0"]
    return command


@pytest.mark.slow
def test_commands_run(folder, monkeypatch):
    """As written, but with a smaller network, image and run."""
    from spark_fast.cli import main

    monkeypatch.chdir(folder)
    commands = commands_of("")
    assert [c[0] for c in commands] == ["pretrain", "pretrain", "reconstruct", "export"]
    for command in commands:
        assert main(smaller(command)) == 0, command
    for name in ("metrics.jsonl", "train.log", "config.json"):
        assert (folder / "runs" / "first" / name).exists()
    assert (folder / "filled.png").exists() and (folder / "resnet50.safetensors").exists()


@pytest.mark.slow
def test_examples_of_masks_run_in_order_and_print_what_is_said():
    printed, names = io.StringIO(), {}
    codes = [code for language, _, code in MASKS if language == "python"]
    assert len(codes) == 5 and not any(skipped for _, skipped, _ in MASKS)
    with contextlib.redirect_stdout(printed):
        for code in codes:
            exec(compile(code, "masks.md", "exec"), names)
    said = [text for language, _, text in MASKS if language == "text"]
    assert len(said) == 2 and all(text in printed.getvalue() for text in said), printed.getvalue()
    assert names["filled"].shape == (4, 3, 96, 96) and names["y"].features.shape == (2 * 154, 8)


def test_commands_of_masks_run(folder, monkeypatch):
    """As written, but with a smaller network, image and run."""
    from spark_fast.cli import main

    monkeypatch.chdir(folder)
    commands = commands_of("", MASKS)
    assert [c[0] for c in commands] == ["pretrain", "reconstruct", "pretrain", "pretrain"]
    for command in commands:
        assert main(smaller(command, "test_resnet", "96")) == 0, command
    assert '"mask_kind": "block"' in (folder / "runs" / "block" / "config.json").read_text()
    assert '"mask_ratio": [0.4, 0.8]' in (folder / "runs" / "range" / "metrics.jsonl").read_text()


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE) + re.findall(r"`make (\w+)`", README)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_benchmark_table_is_the_saved_results():
    command = [sys.executable, "-m", "bench.report", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
