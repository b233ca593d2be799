"""Regions of ImageJ's ROI Manager, a zip of ``.roi`` files or one such file, as shapes (roifile reads them).

Areas are cells: polygon, freehand, traced, ellipse, rotated rectangle, oval, rectangle, and composites with holes or
pieces. Lines, points, angles, text and images are refused by their name.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.annotations.shapes import Floats, Shape
from cellseg_deploy.errors import DataError
from cellseg_deploy.outputs.requirements import require_packages

_MAX_ROI_BYTES = 1 << 24  # a million corners; a zip can claim more than any memory holds
_MAX_ROIS = 1_000_000
_EXPECTED = "expected a zip of regions as ImageJ's ROI Manager saves it (More > Save), or one .roi file"
_OUTLINES = ("POLYGON", "FREEHAND", "TRACED")
_OVAL_CORNERS = 180
NOT_COUNTED = " not counted"
"""Ending of the class names under which our outputs show cells that the count rule leaves out."""


def read_rois(path: Path) -> list[Shape]:
    """Read the regions in ``path``, in the order of the file.

    Raises ``DataError`` for a damaged file and a region that is no area, ``BackendUnavailableError`` without roifile.
    """
    require_packages("outputs", "roifile")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if data.startswith(b"Iout"):
        return [_shape(str(path), data)]
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".roi")]
            if len(entries) > _MAX_ROIS or any(entry.file_size > _MAX_ROI_BYTES for entry in entries):
                raise DataError(f"{path}: larger than any set of regions; {_EXPECTED}")
            others = [entry.filename for entry in archive.infolist() if entry not in entries and not entry.is_dir()]
            if others and not entries:
                raise DataError(f"{path}: holds {', '.join(others[:3])}, and no region; {_EXPECTED}")
            return [_shape(f"{path}, {entry.filename}", archive.read(entry)) for entry in entries]
    except DataError:
        raise
    except Exception as error:  # of zipfile and zlib, in many types
        raise DataError(f"{path}: damaged: {error or type(error).__name__}; {_EXPECTED}") from error


def _shape(place: str, data: bytes) -> Shape:
    import roifile

    try:
        roi = roifile.ImagejRoi.frombytes(data)
        kind = roi.roitype.name if roi.subtype.name in ("UNDEFINED", "ELLIPSE", "ROTATED_RECT") else roi.subtype.name
        rings = _rings(roi, kind)
    except Exception as error:  # of struct, numpy and enum, in many types
        raise DataError(f"{place}: damaged: {error or type(error).__name__}; {_EXPECTED}") from error
    if rings is None:
        raise DataError(
            f"{place}: {_name(roi, kind)} is no area of a cell; expected polygon, freehand, traced, oval, rectangle or "
            "composite regions: take it out, or draw the cell's outline"
        )
    polygon = tuple(np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings)
    return Shape(place, (polygon,), _class_of(roi))


def _rings(roi: Any, kind: str) -> list[Floats] | None:
    """Corners of the region, None if it is no area, or has round corners."""
    if kind == "RECT" and roi.composite:
        return list(roi.coordinates(multi=True))
    if kind in _OUTLINES:
        return [roi.coordinates()]
    if kind not in ("RECT", "OVAL") or (kind == "RECT" and roi.rounded_rect_arc_size):
        return None
    left, top, width, height = roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top
    if roi.subpixelrect:
        left, top, width, height = roi.xd, roi.yd, roi.widthd, roi.heightd
    if kind == "RECT":
        across, down = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1])
    else:
        angle = np.arange(_OVAL_CORNERS) * (2 * np.pi / _OVAL_CORNERS)
        across, down = (1 + np.cos(angle)) / 2, (1 + np.sin(angle)) / 2
    return [np.stack([left + width * across, top + height * down], axis=1)]


def _name(roi: Any, kind: str) -> str:
    words = {"RECT": "rounded rectangle", "FREELINE": "freehand line", "POLYLINE": "segmented line"}
    return f"the region {roi.name or 'without name'} ({words.get(kind, kind.lower())})"


def _class_of(roi: Any) -> str:
    """Class in the region's properties, as our own files have it: a line ``class: NAME``."""
    lines = [line.partition(":") for line in (roi.props or "").splitlines()]
    return next((name.strip().removesuffix(NOT_COUNTED) for key, _, name in lines if key.strip() == "class"), "")
