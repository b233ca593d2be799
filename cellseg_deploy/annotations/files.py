"""Files of annotation tools to rows: CSV tables, folders of YOLO text files, COCO json. Distinguished by content.

=======  =========================================================================================================
format   layout; how an image without objects is marked
=======  =========================================================================================================
boxes    CSV with the header ``image,class,x0,y0,x1,y1`` in any order, ``class`` may be missing; a row whose numbers
         are all empty
points   CSV with ``image,class,x,y``; likewise
YOLO     folder with one text file per image, ``class cx cy w h`` per line in shares of the image's sides; class names
         from ``classes.txt`` or ``data.yaml`` there or one folder up; an empty text file
COCO     json with ``images`` and ``annotations`` (``bbox`` left, top, width, height); an image without annotations
=======  =========================================================================================================
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.annotations.objects import Kind
from cellseg_deploy.errors import DataError
from cellseg_deploy.files.text import read_text

_COLUMNS: dict[Kind, tuple[str, ...]] = {"boxes": ("x0", "y0", "x1", "y1"), "points": ("x", "y")}
_EXPECTED = {
    "boxes": "a CSV file with the columns image,class,x0,y0,x1,y1, a folder of YOLO text files, or COCO json",
    "points": "a CSV file with the columns image,class,x,y",
}


@dataclass(frozen=True)
class Row:
    """One mark as written in a file. ``place``: file and line, for messages. ``numbers``: left, top, right, bottom of a
    box, or x, y of a point; shares of the image's sides if ``is_relative``. None: the image has no objects."""

    place: str
    image: str
    numbers: tuple[float, ...] | None
    class_name: str = ""
    is_relative: bool = False


def read_rows(path: Path, kind: Kind) -> list[Row]:
    """Read every row of ``path``. Raises ``DataError`` naming file and line, what was found and what was expected."""
    if path.is_dir():
        if kind == "points":
            raise DataError(f"{path} is a folder; expected {_EXPECTED[kind]}")
        return list(_yolo(path))
    text = read_text(path, _EXPECTED[kind])
    if text.lstrip()[:1] in ("{", "["):
        if kind == "points":
            raise DataError(f"{path} is json; expected {_EXPECTED[kind]}")
        return list(_coco(path, text))
    return list(_table(path, text, kind))


def _table(path: Path, text: str, kind: Kind) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines(), restval=None)
    header = [name.strip() for name in reader.fieldnames or ()]
    columns = _COLUMNS[kind]
    missing = [name for name in ("image", *columns) if name not in header]
    if missing or len(set(header)) != len(header):
        raise DataError(
            f"{path}, line 1: the columns are {','.join(header) or 'none'}; expected {_EXPECTED[kind]} "
            f"({'missing: ' + ', '.join(missing) if missing else 'a column appears twice'})"
        )
    reader.fieldnames = header
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if None in row or any(value is None for value in row.values()):
            raise DataError(
                f"{place}: the number of fields differs from the header's {len(header)} ({','.join(header)})"
            )
        image = row["image"].strip()
        if not image:
            raise DataError(f"{place}: no image name")
        words = [row[name].strip() for name in columns]
        numbers = None if not any(words) else tuple(number_of(word, place) for word in words)
        yield Row(place, image, numbers, (row.get("class") or "").strip())


def _yolo(folder: Path) -> Iterator[Row]:
    names = yolo_names(folder)
    files = sorted(file for file in folder.rglob("*.txt") if file.name != "classes.txt")
    if not files:
        raise DataError(f"{folder} contains no text file; expected {_EXPECTED['boxes']}")
    for file in files:
        image = file.relative_to(folder).with_suffix("").as_posix()
        text = read_text(file, _EXPECTED["boxes"])
        lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            yield Row(str(file), image, None)
        for number, words in lines:
            place = f"{file}, line {number}"
            if len(words) != 5 or not words[0].isdecimal():
                raise DataError(
                    f"{place}: {' '.join(words)!r}; expected a whole number and four numbers: class cx cy w h"
                )
            x, y, width, height = (number_of(word, place) for word in words[1:])
            if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width <= 1 and 0 < height <= 1):
                raise DataError(
                    f"{place}: {' '.join(words)!r}; expected fractions of the image's width and height, 0 to 1"
                )
            at = int(words[0])
            if names and at not in names:
                raise DataError(f"{place}: class {at}, but the list of names has {sorted(names)}")
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            yield Row(place, image, box, names.get(at, str(at)), is_relative=True)


