"""Inference engines behind one contract (``base.Backend``); each is imported only when it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellseg_deploy.errors import UsageError

if TYPE_CHECKING:
    from cellseg_deploy.backends.base import Backend

BACKENDS = ("auto", "onnxruntime")


def open_backend(
    path: str | Path, *, backend: str = "auto", device: str = "cpu", threads: int | None = None
) -> Backend:
    """Open the model file ``path`` on ``device`` (``cpu``, ``cuda``, ``cuda:1``) and check everything about it.

    ``backend``: an engine of ``BACKENDS``; ``auto`` takes the one that is verified for the file. ``threads``: CPU
    threads of the engine, None for one a core.

    Raises ``UsageError`` for a setting that cannot be meant, ``ModelError`` for a file that is not a sound model,
    ``BackendUnavailableError`` if engine or device are not here; another device is never taken instead.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(Path(path), device=device, threads=threads)
