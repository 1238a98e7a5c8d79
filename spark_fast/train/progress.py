"""Progress of a run: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from spark_fast.train.run_folder import RunFolder


class Progress:
    """Counts images; shows speed, loss, learning rate and the time left."""

    def __init__(self, folder: RunFolder, total_steps: int, step: int, batch_size: int) -> None:
        self.folder, self.total, self.step, self.batch_size = folder, total_steps, step, batch_size
        self.first_step, self.started = step, time.perf_counter()
        self.shown_step, self.shown_at = step, self.started
        self.bar = tqdm(
            total=total_steps * batch_size,
            initial=step * batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self) -> None:
        """One optimiser step is done."""
        self.step += 1
        self.bar.update(self.batch_size)

    def show(self, loss: float, rate: float) -> float:
        """Show the state after the latest step; images per second since it was last shown."""
        now = time.perf_counter()
        speed = (self.step - self.shown_step) * self.batch_size / (now - self.shown_at)
        self.shown_step, self.shown_at = self.step, now
        self.bar.set_postfix_str(f"loss {loss:.4f} lr {rate:.2e}", refresh=False)
        left = (now - self.started) / (self.step - self.first_step) * (self.total - self.step)
        line = (
            f"step {self.step}/{self.total} loss {loss:.4f} lr {rate:.2e} {speed:.1f} images/s, "
            f"{timedelta(seconds=round(left))} left"
        )
        (self.folder.say if self.bar.disable else self.folder.note)(line)
        return speed

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
