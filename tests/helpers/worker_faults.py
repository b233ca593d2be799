"""Faults of worker processes, which tests order: importable there, as plugins are sent by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

from cellseg_deploy.cluster import worker as worker_side
from cellseg_deploy.run import image_work

POISON = "poison"


class Poison(WorkerPlugin):
    """A worker process that reads an image with this word in its name is killed at once, also after a restart."""

    name = POISON

    def setup(self, worker: Any) -> None:
        self.read = image_work.read_image

        def read(path: Path, *args: Any, **options: Any) -> Any:
            if POISON in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.read(path, *args, **options)

        image_work.read_image = read
        self.open = worker_side.open_image

        def open_slide(path: Path, *args: Any) -> Any:
            if POISON in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.open(path, *args)

        worker_side.open_image = open_slide

    def teardown(self, worker: Any) -> None:
        image_work.read_image = self.read
        worker_side.open_image = self.open