def yolo_names(folder: Path) -> dict[int, str]:
    """Return class names by number; from data.yaml only its ``names``, a list or a mapping, in either YAML style."""
    for place in (folder, folder.parent):
        if (place / "classes.txt").is_file():
            lines = read_text(place / "classes.txt", _EXPECTED["boxes"]).strip().splitlines()
            return {number: line.strip() for number, line in enumerate(lines)}
        if (place / "data.yaml").is_file():
            return _yaml_names(place / "data.yaml")
    return {}


def _yaml_names(path: Path) -> dict[int, str]:
    text = read_text(path, _EXPECTED["boxes"])
    inline = re.search(r"^names:\s*([\[{])(.*?)[\]}]", text, re.MULTILINE | re.DOTALL)
    block = re.search(r"^names:[ \t]*\n((?:[ \t]*(?:-|\d+[ \t]*:)[^\n]*(?:\n|$))+)", text, re.MULTILINE)
    if inline:
        items = [item for item in inline[2].split(",") if item.strip()]
        is_list = inline[1] == "["
    elif block:
        items = block[1].splitlines()
        is_list = items[0].lstrip().startswith("-")
        items = [item.strip().removeprefix("-") if is_list else item for item in items]
    else:
        raise DataError(f"{path}: no list of names; expected names: [first, second] or one line per name")
    if is_list:
        return {number: _unquoted(item) for number, item in enumerate(items)}
    pairs = [item.split(":", 1) for item in items]
    if not all(len(pair) == 2 and pair[0].strip().isdecimal() for pair in pairs):
        raise DataError(f"{path}: names do not map numbers to names; expected 0: first")
    return {int(number): _unquoted(name) for number, name in pairs}


def _unquoted(word: str) -> str:
    return word.strip().strip("\"'")


def _coco(path: Path, text: str) -> Iterator[Row]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is damaged json: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise DataError(f"{path} is json without images and annotations; expected {_EXPECTED['boxes']}")
    where = f"{path}, images"
    images = {field_of(item, "id", where): str(field_of(item, "file_name", where)) for item in content["images"]}
    names = {item.get("id"): str(item.get("name", item.get("id"))) for item in content.get("categories", [])}
    empty = dict(images)
    for number, item in enumerate(content["annotations"]):
        place = f"{path}, annotation {item.get('id', number) if isinstance(item, dict) else number}"
        image, box = field_of(item, "image_id", place), field_of(item, "bbox", place)
        if image not in images:
            raise DataError(f"{place}: image_id {image} is not an image of this file")
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(f"{place}: bbox {box!r}; expected left, top, width, height in px")
        left, top, width, height = (number_of(value, place) for value in box)
        empty.pop(image, None)
        category = item.get("category_id")
        name = names.get(category, "" if category is None else str(category))
        yield Row(place, images[image], (left, top, left + width, top + height), name)
    for image in empty.values():
        yield Row(where, image, None)


def field_of(item: Any, name: str, place: str) -> Any:
    """Return the member ``name`` of ``item``. Raises ``DataError`` if there is none."""
    if not isinstance(item, dict) or name not in item:
        raise DataError(f"{place}: an entry without {name}")
    return item[name]


def number_of(word: Any, place: str) -> float:
    """Return ``word`` as a finite number. Raises ``DataError`` for anything else."""
    try:
        value = float(word)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}: {word!r} is not a number; expected px, such as 52 or 52.5")
    return value
