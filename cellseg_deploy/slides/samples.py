"""Samples of a streamed image: for the overview, and for notes on what its pixels look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells import stain
from cellseg_deploy.cells.field_marks import find_pointer
from cellseg_deploy.cells.field_of_view import find_field
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.slides.region import Region

_OVERVIEW_PX = 2048


class Samples:
    """Every so many rows and columns of the image and its labels: for the overview, and for a note on its colours."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._steps = (max(1, -(-max(region.hw) // _OVERVIEW_PX)), stain.negative_step(region.height * region.width))
        self._images: tuple[list[Any], list[Any]] = ([], [])
        self._labels: tuple[list[Any], list[Any]] = ([], [])

    @property
    def step(self) -> int:
        """Pixels of the image from one pixel of the overview to the next."""
        return self._steps[0]

    def add(self, top: int, labels: npt.NDArray[np.int32]) -> None:
        """Add the strip of rows that begins at ``top``; its ``labels`` (rows, w)."""
        step_rows = max(1, 4_000_000 // labels.shape[1])
        for start in range(0, len(labels), step_rows):
            part = labels[start : start + step_rows]
            image = self.region.rows(top + start, top + start + len(part))
            for step, images, parts in zip(self._steps, self._images, self._labels, strict=True):
                first = -(top + start) % step
                images.append(image[first::step, ::step].copy())
                parts.append(part[first::step, ::step].copy())

    def overview(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Small image (h, w, 3) and its labels (h, w)."""
        return np.concatenate(self._images[0]), np.concatenate(self._labels[0])

    def notes(self) -> list[str]:
        """Notes on what the pixels look like."""
        small = self.overview()[0]
        field = find_field(small)
        seen = field is not None or find_pointer(small, field) is not None
        note = Note(
            "the picture seems to have a surround, a frame or an eyepiece pointer; large images are counted as a "
            "whole, surround included: check the overview; choose the part with `region`",
            "field of view",
        )
        negative = stain.negative_note_of_sample(np.concatenate(self._images[1]), np.concatenate(self._labels[1]) > 0)
        return [note, negative] if seen else [negative]
