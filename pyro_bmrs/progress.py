"""Progress: lines with the time so far, and on a terminal a bar below them with the time left.

In a notebook there is one line, which changes in place.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from rich.progress import Progress as Bar

# Of the line in a notebook.
_WIDTH, _DRAWN_EVERY = 20, 0.3


def in_notebook() -> bool:
    """Whether this is a cell of Jupyter, Colab or another notebook, where output is HTML."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


class Progress:
    """A context that counts finished parts of some work and shows them on standard error.

    Args:
        what: the name of the work, in a word or two.
        total: how many parts it has.
        shown: False: show nothing.
        bar: whether to show a bar; None: if standard error is a terminal.
    """

    def __init__(self, what: str, total: int, *, shown: bool = True, bar: bool | None = None) -> None:
        self.what, self.total, self.shown, self.bar = what, total, shown, bar
        self.done = self.done_before = 0
        self._start = time.perf_counter()
        self._bar: Bar | None = None
        self._stack = ExitStack()
        # in a notebook
        self._place: DisplayHandle | None = None
        self._note, self._drawn = "", 0.0

    def __enter__(self) -> Self:
        if self.shown and self.bar is not False and in_notebook():
            from IPython.display import display

            self._place = display({"text/plain": self.what}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        elif self.shown and (sys.stderr.isatty() if self.bar is None else self.bar):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            words = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("left", "note")]
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *words,
                console=Console(stderr=True, force_terminal=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.what, total=self.total, left="", note="")
            self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._place is not None:
            self._draw(at_once=True)

    def advance(self, count: int = 1) -> None:
        """`count` more parts are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=self._left())
        if self._place is not None:
            self._draw()

    def resume(self, count: int) -> None:
        """`count` parts were done before. They do not count for the time left."""
        self.done_before += count
        self.advance(count)

    def note(self, text: str) -> None:
        """Replace the text beside the bar."""
        self._note = text
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        if self._place is not None:
            self._draw()

    def say(self, line: str) -> None:
        """Print a line, with the time so far and the time left."""
        if not self.shown:
            return
        times = f"{_clock(time.perf_counter() - self._start)} so far"
        told = f"{line}; {', '.join(part for part in (times, self._left()) if part)}"
        if self._place is not None:
            self.note(self._note or line)
        elif self._bar is None:
            print(told, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(told, markup=False, highlight=False, soft_wrap=True)

    def _draw(self, *, at_once: bool = False) -> None:
        """Change the line in a notebook, a few times a second at most."""
        now = time.perf_counter()
        if not at_once and now - self._drawn < _DRAWN_EVERY:
            return
        self._drawn = now
        full = round(_WIDTH * self.done / self.total) if self.total else _WIDTH
        strip = "█" * full + "░" * (_WIDTH - full)
        told = f"{self.what} {strip} {self.done:,}/{self.total:,}"
        parts = told, f"{_clock(now - self._start)} so far", self._left(), self._note
        assert self._place is not None
        line = ", ".join(part for part in parts if part)
        self._place.update({"text/plain": line}, raw=True)  # type: ignore[no-untyped-call]

    def _left(self) -> str:
        worked, waiting = self.done - self.done_before, self.total - self.done
        if worked <= 0 or waiting <= 0:
            return ""
        return f"about {_clock((time.perf_counter() - self._start) / worked * waiting)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def bar(what: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar alone: a context that gives a function to call with the number of parts just done.

    Args:
        shown: None: if standard error is a terminal.
    """
    with Progress(what, total, shown=shown is not False, bar=shown) as progress:
        yield progress.advance
