"""Ctrl-C and SIGTERM as a request, so that a fit ends between two steps and not inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which `handler` gets SIGINT and SIGTERM, in the main thread; elsewhere Python lets nobody."""
    caught: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            # what a parent has chosen to ignore stays ignored; None: not set by Python, which can't put it back
            if before not in (signal.SIG_IGN, None):
                caught[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for caught_number, given in caught.items():
            signal.signal(caught_number, given)


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `asked`; a second SIGINT interrupts as usual.

    Outside of the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handling = _handled_by(self._ask)

    def __enter__(self) -> StopRequest:
        self._handling.__enter__()
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.__exit__(kind, error, trace)
