"""Which configuration (tile sizes, warps, stages) a GPU kernel runs with.

In this order: one that is forced, one measured in this process, one from the on-disk cache, one from the table shipped
for this GPU (`spark_fast/ops/tables/`), else the kernel's own rule of thumb. Measuring happens only where `autotune`
(or SPARK_FAST_AUTOTUNE=1) asks for it, never while a CUDA graph is captured, and never inside an initialised process
group unless allowed: ranks that measure for different times would make collectives time out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch

from spark_fast.files import write_text

Config = dict[str, int | str]
Result = TypeVar("Result")

TABLES = Path(__file__).parent / "tables"
measured: dict[str, list[tuple[float, Config]]] = {}  # key -> milliseconds of what this process measured, fastest first
_found: dict[str, dict[str, Config]] = {}  # GPU -> key -> the config in use
_looked_up: dict[tuple, Config | None] = {}  # the same by argument, for speed; None: nothing is known
# Of the process, not of a thread: on a GPU, backward passes run in threads of PyTorch's own.
_forced: Config | None = None
_autotune: tuple[bool, bool] | None = None


def run(
    kernel: str,
    case: tuple[Any, ...],
    rows: int,
    configs: Sequence[Config],
    default: Config,
    function: Callable[[Config], Result],
    device: torch.device,
) -> Result:
    """`function(config)` with the best known one of `configs`.

    Args:
        kernel: its name, such as "conv.gather".
        case: what a measurement holds for besides: dtype, channels, kernel size, stride, sides.
        rows: their number counts in powers of two, so that another batch size needs no new measurement; the
            neighbouring powers serve too.
        configs: all that may be used.
        default: the rule of thumb's choice.
        function: runs the kernel, and may be called several times.
    """
    config = _forced or best(kernel, case, rows, configs, function, device)
    return function(config or default)


def best(
    kernel: str,
    case: tuple[Any, ...],
    rows: int,
    configs: Sequence[Config],
    function: Callable[[Config], Any],
    device: torch.device,
) -> Config | None:
    """The best known one of `configs`, measured with `function` where that is asked for; None if nothing is known.

    Arguments as for `run`.
    """
    if device.type != "cuda":  # the interpreter
        return None
    bucket = max(rows - 1, 0).bit_length()
    place = (device.index, kernel, case, bucket)
    if place not in _looked_up:
        _looked_up[place] = _known(_gpu(device.index), _key(kernel, case), bucket, configs)
    config = _looked_up[place]
    if config is None and _may_measure():
        with torch.cuda.device(device):  # whose stream is looked at, and timed
            if torch.cuda.is_current_stream_capturing():
                return None
            times = _measure(configs, function)
        key, config = f"{_key(kernel, case)}|2^{bucket}", times[0][1]
        measured[key] = times
        _remember(_gpu(device.index), key, config)
    return config


@lru_cache
def _gpu(index: int | None) -> str:
    return slug(torch.cuda.get_device_name(index))


def _key(kernel: str, case: tuple[Any, ...]) -> str:
    return "|".join(str(part) for part in (kernel, *case))


def _known(gpu: str, key: str, bucket: int, configs: Sequence[Config]) -> Config | None:
    table = _found.get(gpu)
    if table is None:
        table = _found[gpu] = {**_read(TABLES / f"{gpu}.json", None), **_read(cache_file(gpu), versions())}
    for power in (bucket, bucket - 1, bucket + 1):
        config = table.get(f"{key}|2^{power}")
        if config in configs:
            return config
    return None


def _may_measure() -> bool:
    wanted, in_group = _autotune or (os.environ.get("SPARK_FAST_AUTOTUNE") == "1", False)
    if not wanted:
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return in_group or not distributed


def _measure(configs: Sequence[Config], function: Callable[[Config], Any]) -> list[tuple[float, Config]]:
    """Milliseconds of those that run on this GPU, fastest first."""
    times = []
    for config in configs:
        try:
            times.append((milliseconds(lambda config=config: function(config)), config))
        except Exception as error:  # a config may need more registers or shared memory than this GPU has
            if type(error).__name__ not in ("OutOfResources", "PTXASError", "CompilationError"):
                raise
    if not times:
        raise RuntimeError(f"none of {len(configs)} configurations runs on this GPU")
    return sorted(times, key=lambda entry: entry[0])


def milliseconds(function: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, with the L2 cache cleared before each."""
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=25, return_mode="median")


def _remember(gpu: str, key: str, config: Config) -> None:
    _found[gpu][key] = config
    _looked_up.clear()
    path = cache_file(gpu)
    entries = {**_read(path, versions()), key: config}  # what another process has found meanwhile is kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"versions": versions(), "entries": entries}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        warnings.warn(
            f"the tuning cache {path} cannot be written ({error}); set SPARK_FAST_CACHE to a folder", stacklevel=2
        )


def _read(path: Path, wanted: dict[str, str] | None) -> dict[str, Config]:
    """The entries of a file; none if there is no such file, it is damaged, or it was made by other versions."""
    try:
        content = json.loads(path.read_text())
        if wanted is not None and content["versions"] != wanted:
            return {}
        return dict(content["entries"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is no tuning table and is left out ({type(error).__name__}: {error})", stacklevel=2)
        return {}


def cache_file(gpu: str) -> Path:
    """SPARK_FAST_CACHE, or XDG_CACHE_HOME/spark_fast, or ~/.cache/spark_fast, or, for a user without a home folder, one
    of temporary files; one file per GPU model."""
    folder = os.environ.get("SPARK_FAST_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "spark_fast"
    return Path(folder) / f"tuning-{gpu}.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set and the user has no entry in passwd, as in some containers
        return Path(tempfile.gettempdir())


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What a measurement depends on besides its key: a change of any of these voids the cache."""
    import triton

    folder = Path(__file__).parent
    files = [*sorted(folder.rglob("*triton*.py")), *sorted(folder.parent.glob("_native_cuda*"))]
    kernels = sha256(b"".join(path.read_bytes() for path in files))
    return {"kernels": kernels.hexdigest()[:16], "torch": torch.__version__, "triton": triton.__version__}


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@contextlib.contextmanager
def autotune(enabled: bool = True, in_process_group: bool = False) -> Iterator[None]:
    """Inside, the first use of a GPU kernel on shapes not seen before measures its configurations and keeps the best,
    in this process and on disk (`cache_file`). Each new shape costs seconds.

    Args:
        enabled: False forbids it, whatever SPARK_FAST_AUTOTUNE says.
        in_process_group: measure even when torch.distributed is initialised.
    """
    global _autotune
    before, _autotune = _autotune, (enabled, in_process_group)
    try:
        yield
    finally:
        _autotune = before


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Inside, every kernel runs with `config`: for tests and benchmarks of one kernel."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before
