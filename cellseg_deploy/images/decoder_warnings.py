"""Messages of decoders, by thread: tifffile logs, Pillow warns, and both matter to the current image.

Warnings and loggers are process-wide, and ``warnings.catch_warnings`` saves and restores the whole state: two threads
that use it at once swallow each other's warnings and may restore the wrong state. Here the first listening thread adds
a filter and a hook to each, which sort messages by thread, and the last one removes them.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

_MODULES = r"(PIL|tifffile|imagecodecs)(\.|$)"
_LOGGER = "tifffile"
_lock = threading.Lock()


@dataclass
class Messages:
    """``errors``: failures that a decoder reported. ``notes``: its warnings."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


_listening: dict[int, Messages] = {}  # by thread


@contextmanager
def collected() -> Iterator[Messages]:
    """Collect the decoders' messages of this thread during the block, and hide them from everyone else.

    Warnings of other threads and other modules are not affected.
    """
    messages, thread = Messages(), threading.get_ident()
    with _lock:
        if not _listening:
            _hooks.install()
        _listening[thread] = messages
    try:
        yield messages
    finally:
        with _lock:
            del _listening[thread]
            if not _listening:
                _hooks.remove()


class _Sorter(logging.Filter):
    """Filter on the logger itself, so that it runs before any handler or parent logger sees a record."""

    def __init__(self) -> None:
        super().__init__()
        self.others_from = logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        messages = _listening.get(record.thread or 0)
        if messages is None:
            return record.levelno >= self.others_from
        if record.levelno >= logging.WARNING:
            (messages.errors if record.levelno >= logging.ERROR else messages.notes).append(record.getMessage())
        return False


class _Hooks:
    """Process-wide settings that are changed while any thread listens."""

    def __init__(self) -> None:
        self._sorter = _Sorter()
        self._logger = logging.getLogger(_LOGGER)
        self._former_level = logging.NOTSET
        self._former_show: Callable[..., Any] = warnings.showwarning
        self._filter: Any = None

    def install(self) -> None:
        self._former_level = self._logger.level
        self._sorter.others_from = self._logger.getEffectiveLevel()
        self._logger.setLevel(logging.WARNING)
        self._logger.addFilter(self._sorter)
        warnings.filterwarnings("always", module=_MODULES)
        self._filter = warnings.filters[0]
        self._former_show, warnings.showwarning = warnings.showwarning, self._show

    def remove(self) -> None:
        """Remove only what ``install`` added: another thread's catch_warnings may have changed the rest, or removed it
        already."""
        self._logger.removeFilter(self._sorter)
        self._logger.setLevel(self._former_level)
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]  # a list, despite the stubs
        if warnings.showwarning == self._show:
            warnings.showwarning = self._former_show

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        messages = _listening.get(threading.get_ident())
        if messages is None:
            self._former_show(message, category, filename, lineno, file, line)
        else:
            messages.notes.append(str(message))


_hooks = _Hooks()
