"""Every command and example of the README works; its benchmark table is the one made from the saved results."""

from __future__ import annotations

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
BLOCKS = re.findall(r"```(\w+)( notest)?\n(.*?)```", README, re.DOTALL)


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


def commands_of(kind: str) -> list[list[str]]:
    """The arguments of every `spark-fast` command in blocks of this kind: "" or " notest"."""
    lines = [line for language, note, code in BLOCKS if (language, note) == ("sh", kind) for line in code.splitlines()]
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


@pytest.mark.slow
def test_commands_run(folder, monkeypatch):
    """As written, but with a smaller network, image and run."""
    from spark_fast.cli import main

    monkeypatch.chdir(folder)
    commands = commands_of("")
    assert [c[0] for c in commands] == ["pretrain", "pretrain", "reconstruct", "export"]
    smaller = {"resnet50": "resnet18", "300": "1", "64": "4"}
    for command in commands:
        command = [smaller.get(word, word) for word in command]
        if command[0] == "pretrain":
            command += ["--img-size", "64", "--decoder-width", "32", "--workers", "0"]
        assert main(command) == 0, command
    for name in ("metrics.jsonl", "train.log", "config.json"):
        assert (folder / "runs" / "first" / name).exists()
    assert (folder / "filled.png").exists() and (folder / "resnet50.safetensors").exists()


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE) + re.findall(r"`make (\w+)`", README)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_benchmark_table_is_the_saved_results():
    command = [sys.executable, "-m", "bench.report", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
