"""Class of each cell in the training images, from a CSV file: ``image,label,class``.

``label`` is the number of the cell in its label image. Classes keep the order in which they first appear in the files.
The class ``ignore`` excludes a cell: nothing is learned from its pixels, neither as cell nor as background. A cell
without a row, or with an empty class, is a cell of unknown class.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError, UsageError, plural
from cellseg_deploy.files.text import read_text
from cellseg_deploy.models.spec import misfit_of_classes

IGNORE_CLASS = "ignore"
UNKNOWN, LEFT_OUT = -1, -2
"""Class numbers of cells of unknown class, and of cells of the class ``ignore``."""
_COLUMNS = ("image", "label", "class")

ClassNumbers = npt.NDArray[np.int16]


@dataclass(frozen=True)
class CellClasses:
    """``names``: names of the classes. ``by_image``: image file -> label number -> class number, or ``LEFT_OUT``.
    ``places``: file and line of each row, by image file and label, for messages. ``sha256``: hash of the files."""

    names: tuple[str, ...] = ()
    by_image: Mapping[Path, Mapping[int, int]] = field(default_factory=dict)
    places: Mapping[tuple[Path, int], str] = field(default_factory=dict)
    sha256: str = ""

    def of_labels(self, image: Path, numbers: npt.NDArray[np.int64]) -> ClassNumbers:
        """Class numbers (n,) of the cells with these ``numbers`` (n,) in the label image of ``image``; the first is the
        background's. Raises ``DataError`` for a row whose number does not occur in the label image."""
        rows = self.by_image.get(image, {})
        found = np.full(len(numbers), UNKNOWN, np.int16)
        at = {number: i for i, number in enumerate(numbers.tolist()) if number > 0}
        for number, class_number in rows.items():
            if number not in at:
                raise DataError(
                    f"{self.places[image, number]}: the mask of {image} has no cell {number}; "
                    f"it has {_some(sorted(at))}: do these label images belong to the file?"
                )
            found[at[number]] = class_number
        return found


def read_classes(files: Sequence[Path], images: Sequence[Path]) -> CellClasses:
    """Read the classes that ``files`` assign to the cells of ``images``.

    An image is named by its path or the end of it, with or without the file extension (``a.png``, ``lab/images/a``).
    Rows of images not in ``images`` are skipped. Raises ``DataError`` naming file and line for unreadable rows, a name
    that matches several images or a cell with two classes, and if no image is named; ``UsageError`` for class names
    that a model cannot have.
    """
    ends: dict[PurePosixPath, set[Path]] = {}
    for image in images:
        for whole in (PurePosixPath(image.as_posix()), PurePosixPath(image.with_suffix("").as_posix())):
            for start in range(len(whole.parts)):
                ends.setdefault(PurePosixPath(*whole.parts[start:]), set()).add(image)
    digest = hashlib.sha256()
    numbers: dict[str, int] = {}
    by_image: dict[Path, dict[int, int]] = {}
    places: dict[tuple[Path, int], str] = {}
    for file in files:
        text = read_text(file, f"CSV {','.join(_COLUMNS)}")
        digest.update(text.encode())
        for place, name, label, class_name in _rows(file, text):
            class_number = UNKNOWN
            if class_name:
                class_number = LEFT_OUT if class_name == IGNORE_CLASS else numbers.setdefault(class_name, len(numbers))
            found = ends.get(PurePosixPath(name.replace("\\", "/").removeprefix("./")), set())
            if len(found) > 1:
                some = " or ".join(sorted(map(str, found))[:3])
                raise DataError(f"{place}: {name} may be {some}; write more of the image's path")
            for image in found:
                given = by_image.setdefault(image, {})
                if given.setdefault(label, class_number) != class_number:
                    raise DataError(
                        f"{place}: cell {label} of {name} has another class at {places[image, label]}; expected one"
                    )
                places.setdefault((image, label), place)
    if not by_image:
        raise DataError(
            f"{', '.join(map(str, files))}: names none of the {plural(len(images), 'image')}; expected names such as "
            f"{images[0].name if images else 'a.png'}"
        )
    names = tuple(numbers)
    if len(names) < 2 or misfit_of_classes(names):
        problem = misfit_of_classes(names) or "no class is named; expected two or more"
        raise UsageError(f"classes of {', '.join(map(str, files))}: {problem}")
    return CellClasses(names, by_image, places, digest.hexdigest())


def _rows(file: Path, text: str) -> list[tuple[str, str, int, str]]:
    reader = csv.DictReader(text.splitlines(), restval=None)
    header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{file}, line 1: the columns are {','.join(header) or 'none'}; expected {','.join(_COLUMNS)} "
            f"(missing: {', '.join(missing)})"
        )
    reader.fieldnames = header
    rows = []
    for row in reader:
        place = f"{file}, line {reader.line_num}"
        if None in row or any(row[name] is None for name in _COLUMNS):
            raise DataError(
                f"{place}: the number of fields differs from the header's {len(header)} ({','.join(header)})"
            )
        label = row["label"].strip()
        if not label.isdecimal() or int(label) < 1:
            raise DataError(f"{place}: label {label!r}; expected the cell's number in its label image, 1 or more")
        rows.append((place, row["image"].strip(), int(label), row["class"].strip()))
    return rows


def _some(numbers: Sequence[int]) -> str:
    return f"{plural(len(numbers), 'cell')}, numbered {numbers[0]} to {numbers[-1]}" if numbers else "no cells"
