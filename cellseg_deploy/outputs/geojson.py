"""Cells as GeoJSON for QuPath: detections with polygons, every numeric column of cells.csv as a measurement, and each
cell's class, if the model distinguishes classes, as QuPath's classification.

In QuPath: drop the file on the image, or File > Import objects from file. The layout is that of QuPath 0.4 and later
(``objectType`` in the properties, measurements as an object of numbers, a UUID as id), which plain GeoJSON readers
(shapely, geopandas, napari plugins) read as well. Coordinates are pixels of the upright image, y downwards.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import msgspec
import numpy.typing as npt

from cellseg_deploy.cells.polygons import CellPolygons, Ring
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.outputs.tables import rows_in_parts, utf8

_NAMESPACE = uuid.UUID("6f0f8a53-0c0e-5c44-9b57-6a6f9f5b0d11")


def encode(image: SegmentedImage) -> bytes:
    """Encode a FeatureCollection with one detection per cell, in order of label; provenance in the member ``cellseg``.

    Ids derive from the image's name and the label: a cell keeps its id when the file is written again.
    """
    height, width = image.labels.shape
    source = source_of(image.name, (height, width), image.pixel_size_um, image.model, image.task)
    geometries = (geometry(cell) for cell in image.polygons)
    return b"".join(pieces(source, features(image.name, image.columns, image.classifications, geometries)))


def pieces(source: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Yield the file piece by piece. ``source``: of ``source_of``; ``found``: of ``features``."""
    yield msgspec.json.encode({"type": "FeatureCollection", "cellseg": source, "features": []})[:-2]
    for number, feature in enumerate(found):
        yield (b"," if number else b"") + msgspec.json.encode(feature)
    yield b"]}\n"


def source_of(
    image: str, image_hw: tuple[int, int], pixel_size_um: float | None, model: str, task: str
) -> dict[str, Any]:
    """Return what the file says of its origin."""
    return {
        "image": utf8(image),
        "width_px": image_hw[1],
        "height_px": image_hw[0],
        "pixel_size_um": pixel_size_um,
        "model": model,
        "task": task,
    }


def features(
    image: str,
    columns: Mapping[str, npt.NDArray[Any]],
    classifications: Iterable[tuple[str, tuple[int, int, int]]],
    geometries: Iterable[Mapping[str, Any] | msgspec.Raw],
) -> Iterator[dict[str, Any]]:
    """Yield a detection per cell of ``image`` in order of label. ``columns``: of ``SegmentedImage``; ``geometries``: of
    ``geometry``, or the same as JSON."""
    columns = {name: column for name, column in columns.items() if column.dtype.kind in "biuf"}
    for label, row, (name, rgb), shape in zip(
        columns["label"].tolist(), chain.from_iterable(rows_in_parts(columns)), classifications, geometries, strict=True
    ):
        yield {
            "type": "Feature",
            "id": _id(image, label),
            "geometry": shape,
            "properties": {
                "objectType": "detection",
                "name": str(label),
                "classification": {"name": name, "color": list(rgb)},
                # QuPath's measurements are numbers: true and false become 1 and 0, non-finite values are omitted.
                "measurements": {
                    column: int(value) if isinstance(value, bool) else value
                    for column, value in zip(columns, row, strict=True)
                    if math.isfinite(value)
                },
            },
        }


def _id(image_name: str, label: int) -> str:
    raw = os.fsencode(image_name)  # including names that are not valid Unicode
    return str(uuid.uuid5(_NAMESPACE, f"{raw.hex()}/{label}"))


def geometry(cell: CellPolygons) -> dict[str, Any]:
    """Return the outline of ``cell`` as a GeoJSON geometry."""
    polygons = [[_closed(ring) for ring in polygon] for polygon in cell.polygons]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _closed(ring: Ring) -> list[list[int]]:
    corners: list[list[int]] = ring.tolist()
    return [*corners, corners[0]]
