"""Section "tune", with --tune: the kernels' configurations, measured on the shapes of the steps and of the ops.

Several processes compile them first. What pays most is measured first, and each finding is at once in the cache of
`spark_fast.ops.tuning`, from which the check ships it however the section ends.
"""

from __future__ import annotations

import spark_fast as sf
from bench.gpu import warm
from bench.gpu.section import Section
from bench.harness import significant
from spark_fast.ops import tuning

IMAGES = 256  # the number of rows counts, in powers of two
STEP_LIMIT, LIMIT = 90, 25  # seconds of a step's many kernels, and of an op's


def run(section: Section) -> None:
    if section.device == "cuda":
        section.case("compiling", lambda: warm.start_all(section, section.left / 2, every=True), optional=True)
    with sf.autotune():
        for name, job in warm.jobs(section, IMAGES):
            limit = STEP_LIMIT if name.endswith(" step") else LIMIT
            section.case(name, lambda job=job: found_by(job), limit=limit)


def found_by(job: warm.Job) -> dict:
    """Milliseconds of the configurations that the job measured."""
    known = set(tuning.measured)
    job()
    new = {key: times for key, times in tuning.measured.items() if key not in known}
    return {"measured": {key: [[significant(ms), config] for ms, config in times] for key, times in new.items()}}
