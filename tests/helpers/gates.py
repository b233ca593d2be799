"""A worker of a cluster that waits at gates: ``dask worker --preload gates.py``, with ``$GATES``, a folder.

The image NAME@GATE.png is read once the file GATE is in that folder: a test decides what is in progress when.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cellseg_deploy.run import image_work

PATIENCE_SECONDS = 300


def dask_setup(worker: Any) -> None:
    """Make this worker wait."""
    read = image_work.read_image

    def when_open(path: Path, *args: Any, **options: Any) -> Any:
        gate = Path(os.environ["GATES"], path.stem.rpartition("@")[2])
        end = time.monotonic() + PATIENCE_SECONDS
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return read(path, *args, **options)

    image_work.read_image = when_open
