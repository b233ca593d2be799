"""A small picture of a streamed image and of its labels, collected while both pass by."""

from __future__ import annotations

import numpy as np

from cellseg_deploy.cells import stain
from cellseg_deploy.cells.field_marks import find_pointer
from cellseg_deploy.cells.field_of_view import find_field
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.cells.row_resize import ReadRows
from cellseg_deploy.slides.region import Pixels

_OVERVIEW_PX = 2048


class Samples:
    """Every so many rows and columns of the image and its labels: for the overview, and for a note on its colours.

    The image of ``hw`` px is read once by ``read``, for the network, through ``rows``. What the network did not read,
    in a resumed run or in bare glass, is read by ``add``.
    """

    def __init__(self, hw: tuple[int, int], read: ReadRows) -> None:
        self._read = read
        self._steps = (max(1, -(-max(hw) // _OVERVIEW_PX)), stain.negative_step(hw[0] * hw[1]))
        self._seen: tuple[dict[int, Pixels], dict[int, Pixels]] = ({}, {})
        self._images: tuple[list[Pixels], list[Pixels]] = ([], [])
        self._labels: tuple[list[Labels], list[Labels]] = ([], [])

    @property
    def step(self) -> int:
        """Pixels of the image from one pixel of the overview to the next."""
        return self._steps[0]

    def rows(self, start: int, stop: int) -> Pixels:
        """Rows ``start`` to before ``stop``, uint8 RGB (stop - start, w, 3)."""
        image = self._read(start, stop)
        for step, seen in zip(self._steps, self._seen, strict=True):
            for row in range(start + -start % step, stop, step):
                seen[row] = image[row - start, ::step].copy()
        return image

    def add(self, top: int, labels: Labels) -> None:
        """Add the strip of rows that begins at ``top``; its ``labels`` (rows, w)."""
        step_rows = max(1, 4_000_000 // labels.shape[1])
        for start in range(top, top + len(labels), step_rows):
            rows = range(start, min(start + step_rows, top + len(labels)))
            asked = [rows[-start % step :: step] for step in self._steps]
            if lacking := {row for seen, of in zip(self._seen, asked, strict=True) for row in of if row not in seen}:
                self.rows(min(lacking), max(lacking) + 1)
            for step, seen, numbers, images, parts in zip(
                self._steps, self._seen, asked, self._images, self._labels, strict=True
            ):
                images += [seen.pop(row) for row in numbers]
                parts += [labels[row - top, ::step].copy() for row in numbers]

    def overview(self) -> tuple[Pixels, Labels]:
        """Small image (h, w, 3) and its labels (h, w)."""
        return np.stack(self._images[0]), np.stack(self._labels[0])

    def notes(self) -> list[str]:
        """Notes on what the pixels look like."""
        small = self.overview()[0]
        field = find_field(small)
        seen = field is not None or find_pointer(small, field) is not None
        note = Note(
            "the picture seems to have a surround, a frame or an eyepiece pointer; large images are counted as a "
            "whole, surround included: check the overview; `cellseg-slide --region X,Y,W,H` counts a part",
            "field of view",
        )
        negative = stain.negative_note_of_sample(np.stack(self._images[1]), np.stack(self._labels[1]) > 0)
        return [note, negative] if seen else [negative]
