"""bench.gpu_check on the CPU: its sections run, and failures, crashes and time limits are recorded."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.gpu_check")


@pytest.fixture
def part(check):
    """A module of bench by name."""
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def make_section(part, tmp_path):
    module = part("gpu.section")
    return lambda **settings: module.Section(tmp_path / "cases.json", "cpu", True, **settings)


def saved(path: Path) -> list[dict]:
    return json.loads(path.read_text())


# One section in its process


def test_cases_are_on_disk_while_they_run(make_section):
    section, seen = make_section(), []
    section.case("first", lambda: seen.extend(saved(section.path)) or {"gain": 2})
    assert [case["status"] for case in seen] == ["running"]
    assert saved(section.path)[0]["status"] == "passed" and saved(section.path)[0]["gain"] == 2


def test_an_exception_is_recorded_and_the_next_case_runs(make_section):
    section = make_section()
    assert section.case("bad", lambda: 1 / 0) is None
    assert section.case("good", dict)["status"] == "passed"
    bad = saved(section.path)[0]
    assert bad["status"] == "failed" and "ZeroDivisionError" in bad["error"]
    assert str(ROOT) not in json.dumps(bad)


def test_a_case_that_reports_an_error_failed(make_section):
    section = make_section()
    section.case("bad", lambda: {"error": "two differ"})
    assert section.cases[0]["status"] == "failed"


def test_no_case_begins_after_the_deadline(make_section):
    section = make_section(deadline=time.monotonic() - 1)
    section.case("late", lambda: pytest.fail("it ran"))
    assert section.cases[0]["status"] == "no time left"


def test_a_lost_gpu_ends_the_process_and_the_next_one_goes_on(make_section, part):
    section = make_section()
    section.case("one", dict)
    with pytest.raises(part("gpu.section").LostDeviceError):
        section.case("two", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    later = make_section()
    later.case("one", lambda: pytest.fail("it ran again"))
    later.case("three", dict)
    assert [case["status"] for case in later.cases] == ["passed", "failed", "passed"]


def test_a_case_in_whose_middle_the_process_died_failed(make_section):
    section = make_section()
    section.path.write_text('[{"case": "one", "status": "running"}]')
    assert make_section().cases == [
        {"case": "one", "status": "failed", "error": "the process ended in the middle of it"}
    ]


# All sections


@pytest.mark.parametrize(
    ("statuses", "code", "expected"),
    [
        (["passed", "not available"], 0, "passed"),
        (["passed", "failed"], 0, "failed"),
        (["passed", "no time left"], 0, "out of time"),
        (["passed"], 1, "failed"),
        (["passed"], None, "out of time"),
        ([], 0, "failed"),
    ],
)
def test_status_of_a_section(check, statuses, code, expected):
    assert check.status_of([{"status": status} for status in statuses], code) == expected


def test_optional_cases_count_for_nothing(check):
    cases = [{"status": "passed"}, {"status": "failed", "optional": True}]
    assert check.status_of(cases, 0) == check.status_of(cases, None) == "passed"


def test_a_section_that_hangs_is_stopped(check, tmp_path, monkeypatch):
    sleeping = "import time; time.sleep(60)"
    (tmp_path / "sitecustomize.py").write_text(sleeping)
    monkeypatch.setattr(check, "environment", lambda settings: {**os.environ, "PYTHONPATH": str(tmp_path)})
    start = time.monotonic()
    section = check.run_section("ops", tmp_path, 1.0, check.Settings("cpu", True, False))
    assert time.monotonic() - start < 20
    assert section["status"] == "out of time" and section["cases"] == []


def test_a_case_that_hangs_is_stopped_and_the_next_process_goes_on(check, tmp_path, monkeypatch):
    """The first process begins a case and sleeps, the second finds it stopped."""
    program = """
import json, pathlib, sys, time
path = pathlib.Path(sys.orig_argv[sys.orig_argv.index("--out") + 1])
if path.exists():
    cases = json.loads(path.read_text()) + [{"case": "next", "status": "passed"}]
    path.write_text(json.dumps(cases))
    raise SystemExit(0)
