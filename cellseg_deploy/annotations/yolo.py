"""Polygons of YOLO text files as shapes: ``class x1 y1 x2 y2 ...`` per line, in shares of the image's sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cellseg_deploy.annotations.files import number_of
from cellseg_deploy.annotations.shapes import Shape
from cellseg_deploy.errors import DataError
from cellseg_deploy.files.text import read_text

_EXPECTED = "a class number and x, y of three or more corners, as shares of the image's sides"


def read_polygons(path: Path, names: Mapping[int, str], image_hw: tuple[int, int]) -> list[Shape]:
    """Read the polygons in ``path``, in px of the image of size ``image_hw``. ``names``: of the classes, by number.

    Raises ``DataError`` with the line that cannot be read, or is a box.
    """
    height, width = image_hw
    shapes = []
    for number, line in enumerate(read_text(path, _EXPECTED).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        place = f"{path}, line {number}"
        if len(words) == 5:
            raise DataError(f"{place}: a box, not a polygon; give a folder of boxes as `boxes`")
        if len(words) < 7 or len(words) % 2 == 0 or not words[0].isdecimal():
            raise DataError(f"{place}: {line.strip()[:60]!r}; expected {_EXPECTED}")
        corners = np.array([number_of(word, place) for word in words[1:]], np.float64).reshape(-1, 2)
        if not ((corners >= 0) & (corners <= 1)).all():
            raise DataError(f"{place}: corners outside 0 to 1; expected {_EXPECTED}")
        at = int(words[0])
        if names and at not in names:
            raise DataError(f"{place}: class {at}, but the list of names has {sorted(names)}")
        shapes.append(Shape(place, ((corners * (width, height),),), names.get(at, str(at))))
    return shapes
