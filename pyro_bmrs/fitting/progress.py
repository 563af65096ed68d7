"""Progress of a fit, told by epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmrs.progress import Progress

LINES = 10  # for a whole fit


class EpochProgress(Progress):
    """`Progress` in steps, with a line for finished epochs."""

    def __init__(self, phase: str, epochs: int, steps: int, *, enabled: bool) -> None:
        super().__init__(phase, epochs * steps, shown=enabled)
        self.epochs = epochs

    def step(self) -> None:
        """One step is done."""
        self.advance()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Show a finished epoch; `row` is its row of the history."""
        words = f"loss {row['loss']:.4f}"
        if row["validation_accuracy"] == row["validation_accuracy"]:
            words += f", validation accuracy {100 * row['validation_accuracy']:.2f} %"
        if row["kept"] == row["kept"]:  # not NaN
            words += f", {row['kept']} structures kept"
        done = row["epoch"]
        self.note(words)
        if done % max(1, self.epochs // LINES) == 0 or done in (1, self.epochs):
            self.say(f"{self.what} epoch {done}/{self.epochs}: {words}")
