"""Progress of a fit, in the words of its epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmrs.progress import Progress

LINES = 10  # that tell of a whole fit


class EpochProgress(Progress):
    """A context that is told of each step and each finished epoch."""

    def __init__(self, phase: str, epochs: int, steps: int, *, enabled: bool) -> None:
        super().__init__(phase, epochs * steps, shown=enabled)
        self.epochs = epochs

    def step(self) -> None:
        self.advance()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Tell of a finished epoch; `row` is its line of the history."""
        words = f"loss {row['loss']:.4f}"
        if row["validation_accuracy"] == row["validation_accuracy"]:
            words += f", validation accuracy {100 * row['validation_accuracy']:.2f} %"
        if self.what == "fit":
            words += f", {row['kept']} structures kept"
        done = row["epoch"]
        self.note(words)
        if done % max(1, self.epochs // LINES) == 0 or done in (1, self.epochs):
            self.say(f"{self.what} epoch {done}/{self.epochs}: {words}")
