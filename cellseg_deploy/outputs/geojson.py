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
from typing import Any

import msgspec

from cellseg_deploy.cells.polygons import CellPolygons, Ring
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.outputs.tables import utf8

_NAMESPACE = uuid.UUID("6f0f8a53-0c0e-5c44-9b57-6a6f9f5b0d11")


def encode(image: SegmentedImage) -> bytes:
    """Encode a FeatureCollection with one detection per cell, in order of label; provenance in the member ``cellseg``.

    Ids derive from the image's name and the label: a cell keeps its id when the file is written again.
    """
    columns = {name: column for name, column in image.columns.items() if column.dtype.kind in "biuf"}
    names = list(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    features = [
        {
            "type": "Feature",
            "id": _id(image.name, cell.label),
            "geometry": _geometry(cell),
            "properties": {
                "objectType": "detection",
                "name": str(cell.label),
                "classification": {"name": name, "color": list(rgb)},
                # QuPath's measurements are numbers: true and false become 1 and 0, non-finite values are omitted.
                "measurements": {
                    column: int(value) if isinstance(value, bool) else value
                    for column, value in zip(names, row, strict=True)
                    if math.isfinite(value)
                },
            },
        }
        for cell, row, (name, rgb) in zip(image.polygons, rows, image.classifications, strict=True)
    ]
    source = {
        "image": utf8(image.name),
        "width_px": image.labels.shape[1],
        "height_px": image.labels.shape[0],
        "pixel_size_um": image.pixel_size_um,
        "model": image.model,
        "task": image.task,
    }
    return msgspec.json.encode({"type": "FeatureCollection", "cellseg": source, "features": features}) + b"\n"


def _id(image_name: str, label: int) -> str:
    raw = os.fsencode(image_name)  # including names that are not valid Unicode
    return str(uuid.uuid5(_NAMESPACE, f"{raw.hex()}/{label}"))


def _geometry(cell: CellPolygons) -> dict[str, Any]:
    polygons = [[_closed(ring) for ring in polygon] for polygon in cell.polygons]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _closed(ring: Ring) -> list[list[int]]:
    corners: list[list[int]] = ring.tolist()
    return [*corners, corners[0]]
