"""The sections of bench.gpu_check on the CPU: what is wrong is noticed, and tables tell the truth."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import spark_fast as sf
from spark_fast.ops import triton_launch, tuning

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def part(monkeypatch):
    """A module of bench by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


def test_a_wrong_kernel_is_noticed(part, monkeypatch):
    conv_ops, measure = part("gpu.conv_ops"), part("gpu.measure")
    patches = sf.ActivePatches(sf.random_patch_mask(2, (2, 2), 0.5))
    problem = conv_ops.Problem(conv_ops.RESNET[1], patches, True)
    peaks = measure.Peaks(1e9, 1e9, 1e9)
    assert conv_ops.measure(problem, "forward", peaks)["gains"]["dense"] > 0
    from spark_fast.ops.conv import cpu

    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *inputs: right(*inputs) * 1.05)
    with sf.use_backend("cpu", "conv"), pytest.raises(AssertionError, match="cpu 3x3"):
        conv_ops.measure(problem, "forward", peaks)


def test_a_wrong_encoder_is_noticed(part, monkeypatch):
    nets = part("gpu.nets")
    monkeypatch.setattr(part("nets"), "TINY", True)
    section = SimpleNamespace(tiny=True, device="cpu")
    encoder, batch = nets.make_encoder("resnet50", "cpu"), nets.batch_of(section)
    nets.prove(encoder, batch)
    monkeypatch.setattr(nets._SparseMaps, "forward", lambda self, images: [
        m.to_dense() * 1.05
        for m in self.encoder(sf.SparseTensor.from_dense(images, sf.ActivePatches(batch.active)))
    ])  # fmt: skip
    with pytest.raises(AssertionError, match="sparse maps"):
        nets.prove(encoder, batch)


def test_compiling_is_shared_out(part, monkeypatch):
    """Each launch of the jobs goes to one process, with every configuration if asked for, and none is run."""
    monkeypatch.setattr(part("nets"), "TINY", True)
    warm, triton = part("gpu.warm"), importlib.import_module("spark_fast.ops.conv.triton")
    section = SimpleNamespace(tiny=True, device="cpu")
    monkeypatch.setattr(triton.gather_gemm, "run", lambda *_, **__: pytest.fail("launched"))
    monkeypatch.setattr(  # which the interpreter's kernels do not have
        triton_launch, "_describe",
        lambda kernel, args, constants: SimpleNamespace(key=(kernel.__name__, str(sorted(constants.items())))),
    )  # fmt: skip
    chosen = [(name, job) for name, job in warm.jobs(section, 2) if name.startswith("3x3-side1-512-512")]
    assert len(chosen) == 3
    monkeypatch.setattr(warm, "jobs", lambda section, images: chosen)
    monkeypatch.setattr(warm, "maps_of_layers", lambda section: [])
    found = {}
    for of in (1, 3):
        for every in ((), ("--every",)):
            launches = [
                shared(warm, monkeypatch, ["--part", str(part), "--of", str(of), "--device", "cpu", "--tiny", *every])
                for part in range(of)
            ]
            found[of, bool(every)] = sorted(launch for share in launches for launch in share)
    assert found[1, False] == found[3, False] and found[1, True] == found[3, True]
    from spark_fast.ops.conv import configs

    one, all_of = (Counter(name for name, _ in found[1, every]) for every in (False, True))
    assert one == {"gather_gemm": 2, "outer_product": 1}  # there and back, and of the weight
    assert all_of["gather_gemm"] == 2 * len(configs.UNFOLDED_GATHER)
    assert all_of["outer_product"] == len(configs.UNFOLDED_OUTER)


def shared(warm, monkeypatch, arguments: list[str]) -> list[tuple[str, str]]:
    made, sharing = [], warm.sharing
    note = lambda kernel, args, constants: made.append((kernel.__name__, str(sorted(constants.items()))))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(warm, "sharing", lambda part, of, every, compiled: sharing(part, of, every, note))
        patch.setattr(
            tuning, "run",
            lambda kernel, case, rows, configs, default, function, device: (
                tuning.best(kernel, case, rows, configs, function, device), function(default)
            )[1],
        )  # fmt: skip
        assert warm.main(arguments) == 0
    return made


