"""Ctrl-C and SIGTERM as a request, so that a fit ends between two steps and not inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """Whether a signal has asked for the end."""

    asked: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A context in which SIGINT and SIGTERM only set `asked`; a second SIGINT interrupts as usual.

    Outside the main thread it changes nothing: Python lets no other thread handle signals.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A signal that the parent process ignores stays ignored. None: a handler that Python can't put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
