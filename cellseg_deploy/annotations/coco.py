"""Segmentations of COCO json as shapes: polygons, and run lengths (RLE) as lists or compressed text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.annotations.files import field_of, number_of
from cellseg_deploy.annotations.shapes import Mask, Shape
from cellseg_deploy.errors import DataError

_EXPECTED = "expected COCO json with segmentations: polygons in px, or run lengths"


@dataclass
class CocoFile:
    """Content of one file. ``images``: file name by id. ``items``: annotations by id of the image, with their places.
    ``categories``: names by id. ``crowds``: annotations of crowds, which are no cells, left out."""

    path: Path
    images: dict[Any, str]
    categories: Mapping[Any, str]
    items: dict[Any, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    crowds: int = 0

    @classmethod
    def of(cls, path: Path, content: Any) -> CocoFile:
        """Sort the annotations in ``content``, the json of ``path``, by image. Raises ``DataError``."""
        if not isinstance(content, dict) or not all(
            isinstance(content.get(name), list) for name in ("images", "annotations")
        ):
            raise DataError(f"{path} is json without images and annotations; {_EXPECTED}")
        where = f"{path}, images"
        images = {_id_of(item, "id", where): str(field_of(item, "file_name", where)) for item in content["images"]}
        categories = content.get("categories", [])
        if not isinstance(categories, list) or not all(isinstance(item, dict) for item in categories):
            raise DataError(f"{path}: categories that are no list of id and name; {_EXPECTED}")
        names = {
            _id_of(item, "id", f"{path}, categories"): str(item.get("name", item.get("id"))) for item in categories
        }
        if list(names.values()) == ["cell"]:  # of a file of ours: no classes
            names = dict.fromkeys(names, "")
        file = cls(path, images, names)
        for number, item in enumerate(content["annotations"]):
            place = f"{path}, annotation {item.get('id', number) if isinstance(item, dict) else number}"
            image = _id_of(item, "image_id", place)
            if image not in images:
                raise DataError(f"{place}: image_id {image}, which is no image of the file")
            if item.get("iscrowd"):
                file.crowds += 1
            else:
                file.items.setdefault(image, []).append((place, item))
        return file

    def shapes(self, image_id: Any) -> list[Shape]:
        """Return the shapes of one image. Raises ``DataError``."""
        return [self._shape(place, item) for place, item in self.items.get(image_id, [])]

    def _shape(self, place: str, item: dict[str, Any]) -> Shape:
        category = None if item.get("category_id") is None else _id_of(item, "category_id", place)
        name = self.categories.get(category, "" if category is None else str(category))
        found = item.get("segmentation")
        if isinstance(found, dict):
            return Shape.of_mask(place, _mask(place, found), name)
        if not isinstance(found, list) or not found:
            raise DataError(f"{place}: no segmentation; {_EXPECTED}. A file with boxes alone is given as `boxes`")
        polygons = []
        for flat in found:
            if not isinstance(flat, list) or len(flat) < 6 or len(flat) % 2:
                raise DataError(f"{place}: a polygon that is no list of x, y of three or more corners; {_EXPECTED}")
            corners = np.array([number_of(value, place) for value in flat], np.float64).reshape(-1, 2)
            polygons.append((corners,))
        return Shape(place, tuple(polygons), name)


def _id_of(item: Any, name: str, place: str) -> int | str:
    found = field_of(item, name, place)
    if not isinstance(found, int | str):
        raise DataError(f"{place}: {name} is {str(found)[:40]}; expected a number")
    return found


def _mask(place: str, rle: dict[str, Any]) -> Mask:
    """Decode run lengths, which count down the columns, background first."""
    size, counts = field_of(rle, "size", place), field_of(rle, "counts", place)
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and 0 < n < 2**20 for n in size):
        raise DataError(f"{place}: size {size!r}; expected [height, width] in px")
    height, width = size
    if isinstance(counts, str):
        counts = _decompressed(place, counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise DataError(f"{place}: run lengths that are no whole numbers; {_EXPECTED}")
    if sum(counts) != height * width:
        raise DataError(f"{place}: run lengths of {sum(counts):,} px in all, but the size is {width} x {height} px")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(values.reshape(width, height).T)


def _decompressed(place: str, text: str) -> list[int]:
    """Run lengths in COCO's compressed ``text`` (maskApi.c, rleFrString): five bits a character, lowest first, the
    sixth says that more follow; from the fourth number on, the difference from the number before the last.

    Not by pycocotools: it decodes without looking, and its numpy interface is deprecated.
    """
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        code = ord(sign) - 48
        if not 0 <= code < 64 or shift > 30:
            raise DataError(f"{place}: run lengths with {sign!r} after {len(counts)} numbers; {_EXPECTED}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise DataError(f"{place}: run lengths that end in the middle of a number; {_EXPECTED}")
    return counts