def test_memory_nobody_wrote_and_races_are_noticed(part):
    measure, calls = part("gpu.measure"), []
    x = torch.randn(5)

    def partly():
        out = torch.empty(5)
        out[:4] = x[:4]
        return [out]

    results = measure.results_of(partly)
    assert results[0][4].isnan()
    with pytest.raises(AssertionError, match="not finite"):
        measure.prove("partly", results, [x], [x.double()], [1])

    def racing():
        calls.append(1)
        return [x * len(calls)]

    with pytest.raises(AssertionError, match="two runs differ"):
        measure.prove_repeated("racing", racing, measure.results_of(racing))


def test_tuning_records_what_it_measured(part, monkeypatch):
    tune, config = part("gpu.tune"), {"BLOCK": 32}
    monkeypatch.setattr(tuning, "measured", {"known": [(1.0, config)]})
    entry = tune.found_by(lambda: tuning.measured.update({"new": [(0.123456, config)]}))
    assert entry == {"measured": {"new": [[0.1235, config]]}}


def test_the_small_cases_are_shared_out_whole(part, monkeypatch):
    small, section = part("gpu.small"), part("gpu_small")
    parts = dict(small.parts_of("cuda"))
    every = {f"{case.op} {name} bfloat16" for case in section.cases(section.small_patches())
             for name in section.candidates(case.op, torch.device("cuda"), torch.bfloat16)}  # fmt: skip
    own = {name for name in every if name.split()[1] in section.OWN}
    assert own and {name for name in parts if name.endswith("bfloat16")} == own
    assert parts["conv triton float32"] == ["--op", "conv", "--backend", "triton", "--dtype", "float32"]
    commands = part("gpu.commands")
    output = "ok conv triton a\nWRONG conv triton b: AssertionError: off\n1 wrong\n"
    monkeypatch.setattr(small, "run_command", lambda command, seconds: commands.Done(1, output))
    entry = small.run_small(["command"], 1.0)
    assert entry["cases"] == 1 and entry["error"] == "ended with 1" and entry["output"][0].startswith("WRONG conv")


def test_a_graph_that_computes_something_else_is_noticed(part, monkeypatch):
    nets = part("gpu.nets")
    layer, x, device = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.device("cpu")
    gradients = nets.pass_of(layer, lambda: [layer(x)], device)

    def wrong() -> None:
        gradients()
        layer.weight.grad.mul_(1.1)

    for replay in (gradients, wrong):
        monkeypatch.setattr(nets, "capture", lambda run, device, replay=replay: (run(), replay)[1])
        runs, notes = nets.with_graph("sparse", gradients, layer, device)
        assert list(runs) == ["sparse", "sparse, CUDA graph"] and not notes
        if replay is gradients:
            assert nets.graph_gap(*runs.values(), layer) == 0
        else:
            with pytest.raises(AssertionError, match="CUDA graph"):
                nets.graph_gap(*runs.values(), layer)


def test_a_step_that_cannot_be_recorded_says_why(part, monkeypatch):
    nets, layer = part("gpu.nets"), torch.nn.Linear(3, 2)

    def capture(run, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(nets, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runs, notes = nets.with_graph("sparse", lambda: None, layer, torch.device("cpu"))
    assert list(runs) == ["sparse"]
    assert notes == {"no_cuda_graph": "operation not permitted when stream is capturing"}


def test_a_batch_that_does_not_fit_is_halved(part):
    nets, tried = part("gpu.nets"), []

    def run(batch):
        tried.append(batch.images.shape[0])
        if tried[-1] > 64:
            raise torch.OutOfMemoryError("too large")
        return {}

    section = SimpleNamespace(tiny=False, device="cpu")
    assert nets.halved(section, run) == {"batch": 64} and tried == [256, 128, 64]


def test_small_cases_go_on_after_a_wrong_one(part, monkeypatch, capsys):
    small = part("gpu_small")
    monkeypatch.setattr(small, "cases", lambda patches: list(small.others(patches))[:3])  # linear and norms
    monkeypatch.setattr(small, "candidates", lambda op, device, dtype: ["cpu"])
    assert small.main(["--device", "cpu"]) == 0
    from spark_fast.ops.linear import cpu

    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *inputs: right(*inputs) * 1.05)
    assert small.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("WRONG linear cpu") for line in lines) == 3
    assert sum(line.startswith("ok norm cpu") for line in lines) == 12


