"""Labels of the blocks between the two passes over them, in a file that one process writes and reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from cellseg_deploy.cells.blocks import MARGIN_PX, BlockSettings
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.files.atomic import writing


class LabelFile:
    """The file ``path``, replaced if a killed run left one, deleted at the end of the ``with`` block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        with writing(self._path):
            self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def keep(self, labels: Labels) -> Callable[[], Labels]:
        """Write ``labels``, int32 (h, w); the function returned reads them. Raises ``OutputError``."""
        at, shape = self._file.seek(0, 2), labels.shape
        with writing(self._path):
            self._file.write(np.ascontiguousarray(labels).data)

        def read() -> Labels:
            found = np.empty(shape, np.int32)
            with writing(self._path):
                self._file.seek(at)
                if self._file.readinto(found.data.cast("B")) != found.nbytes:
                    raise OSError("the file was cut short while it was in use")
            return found

        return read


def bytes_of_labels(settings: BlockSettings) -> int:
    """The most bytes that ``LabelFile`` takes for the windows of all blocks: 4 per pixel, overlaps included."""
    n_blocks = -(-settings.hw[0] // settings.block_rows)
    rows = settings.hw[0] + (n_blocks - 1) * (settings.overlap_rows + 2 * MARGIN_PX)
    return 4 * settings.hw[1] * rows
