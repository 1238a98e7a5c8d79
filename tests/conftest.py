"""What every test runs under: seeds, two threads, NaN in memory that nobody wrote; and a last line of counts."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import numpy
import pytest
import torch

# The same examples in every run; `pytest --hypothesis-profile=explore` looks for new ones.
# Where hypothesis is missing, as it may be on a machine with a GPU, the tests that do not need it run all the same.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
    hypothesis.settings.load_profile("repeatable")

# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (augmentations draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU PyTorch's convolutions, and so ours, take float32 in TF32 by default: 13 bits less than the bounds of
    the tests. The interpreter computes in float32 whatever the flag says, and runs the configurations of TF32."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty and its siblings return NaN (integers: the largest value), so that outputs nobody wrote show.

    torch does that in its deterministic mode; with warn_only the mode refuses no operation.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield  # pytest's own summary, with the reasons of the skips
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    count = {
        name: len(reporter.getreports(name)) for name in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    }
    line = f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped"
    line += "".join(f", {count[name]} {name}" for name in ("xfailed", "xpassed") if count[name])
    reporter.write_line(line)
