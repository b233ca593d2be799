"""Results of a run as the report takes them: from its journal, so that they are the same after it was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageRow:
    """One image. ``status``: ``done`` or ``failed``. ``values``: its values in images.csv by column, and ``warnings``
    (kind -> text), ``by_class`` (class -> number) and ``field_px``. ``output_name``: of its files, without
    extension."""

    name: str
    group: str
    status: str
    values: Mapping[str, Any]
    output_name: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the image has results."""
        return self.status == "done"

    @property
    def warnings(self) -> Mapping[str, str]:
        """Kind -> text of the image's warnings."""
        found: Mapping[str, str] = self.values.get("warnings", {})
        return found

    @property
    def by_class(self) -> Mapping[str, int]:
        """Class -> number of cells; empty without classes."""
        found: Mapping[str, int] = self.values.get("by_class", {})
        return found


@dataclass(frozen=True)
class CellRows:
    """Cells of one image whose class counts, in order of label: (n,) each; ``class_of`` is None without classes."""

    area_px: Floats
    solidity: Floats
    eccentricity: Floats
    circularity: Floats
    is_cut: npt.NDArray[np.bool_]
    class_of: npt.NDArray[np.str_] | None


@dataclass(frozen=True)
class Results:
    """``images``: in the order of the tables. ``columns``: of cells.csv without the image's name. ``read_cells``:
    yields name and lines of cells.csv, without the name, of each image that has cells, in the same order.
    ``read_thresholds``: yields name and ``thresholds.encode`` of the images that have it."""

    images: Sequence[ImageRow]
    columns: Sequence[str]
    read_cells: Callable[[], Iterable[tuple[str, str]]]
    read_thresholds: Callable[[], Iterable[tuple[str, str]]] = tuple

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """All groups, sorted."""
        return tuple(sorted({image.group for image in self.images}))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Classes that the model tells apart, in its order."""
        return next((tuple(image.by_class) for image in self.images if image.by_class), ())

    def cells(self) -> Iterator[tuple[ImageRow, CellRows]]:
        """Yield each image that has cells with them; one image's are in memory at a time."""
        by_name = {image.name: image for image in self.images}
        at = [self.columns.index(name) for name in ("area_px", "solidity", "eccentricity", "circularity")]
        cut, left_out = self.columns.index("touches_border"), "left_out_by" in self.columns
        kind = self.columns.index("class") if "class" in self.columns else None
        for name, lines in self.read_cells():
            rows = [line.split(",") for line in lines.splitlines()]
            if left_out:
                rows = [row for row in rows if row[-1] != "class"]
            values = np.array([[float(row[column]) for column in at] for row in rows]).reshape(-1, len(at))
            yield (
                by_name[name],
                CellRows(
                    values[:, 0],
                    values[:, 1],
                    values[:, 2],
                    values[:, 3],
                    np.array([row[cut] == "true" for row in rows], np.bool_),
                    None if kind is None else np.array([row[kind] for row in rows], np.str_),
                ),
            )