path.write_text('[{"case": "hangs", "status": "running", "limit": 1.0}]')
time.sleep(60)
"""
    (tmp_path / "sitecustomize.py").write_text(program)
    monkeypatch.setattr(check, "environment", lambda settings: {**os.environ, "PYTHONPATH": str(tmp_path)})
    monkeypatch.setattr(check, "POLL", 0.2)
    seen = []
    section = check.run_section(
        "ops", tmp_path, 60.0, check.Settings("cpu", True, False), lambda *news: seen.append(news)
    )
    assert [(c["case"], c["status"]) for c in section["cases"]] == [("hangs", "failed"), ("next", "passed")]
    assert "more than 1 s" in section["cases"][0]["error"] and section["status"] == "failed"
    assert seen and seen[0][1]["cases"][0]["case"] == "hangs"


def test_a_section_that_cannot_start_says_why(check, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; print('no driver'); os._exit(3)")
    monkeypatch.setattr(check, "environment", lambda settings: {**os.environ, "PYTHONPATH": str(tmp_path)})
    section = check.run_section("ops", tmp_path, 30.0, check.Settings("cpu", True, False))
    assert section["status"] == "failed" and section["output"] == ["no driver"]


@pytest.mark.parametrize("code", ["RESTART", -signal.SIGSEGV])
def test_a_process_that_lost_the_gpu_is_followed_by_another(check, tmp_path, monkeypatch, code):
    code, runs = getattr(check, str(code), code), []

    def run_process(name, path, log, seconds, settings, changed):
        runs.append(name)
        path.write_text('[{"case": "a", "status": "passed"}]')
        return code if len(runs) < 3 else 0

    monkeypatch.setattr(check, "run_process", run_process)
    section = check.run_section("ops", tmp_path, 60.0, check.Settings("cpu", True, False))
    assert len(runs) == 3 and section["status"] == "passed"


def fake_sections(check, monkeypatch, statuses: dict[str, str]) -> list[str]:
    ran = []

    def run_section(name, folder, seconds, settings, progress):
        ran.append(name)
        cases = [{"case": "a", "status": "passed", "gains": {"dense": 2.0}}]
        progress(name, {"status": "running", "seconds": 0, "cases": cases})
        return {
            "status": statuses.get(name, "passed"),
            "seconds": 1,
            "date": "2030-01-02",
            "commit": "abc",
            "cases": cases,
        }

    monkeypatch.setattr(check, "run_section", run_section)
    return ran


def test_exit_status_and_results_when_one_section_fails(check, tmp_path, monkeypatch, capsys):
    ran = fake_sections(check, monkeypatch, {"ops": "failed"})
    path = tmp_path / "out.json"
    assert check.main([*TINY, "--out", str(path)]) == 1
    assert ran == [name for name in check.SHARES if name != "tune"]
    assert saved(path)["sections"]["ops"]["status"] == "failed"
    assert "training" in saved(path)["sections"]
    assert "ops: failed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_only_keeps_the_other_sections(check, tmp_path, monkeypatch):
    fake_sections(check, monkeypatch, {})
    path = tmp_path / "out.json"
    assert check.main([*TINY, "--out", str(path), "--only", "nets"]) == 0
    ran = fake_sections(check, monkeypatch, {})
    assert check.main([*TINY, "--out", str(path), "--only", "step", "ops"]) == 0
    assert ran == ["ops", "step"]
    assert set(saved(path)["sections"]) == {"nets", "ops", "step"}


def test_results_are_named_after_the_gpu(check, tmp_path, monkeypatch, capsys):
    fake_sections(check, monkeypatch, {})
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.main(["--only", "nets"]) == 1  # provenance has run, and knows of none
    assert "no GPU" in capsys.readouterr().out
    fake = check.run_section

    def with_gpu(name, *arguments):
        found = fake(name, *arguments)
        found["cases"][0]["gpu"] = "NVIDIA H100 80GB HBM3"
        return found

    monkeypatch.setattr(check, "run_section", with_gpu)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert check.main(["--only", "nets"]) == 0
    made = saved(tmp_path / "bench" / "results" / "nvidia-h100-80gb-hbm3.json")
    assert set(made["sections"]) == {"provenance", "nets"} and not made["tiny"]


def test_figures_that_mean_nothing_need_a_place_of_their_own(check, capsys):
    for arguments in (TINY, ["--tiny"], ["--device", "cpu"]):
        with pytest.raises(SystemExit):
            check.main(arguments)
        assert "--out" in capsys.readouterr().err


def test_the_shares_fit_the_default_budgets(check):
    assert isinstance(check.parse(["--out", "x"]), argparse.Namespace)
    everything = sum(check.SHARES.values())
    assert everything - check.SHARES["tune"] <= check.parse(["--out", "x"]).budget < 480
    assert everything <= check.parse(["--out", "x", "--tune"]).budget < 590
    assert check.parse(["--out", "x", "--tune", "--budget", "100"]).budget == 100


def test_tuning_is_asked_for(check, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    for arguments, expected in (
        (["--only", "ops"], ["ops"]), (["--only", "ops", "--tune"], ["tune", "ops"]), (["--only", "tune"], ["tune"]),
    ):  # fmt: skip
        ran = fake_sections(check, monkeypatch, {})
        check.main([*TINY, "--out", str(path), *arguments])
        assert ran == expected


def test_what_is_known_is_on_disk_while_a_section_runs(check, tmp_path, monkeypatch):
    fake_sections(check, monkeypatch, {})
    path, fake, seen = tmp_path / "out.json", check.run_section, []

    def run_section(*arguments):
        found = fake(*arguments)
        seen.append(saved(path)["sections"])
        return found

    monkeypatch.setattr(check, "run_section", run_section)
    assert check.main([*TINY, "--out", str(path), "--only", "ops", "nets"]) == 0
    assert [{name: s["status"] for name, s in sections.items()} for sections in seen] == [
        {"ops": "running"}, {"ops": "passed", "nets": "running"},
    ]  # fmt: skip


def test_tables_of_several_runs_are_joined(check, tmp_path, monkeypatch):
    cache, tables, beside = (tmp_path / name for name in ("cache", "tables", "beside"))
    monkeypatch.setattr(check, "TABLES", tables)
    cache.mkdir()
    for entries in ({"a": 1, "b": 1}, {"b": 2}):
        (cache / "tuning-some-gpu.json").write_text(json.dumps({"versions": {"torch": "2"}, "entries": entries}))
        check.ship_tables(cache, [tables, beside])
    for path in (tables / "some-gpu.json", beside / "tuning-some-gpu.json"):
        assert saved(path) == {"versions": {"torch": "2"}, "entries": {"a": 1, "b": 2}}


# The whole


@pytest.mark.slow
def test_the_script_runs_on_the_cpu(check, tmp_path, part):
    path = tmp_path / "out.json"
    sections = [name for name in check.SHARES if name not in ("build", "tests")]
    status = check.main([*TINY, "--out", str(path), "--budget", "900", "--only", *sections])
    found = saved(path)
    wrong = [
        c for s in found["sections"].values() for c in s["cases"] if c["status"] not in ("passed", "not available")
    ]
    assert status == 0, wrong
    ops = {case["case"] for case in found["sections"]["ops"]["cases"]}
    assert {aim.case for aim in part("aims").gpu() if aim.section == "ops"} <= ops
    timed = [case for case in found["sections"]["ops"]["cases"] if "us" in case]
    assert any("triton" in case["us"] for case in timed) and all("dense" in case["gains"] for case in timed)
    for section, case in (("nets", "resnet50 encoder"), ("step", "convnext_base step")):
        entry = next(c for c in found["sections"][section]["cases"] if c["case"] == case)
        assert entry["gains"]["dense"] > 0 and entry["proof"]["gradients"] < 0.1
    assert not torch.cuda.is_available() or found["device"] == "cpu"
