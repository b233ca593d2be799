"""What a request may get: its name, its media type, and how it is encoded.

Label images, overlays and GeoJSON are the bytes that a folder run writes for the same image and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.outputs import encoders, geojson
from cellseg_deploy.outputs.segmentation import Segmentation
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.run import tables

JSON = "application/json"
_LARGEST = 65_535  # of 16 bit
_RESULT = {  # names of images.csv
    *("counted", "confluence", "field_of_view_share", "median_cell_area_px", "scale", "pixel_size_um"),
    *("pixel_size_source", "median_cell_area_um2", "counted_per_mm2", "by_class"),
}


@dataclass(frozen=True)
class Output:
    """One kind of answer. ``what``: description. ``kind``: its media type. ``encode``: the answer's bytes."""

    name: str
    what: str
    kind: str
    encode: Callable[[Segmentation], bytes]


def as_json(found: Segmentation) -> dict[str, Any]:
    """Return counts, figures, warnings and cells of an image, as plain values; see ``openapi`` for each member."""
    record = tables.done(found.segmented, source=None, output_name=found.name, outputs=(), notes=found.notes)
    columns = found.segmented.columns
    names = list(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    height, width = found.labels.shape
    return {
        "image": utf8(found.name),
        "width": width,
        "height": height,
        "model": found.model,
        "task": found.task,
        "count": found.count,
        **{name: record.result[name] for name in record.result if name in _RESULT},
        "warnings": [
            {"kind": kind_of(note), "text": " ".join(note.split())}
            for note in found.notes
            if kind_of(note) != "conversion"
        ],
        "conversions": [" ".join(note.split()) for note in found.notes if kind_of(note) == "conversion"],
        "seconds": {stage: round(seconds, 6) for stage, seconds in found.seconds.items()},
        "cells": [dict(zip(names, map(_finite, row), strict=True)) for row in rows],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(found: Segmentation) -> bytes:
    return msgspec.json.encode(as_json(found))


def _label_png(found: Segmentation) -> bytes:
    import imagecodecs

    if found.count > _LARGEST:
        raise DataError(f"{found.count} cells do not fit in a PNG of 16 bit; ask for labels.tif")
    return bytes(imagecodecs.png_encode(found.labels.astype(np.uint16)))


OUTPUTS: tuple[Output, ...] = (
    Output("json", "counts, figures, warnings, and one object per cell", JSON, _json),
    Output(
        "geojson", "outlines, for QuPath too", "application/geo+json", lambda found: geojson.encode(found.segmented)
    ),
    Output(
        "labels.tif",
        "label image: 0 background, 1..n the cells",
        "image/tiff",
        lambda found: encoders.labels(found.segmented),
    ),
    Output("overlay.png", "the image with outlines and count", "image/png", lambda found: _overlay(found, ".png")),
    Output("overlay.jpg", "the same as JPEG", "image/jpeg", lambda found: _overlay(found, ".jpg")),
    Output("labels.png", "label image as 16-bit PNG; by name only", "image/png", _label_png),
)
BY_NAME = {output.name: output for output in OUTPUTS}


def _overlay(found: Segmentation, suffix: str) -> bytes:
    return encoders.overlay(found.segmented, suffix)


def named(name: str) -> Output:
    """Return the output ``name``. Raises ``UsageError``."""
    if name not in BY_NAME:
        raise UsageError(f"output must be one of {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name]


def accepted(header: str) -> Output | None:
    """Return the output that the header Accept prefers, the first of ``OUTPUTS`` among equals; None if there is none.

    >>> accepted("image/*;q=0.5, application/geo+json").name
    'geojson'
    """
    quality = {output.name: (0.0, 0) for output in OUTPUTS}  # value, and how exactly it was named
    for part in header.split(","):
        kind, *settings = (word.strip().lower() for word in part.split(";"))
        weight = 1.0
        for setting in settings:
            name, _, value = setting.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        group, _, rest = kind.partition("/")
        for output in OUTPUTS:
            exact = 3 if kind == output.kind else 2 if rest == "*" and output.kind.startswith(f"{group}/") else 0
            exact = 1 if kind == "*/*" else exact
            if exact > quality[output.name][1]:
                quality[output.name] = (weight, exact)
    best = max(OUTPUTS, key=lambda output: quality[output.name][0])  # the first among equals
    return best if quality[best.name][0] > 0 else None
