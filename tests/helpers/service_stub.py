"""The service with the stub network: in this process, or as ``cellseg-serve`` in a process of its own."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from conftest import THREE, DarknessBackend, draw_discs
from PIL import Image

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.serve.engine import Answer, Engine, Task
from cellseg_deploy.serve.limits import Limits
from cellseg_deploy.serve.metrics import Metrics
from cellseg_deploy.serve.service import Service
from cellseg_deploy.serve.settings import Settings
from cellseg_deploy.threads import plan
from cellseg_deploy.web.access import Access, hosts_of

PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"
DEFAULTS = Settings(cell_diameter=None)
"""The stub's own scale; nothing is measured."""


def png(centres: list[tuple[float, float]] = THREE, hw: tuple[int, int] = (100, 130)) -> bytes:
    """A PNG with a disc at each centre."""
    buffer = io.BytesIO()
    Image.fromarray(draw_discs(hw, centres)).save(buffer, "PNG")
    return buffer.getvalue()


class GatedBackend(DarknessBackend):
    """As the stub, but no batch is run until ``gate`` is set. ``poison``: a colour that makes its batch fail."""

    poison = 7

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.gate, self.error = threading.Event(), error
        self.taken = 0  # tiles

    def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
        self.taken += len(tiles_nhwc)
        self.gate.wait()
        if self.error is not None and (tiles_nhwc == self.poison).any():
            raise self.error
        return super()._predict(tiles_nhwc)


@contextmanager
def service(backend: Backend | None = None, *, limits: Limits | None = None, batch: int = 8) -> Iterator[Service]:
    """A running service."""
    backend = DarknessBackend() if backend is None else backend
    with Engine(backend, batch=batch, plan=plan(2), metrics=Metrics()) as engine:
        try:
            yield Service(engine, DEFAULTS, limits or Limits())
        finally:
            if isinstance(backend, GatedBackend):
                backend.gate.set()


def access(token: str = "") -> Access:
    return Access("cellseg-serve", hosts_of(PORT), token, without_token=(401, "The token is missing or wrong."))


def talk(opened: Service, conversation: Callable[[Any], Awaitable[Any]], *, token: str = "") -> Any:
    """Run ``conversation`` with an httpx client of the application, without a server; gives what it returns."""
    import anyio
    import httpx

    from cellseg_deploy.serve.app import make_app

    async def run() -> Any:
        transport = httpx.ASGITransport(app=make_app(opened, access(token)))
        async with httpx.AsyncClient(transport=transport, base_url=HERE, timeout=60) as client:
            return await conversation(client)

    return anyio.run(run)


def ask(opened: Service, method: str, path: str, *, token: str = "", **more: Any) -> Any:
    """One request."""
    return talk(opened, lambda client: client.request(method, path, **more), token=token)


async def until(is_so: Callable[[], bool]) -> None:
    """Let other tasks work until ``is_so``; a test of broken code fails here, in place of waiting for ever."""
    import anyio

    with anyio.fail_after(60):
        while not is_so():
            await anyio.lowlevel.checkpoint()


class FifoBackend(DarknessBackend):
    """As the stub; each batch writes a line to stdout, and then waits until somebody opens the FIFO for writing."""

    def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
        print("batch", flush=True)
        with Path(os.environ["CELLSEG_TEST_FIFO"]).open("rb") as file:
            file.read()
        return super()._predict(tiles_nhwc)


class TellingEngine(Engine):
    """Writes the name of each accepted image to stdout."""

    def submit(self, task: Task) -> Future[Answer]:
        print(task.name, flush=True)
        return super().submit(task)


def main() -> None:
    """``cellseg-serve`` with that network; without a FIFO, with the stub and ``TellingEngine``."""
    from cellseg_deploy import backends
    from cellseg_deploy.cli.serve import main as serve
    from cellseg_deploy.serve import engine

    if "CELLSEG_TEST_FIFO" in os.environ:
        backends.open_backend = lambda *_, **__: FifoBackend()  # type: ignore[assignment]
    else:
        backends.open_backend = lambda *_, **__: DarknessBackend()  # type: ignore[assignment]
        engine.Engine = TellingEngine  # type: ignore[misc]
    serve()


if __name__ == "__main__":
    sys.exit(main())
