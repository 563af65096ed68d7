"""Progress of a fit: a bar with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

# Where output is a file or a pipe, this many lines tell of a whole fit.
LINES = 10


class EpochProgress:
    """Context that is told of each step and each finished epoch."""

    def __init__(self, phase: str, epochs: int, steps: int, *, enabled: bool) -> None:
        self.phase, self.epochs, self.steps, self.enabled = phase, epochs, steps, enabled
        self.bar: Any = None
        self.before = 0.0  # epochs that an earlier process did
        self.start = time.perf_counter()

    def __enter__(self) -> EpochProgress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.phase, total=self.epochs * self.steps, note="")
        return self

    def resume(self, steps: int) -> None:
        """So many steps were done before, and say nothing about how fast this process is."""
        self.before = steps / self.steps
        if self.bar is not None:
            self.bar.update(self.task, completed=steps)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Tell of a finished epoch; `row` is its line of the history."""
        note = f"loss {row['loss']:.4f}"
        if row["validation_accuracy"] == row["validation_accuracy"]:
            note += f", validation accuracy {100 * row['validation_accuracy']:.2f} %"
        if row["kept"] == row["kept"]:  # NaN where they can't be counted
            note += f", {row['kept']} structures kept"
        done = row["epoch"]
        if self.bar is not None:
            self.bar.update(self.task, note=note)
        elif self.enabled and (done % max(1, self.epochs // LINES) == 0 or done in (1, self.epochs)):
            elapsed = time.perf_counter() - self.start
            left = elapsed / (done - self.before) * (self.epochs - done)
            print(
                f"{self.phase} epoch {done}/{self.epochs}: {note} ({elapsed:.0f} s, {left:.0f} s left)",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
