"""A worker of a cluster that waits at gates: ``dask worker --preload gates.py``, with ``$GATES``, a folder.

The image NAME@GATE.png is read, and a band of a slide computed, once the file GATE is in that folder: a test decides
what is in progress when. The gate of a band is the last in ``$BANDS``, as in ``0:free,300:gone``, whose row it reaches.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cellseg_deploy.cluster import worker as worker_side
from cellseg_deploy.run import image_work

PATIENCE_SECONDS = 300


def dask_setup(worker: Any) -> None:
    """Make this worker wait."""
    read, band = image_work.read_image, worker_side._Engine.band

    def read_when_open(path: Path, *args: Any, **options: Any) -> Any:
        wait_at(path.stem.rpartition("@")[2])
        return read(path, *args, **options)

    def band_when_open(self: Any, out: Path, task: Any) -> Any:
        gates = (each.split(":") for each in os.environ["BANDS"].split(","))
        wait_at([name for row, name in gates if task[-1] >= int(row)][-1])
        return band(self, out, task)

    image_work.read_image = read_when_open
    worker_side._Engine.band = band_when_open  # type: ignore[method-assign]


def wait_at(gate: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not Path(os.environ["GATES"], gate).exists() and time.monotonic() < end:
        time.sleep(0.02)