def test_losses_too_far_apart_fail(part):
    judged = part("gpu.training").judged
    near = {"cpu float64": [1.0, 0.9], "cpu float32": [1.0, 0.9 + 1e-6], "device float32": [1.0, 0.9 + 2e-6]}
    assert "error" not in judged(near)
    assert "error" in judged(near | {"device float32": [1.0, 0.9 + 1e-4]})
    assert "error" in judged(near | {"device float32": [1.0, float("nan")]})


@pytest.mark.parametrize(
    ("tool", "code", "output", "errors", "failed"),
    [
        ("memcheck", 0, "ok a\nok b\n========= ERROR SUMMARY: 0 errors\n", 0, False),
        ("memcheck", 0, "========= Invalid read\n========= ERROR SUMMARY: 2 errors\n", 2, True),
        ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, False),
        ("racecheck", 0, "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3, True),
        ("memcheck", 0, "ok a\n", 0, True),
        ("memcheck", None, "ok a\n", 0, True),
    ],
)
def test_sanitizer_output(part, tool, code, output, errors, failed):
    entry = part("gpu.sanitizer").counted(tool, code, output)
    assert entry["errors"] == errors and ("error" in entry) == failed


def fake_build(part, monkeypatch, works) -> tuple[dict, list[list[str]]]:
    """The entry of a build in which `works(command)`; the modules load after a command that works, and what was run."""
    build, commands, ran = part("gpu.build"), part("gpu.commands"), []

    def run_command(command, seconds, environment=None):
        if "-c" in command:
            return commands.Done(0 if any(map(works, ran)) else 1, "no module")
        if "--cmakedir" in command or "nvidia-smi" in command[0]:
            return commands.Done(0, "9.0\n" if "nvidia-smi" in command[0] else "/pybind11\n")
        ran.append(command)
        return commands.Done(0 if works(command) else 1, f"{command[0]} printed this")

    monkeypatch.setattr(build, "run_command", run_command)
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(build, "cuda_tool", lambda name: f"/cuda/{name}")
    monkeypatch.delenv("SPARK_FAST_CUDA_ARCHS", raising=False)
    return build.build(SimpleNamespace(device="cuda", left=100.0), build.LOADS), ran


def test_the_modules_are_built_by_pip_else_by_cmake_and_it_is_told(part, monkeypatch):
    entry, ran = fake_build(part, monkeypatch, lambda command: True)
    assert entry["built"] == "pip" and len(ran) == 1 and entry["SPARK_FAST_CUDA_ARCHS"] == "90"
    assert "output" not in entry and "error" not in entry
    entry, ran = fake_build(part, monkeypatch, lambda command: command[0] == "/bin/cmake")
    assert entry["built"] == "cmake" and "error" not in entry
    assert entry["output"][0] == "pip:" and [c[1] for c in ran[1:]] == ["-S", "--build"]
    assert "-DSPARK_FAST_CUDA_ARCHS=90" in ran[1]
    entry, _ = fake_build(part, monkeypatch, lambda command: False)
    assert entry["error"] == "the build failed" and {"pip:", "cmake:"} <= set(entry["output"])


def test_every_test_that_needs_a_gpu_is_among_those_that_run_there(part):
    marked = {p for p in (ROOT / "tests").rglob("*.py") if re.search(r"mark\.gpu\b", p.read_text())}
    places = [ROOT / a for a in part("gpu.tests").RUNS["gpu"][0] if a.startswith("tests")]
    assert marked and all(any(path.is_relative_to(place) for place in places) for path in marked)


