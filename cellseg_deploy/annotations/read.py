"""Rows of an annotation file to the boxes or points of each image.

A file covers the images with a row and the images it marks as having no objects (see ``files``). An image that the file
does not name is unknown, not empty, and left out; the remarks count such images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from cellseg_deploy.annotations.files import Row, read_rows
from cellseg_deploy.annotations.objects import Annotations, Boxes, Kind, Points
from cellseg_deploy.errors import DataError, plural


def read_annotations(path: Path, kind: Kind, sizes_hw: Mapping[str, tuple[int, int]]) -> Annotations:
    """Read the boxes or points in ``path`` for the images in ``sizes_hw``.

    ``sizes_hw``: height and width by image name, a posix path relative to the folder of images. The file may name an
    image by this path, by the path without its ending, or by the file name alone if only one image has it. Boxes that
    extend beyond the image are clipped and duplicate rows count once; both are mentioned in the remarks.

    Raises ``DataError`` with file and line for a row that cannot be read, a box without area, a mark outside its image,
    or a name that fits several images, and if no image is named.
    """
    rows = read_rows(path, kind)
    by_name = ImageNames(sizes_hw)
    marks: dict[str, dict[tuple[object, ...], None]] = {}
    elsewhere: set[str] = set()
    clipped = twice = 0
    for row in rows:
        image = by_name.find(row.image, row.place)
        if image is None:
            elsewhere.add(row.image)
            continue
        marked = marks.setdefault(image, {})
        if row.numbers is None:
            continue
        numbers, is_clipped = _in_px(row, sizes_hw[image])
        clipped += is_clipped
        twice += (row.class_name, *numbers) in marked
        marked[(row.class_name, *numbers)] = None
    if not marks:
        some = ", ".join(sorted(elsewhere)[:3]) or "nothing"
        raise DataError(
            f"{path} names none of the {plural(len(sizes_hw), 'image')}; it names {some}; are they the right images?"
        )
    remarks = []
    if clipped:
        remarks.append(f"boxes that extend beyond their image, clipped to it: {clipped:,}")
    if twice:
        remarks.append(f"duplicate rows, counted once: {twice:,}")
    if elsewhere:
        remarks.append(f"images named in the file but not found: {len(elsewhere):,}")
    if unknown := len(sizes_hw) - len(marks):
        remarks.append(f"images not named in the file, left out: {unknown:,}")
    by_image = {name: _marks(kind, list(marks[name])) for name in sizes_hw if name in marks}
    return Annotations(kind, by_image, tuple(remarks))


def _marks(kind: Kind, rows: list[tuple[object, ...]]) -> Boxes | Points:
    classes = tuple(str(row[0]) for row in rows)
    numbers = np.array([row[1:] for row in rows], np.float64)
    return Boxes(numbers.reshape(-1, 4), classes) if kind == "boxes" else Points(numbers.reshape(-1, 2), classes)


class ImageNames:
    """Finds an image by its name in an annotation file."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self._known = set(names)
        self._short: dict[str, list[str]] = {}
        for name in names:
            path = PurePosixPath(name)
            for short in {path.with_suffix("").as_posix(), path.name, path.stem} - {name}:
                self._short.setdefault(short, []).append(name)

    def find(self, image: str, place: str) -> str | None:
        """Return the image meant by ``image``, None if there is none. Raises ``DataError`` if several fit."""
        name = image.replace("\\", "/").removeprefix("./")
        if name in self._known:
            return name
        path = PurePosixPath(name)
        for form in (name, path.with_suffix("").as_posix(), path.name, path.stem):
            found = self._short.get(form, [])
            if len(found) > 1:
                raise DataError(
                    f"{place}: {image} may be {' or '.join(sorted(found)[:3])}; "
                    "name images by their path in the folder, with their ending"
                )
            if found:
                return found[0]
        return None


def _in_px(row: Row, image_hw: tuple[int, int]) -> tuple[tuple[float, ...], bool]:
    """Return the coordinates clipped to the image, and whether clipping was needed."""
    assert row.numbers is not None
    height, width = image_hw
    sides = (width, height) * (len(row.numbers) // 2)
    numbers = (
        tuple(value * side for value, side in zip(row.numbers, sides, strict=True)) if row.is_relative else row.numbers
    )
    inside = tuple(min(max(value, 0.0), float(side)) for value, side in zip(numbers, sides, strict=True))
    said = ", ".join(f"{value:g}" for value in numbers)
    if len(numbers) == 2:
        if inside != numbers:
            raise DataError(f"{row.place}: point {said} lies outside {row.image}, which is {width} x {height} px")
        return numbers, False
    if not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise DataError(f"{row.place}: box {said} has no area; expected left, top, right, bottom in px")
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        raise DataError(f"{row.place}: box {said} lies outside {row.image}, which is {width} x {height} px")
    # A box in shares of the sides can miss the border by its last written digit.
    return inside, max(abs(a - b) for a, b in zip(numbers, inside, strict=True)) > 0.5
