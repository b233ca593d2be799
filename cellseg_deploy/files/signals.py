"""Deferred signals: files that belong together are all written before Ctrl-C ends the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown to Windows


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Until the block ends, defer signals that a Python handler would turn into an exception.

    Signals that are ignored, or that end the process outright, are unaffected. Does nothing outside the main thread,
    because Python runs handlers only in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, _: FrameType | None) -> None:
        waiting.append(number)

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    former = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in former:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
