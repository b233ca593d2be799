"""Objects exported by QuPath, or any GeoJSON in pixels, as shapes: polygons, holes, several pieces, classifications."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.annotations.imagej import NOT_COUNTED
from cellseg_deploy.annotations.shapes import Floats, Shape
from cellseg_deploy.errors import DataError

_EXPECTED = "expected GeoJSON with polygons in px, as QuPath exports objects"
_CELLS = ("detection", "cell", "tile")


def shapes_of(path: Path, content: Any) -> tuple[list[Shape], int]:
    """Return the shapes in ``content``, the json of ``path``, and the number of objects left out: QuPath's annotations
    are if there are detections, because then they are regions around the cells.

    Raises ``DataError`` for other geometries than polygons, and coordinates that cannot be read.
    """
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list) or not all(isinstance(item, dict) and "geometry" in item for item in features):
        raise DataError(f"{path}: json without features; {_EXPECTED}")
    kinds = [str(_properties(item).get("objectType", "")) for item in features]
    has_cells = any(kind in _CELLS for kind in kinds)
    shapes, regions = [], 0
    is_ours = isinstance(content, dict) and "cellseg" in content
    for number, (item, kind) in enumerate(zip(features, kinds, strict=True), start=1):
        if kind in ("root", "tma_core") or (has_cells and kind not in _CELLS):
            regions += 1
            continue
        place = f"{path}, feature {number}"
        name = _class_of(item)
        if is_ours:  # names of cells without a class, and of those that the count rule leaves out
            name = "" if name in ("Cell", "Cell" + NOT_COUNTED) else name.removesuffix(NOT_COUNTED)
        shapes.append(Shape(place, _polygons(place, item["geometry"]), name))
    return shapes, regions


def _properties(item: dict[str, Any]) -> dict[str, Any]:
    found = item.get("properties")
    return found if isinstance(found, dict) else {}


def _class_of(item: dict[str, Any]) -> str:
    """Name of QuPath's classification: an object with a name, or since 0.4 with names of several levels."""
    found = _properties(item).get("classification")
    if isinstance(found, dict):
        names = found.get("names")
        found = found.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else "")
    return found.strip() if isinstance(found, str) else ""


def _polygons(place: str, geometry: Any) -> tuple[tuple[Floats, ...], ...]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Polygon", "MultiPolygon"):
        raise DataError(f"{place}: a {kind or 'feature without geometry'}; expected Polygon or MultiPolygon")
    try:
        polygons = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
        found = tuple(
            tuple(np.array([corner[:2] for corner in ring], np.float64) for ring in polygon) for polygon in polygons
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{place}: coordinates that cannot be read ({error}); {_EXPECTED}") from error
    rings = [ring for polygon in found for ring in polygon]
    if not rings or any(ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 for ring in rings):
        raise DataError(f"{place}: a ring of fewer than three corners; {_EXPECTED}")
    return found