def test_pytest_output_is_counted_even_if_it_breaks_off(part, monkeypatch):
    tests, commands = part("gpu.tests"), part("gpu.commands")
    output = (
        "tests/test_a.py::test_one[x y] PASSED     [  1%]\ntests/test_a.py::test_two FAILED [  2%]\n"
        "tests/test_a.py::test_three SKIPPED (no GPU) [  3%]\ntests/test_a.py::test_four "
    )
    monkeypatch.setattr(tests, "run_command", lambda command, seconds: commands.Done(None, output))
    entry = tests.run_pytest(["tests"], 1.0)
    assert entry["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert entry["failures"] == ["tests/test_a.py::test_two"] and "out of time" in entry["error"]


def test_output_of_several_pytest_processes_is_counted(part, monkeypatch):
    tests, commands = part("gpu.tests"), part("gpu.commands")
    output = (
        "[gw0] [  1%] PASSED tests/test_a.py::test_one[x y] \n[gw3] [ 20%] FAILED tests/test_a.py::test_two \n"
        "[gw1] [100%] SKIPPED tests/test_a.py::test_three \nFAILED tests/test_a.py::test_two - AssertionError\n"
    )
    monkeypatch.setattr(tests, "run_command", lambda command, seconds: commands.Done(1, output))
    entry = tests.run_pytest(["tests"], 1.0)
    assert entry["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert entry["failures"] == ["tests/test_a.py::test_two"]


def test_test_files_that_lack_a_package_are_named(part, tmp_path, monkeypatch):
    tests = part("gpu.tests")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    (tmp_path / "test_a.py").write_text("import torch\nfrom exactness import DTYPES\n")
    (tmp_path / "test_b.py").write_text("from no_such_package.inner import a\n")
    assert tests.missing_imports(tmp_path) == {"test_b.py": ["no_such_package"]}


# Tables


def result(**sections: list[dict]) -> dict:
    common = {"status": "passed", "seconds": 3, "date": "2030-01-02T03:04:05", "commit": "abc1234"}
    made = {name: common | {"cases": [{"status": "passed", **c} for c in cases]} for name, cases in sections.items()}
    return {"tiny": False, "device": "cuda", "sections": made}


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, found
    return found[0]


def test_no_test_lacks_a_package_through_what_all_tests_share(part):
    tests, shared = part("gpu.tests"), [*(ROOT / "tests").rglob("conftest.py"), *(ROOT / "tests").glob("[!t]*.py")]
    optional = {"hypothesis", "psutil", "skimage", "matplotlib", "xdist", "pytest_benchmark"}
    needed = {str(path.relative_to(ROOT)): tests.top_level_imports(path) & optional for path in shared}
    assert len(needed) > 5 and not any(needed.values()), needed


def test_aims_met_missed_and_unmeasured(part):
    tables = part("gpu_tables")
    made = result(
        provenance=[{"case": "machine", "gpu": "A GPU", "torch": "2.99"}],
        nets=[
            {"case": "resnet50 encoder", "gains": {"dense": 2.5}, "ms": {"sparse": 4, "dense": 10}},
            {"case": "convnext_base encoder", "gains": {"dense": 2.5}, "ms": {"sparse": 4, "dense": 10}},
            {"case": "resnet50 encoder memory", "shares": {"dense": 0.5}},
        ],
    )
    page, short = tables.page([made]), tables.summary(made)
    assert "| 2.50x | >= 2.3x | yes |" in line_with(page, "| nets | resnet50 encoder |")
    assert "| 2.50x | >= 3x | **missed** |" in line_with(page, "| nets | convnext_base encoder |")
    assert "<= 0.45x | **missed** |" in line_with(page, "| nets | resnet50 encoder memory |")
    assert "| not yet measured | >= 1.6x | not yet measured |" in line_with(page, "| step | resnet50 step |")
    assert "A GPU, torch 2.99, 2030-01-02, commit abc1234" in page
    assert line_with(short, "convnext_base encoder").split()[-3:] == [">=", "3x", "missed"]
    tiny = tables.summary(made | {"tiny": True})
    assert "missed" not in tiny and "figures mean nothing" in tiny


def test_without_results_every_aim_is_unmeasured(part):
    page, aims = part("gpu_tables").page([]), list(part("aims").gpu())
    rows = [
        line for line in page.splitlines() if " | dense | " in line or " | released | " in line or " | peer | " in line
    ]
    assert len(rows) == len(aims) == 36
    assert all(row.count("not yet measured") == 2 for row in rows)


def test_every_aim_is_of_a_case_that_is_measured(part):
    conv_ops, nets = part("gpu.conv_ops"), part("gpu.nets")
    names = {("ops", conv_ops.name_of(layer, direction)) for layer, direction in conv_ops.cases()}
    names |= {("peers", layer.name) for layer in conv_ops.RESNET}
    for model in nets.MODELS:
        names |= {("nets", f"{model} encoder"), ("nets", f"{model} encoder memory")}
        names |= {("step", f"{model} step"), ("step", f"{model} step, released form")}
    assert {(aim.section, aim.case) for aim in part("aims").gpu()} <= names


def test_report_takes_gpu_results_but_no_tiny_ones(part, tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    made = result(provenance=[{"case": "machine", "gpu": "A GPU"}])
    for name, content in (("a-gpu", made), ("tiny", made | {"tiny": True}), ("cpu", {"benchmarks": []}), ("list", [])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert part("report").load_gpus(tmp_path) == [made]
