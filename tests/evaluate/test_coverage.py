"""The coverage of timm's networks: the checks on a few networks, and that each check can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import spark_fast as sf
from spark_fast.cli import main
from spark_fast.evaluate import coverage
from spark_fast.evaluate.coverage import Candidate, Coverage, candidates, check
from spark_fast.rules import RULES

# One of each kind of thing that networks do: see what each is there for.
NETWORKS = {
    "test_resnet": "batch norm, max pooling",
    "test_convnext": "layer norm channels-last, depthwise 7x7",
    "test_nfnet": "weight standardisation, global averages",
    "test_mambaout": "maps channels-last",
    "test_efficientnet": "squeeze and excite",
    "tf_efficientnet_cc_b0_4e": "padding 'same', kernels for each image",
    "tf_mixnet_s": "mixed kernels, split channels",
    "efficientnet_b0_gn": "group norm",
    "vovnet39a": "concatenation",
    "gcresnext26ts": "global context",
    "skresnet18": "selective kernels",
    "resnest14d": "split attention",
    "test_efficientnet_evos": "variances computed in float32",
    "convnextv2_atto": "global response norm",
    "ese_vovnet19b_slim_dw": "effective squeeze and excite",
    "cs3darknet_focus_s": "space to depth by slices",
    "tresnet_m": "space to depth, blur pooling",
    "hrnet_w18_small": "several maps of one layer, upsampling",
    "hgnetv2_b0": "one-sided padding",
    "selecsls42": "blocks that pass lists",
    "convmixer_768_32": "a stride that is no power of two",
    "inception_v3": "padding that does not keep the size",
    "legacy_xception": "the same, residual",
    "ghostnetv2_100": "attention from a pooled and resized map",
    "test_byobnet": "blocks by name",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_passes_all_four_checks(name):
    (candidate,), _ = candidates([name])
    row = check(candidate)
    assert row.error == ""
    assert row.dense_error <= row.limit and row.leak_free and row.gradients and row.step and row.passed


def test_what_is_not_convolutional_is_left_out_with_a_reason():
    found, left_out = candidates(["resnet18", "vit_tiny_patch16_224", "mobilenetv4_hybrid_medium", "caformer_s18"])
    assert [c.name for c in found] == ["resnet18"] and found[0].parameters == 11_176_512
    assert "vision transformer" in left_out["vit_tiny_patch16_224"]
    assert "MobileAttention" in left_out["mobilenetv4_hybrid_medium"] and "Attention" in left_out["caformer_s18"]


def test_every_family_is_either_checked_or_left_out():
    assert set(timm.list_modules()) == set(coverage.families()) | set(coverage.EXCLUDED)


@pytest.fixture
def resnet() -> Candidate:
    return candidates(["test_resnet"])[0][0]


def altered(monkeypatch, function, change):
    """A rule that does something else."""
    original = RULES[function]
    monkeypatch.setitem(RULES, function, lambda input, *args, **kwargs: change(input, original, *args, **kwargs))


def test_a_wrong_rule_is_seen_by_the_first_check(monkeypatch, resnet):
    altered(monkeypatch, torch.nn.functional.batch_norm, lambda x, f, *a, **k: f(x, *a, **k) * 1.0001)
    row = check(resnet)
    assert row.dense_error > coverage.EXACT and row.leak_free and not row.passed


def test_a_leak_is_seen_by_the_second_check(monkeypatch, resnet):
    """Batch norm adds 1 if any pixel of the images, masked ones included, is NaN."""
    real, given = sf.SparseTensor.from_dense, {}

    def from_dense(images, patches):
        given["nan"] = float(images.isnan().any())
        return real(images, patches)

    monkeypatch.setattr(sf.SparseTensor, "from_dense", staticmethod(from_dense))
    altered(monkeypatch, torch.nn.functional.batch_norm, lambda x, f, *a, **k: f(x, *a, **k) + given["nan"])
    row = check(resnet)
    assert not row.leak_free and not row.passed


def test_lost_gradients_are_seen_by_the_third_check(monkeypatch, resnet):
    altered(
        monkeypatch, torch.nn.functional.batch_norm, lambda x, f, *a, **k: f(x, *a, **k).detach().requires_grad_(True)
    )
    row = check(resnet)
    assert not row.gradients and not row.passed


def test_what_does_not_run_is_told(monkeypatch, resnet):
    monkeypatch.delitem(RULES, torch.nn.functional.batch_norm)
    row = check(resnet)
    assert "batch_norm" in row.error and "SparseOpError" in row.error and not row.passed


def test_the_share_of_fallbacks_is_noted():
    row = check(candidates(["tresnet_m"])[0][0])
    assert 0 < row.fallback_share < 1 and "BlurPool2d" in row.fallbacks[0]


def test_the_command_writes_results_and_goes_on(tmp_path, capsys, monkeypatch):
    out, table = tmp_path / "coverage.json", tmp_path / "models.md"
    command = ["coverage", "--filter", "test_resnet", "--out", str(out), "--table", str(table)]
    assert main(command) == 0
    assert "passed test_resnet (resnet, 0.4 M)" in capsys.readouterr().out
    stored = json.loads(out.read_text())
    assert [row["name"] for row in stored["networks"]] == ["test_resnet"] and stored["versions"]["timm"]
    text = table.read_text()
    assert "1 of 1 networks, 1 of 1 families pass" in text and "vision_transformer" in text
    monkeypatch.setattr(coverage, "check", lambda candidate: pytest.fail("checked again"))
    assert main(command) == 0


def test_the_command_fails_if_a_network_does(monkeypatch, capsys):
    monkeypatch.setattr(coverage, "check", lambda c: Coverage(c.name, c.family, error="ValueError: no"))
    assert main(["coverage", "--filter", "test_resnet"]) == 1
    assert "FAILED test_resnet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "no_such*"], "matches no architecture"),
        (["--filter", "a*", "--all"], "not both"),
        (["--filter", "test_resnet", "--out", "{file}"], "not a file that `spark-fast coverage` wrote"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text("{}")
    assert main(["coverage", *(a.format(file=file) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_the_document_is_made_of_the_results():
    root = Path(__file__).parents[2]
    results = coverage.load(root / "bench/results/coverage.json")
    assert (root / "docs/models.md").read_text() == coverage.table(results)
    assert len({row.family for row in results.networks}) > 40 and all(row.passed for row in results.networks)
