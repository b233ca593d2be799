"""Cells as ImageJ regions: a ROI zip for the ROI Manager of ImageJ and Fiji (roifile writes the regions).

A cell's outline is what ImageJ's wand would trace, so Fiji measures the same area as ``area_px``. A cell with holes or
in several pieces is a composite region, which ImageJ fills by ring direction. If the model distinguishes classes, a
region has the colour of its class, and its name as the property ``class`` (in Fiji, Image > Properties of the region).
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np

from cellseg_deploy.cells.polygons import CellPolygons
from cellseg_deploy.outputs.segmented import SegmentedImage

_MOVE, _LINE, _CLOSE = 0.0, 1.0, 4.0  # of java.awt.geom.PathIterator
_EPOCH = (1980, 1, 1, 0, 0, 0)  # earliest date in a zip: the same cells give the same bytes


def encode(image: SegmentedImage) -> bytes:
    """Encode a zip with one region per cell, named by its zero-padded label, so that they sort as in cells.csv."""
    digits = max(4, len(str(len(image.polygons))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for cell, (name, rgb) in zip(image.polygons, image.classifications, strict=True):
            roi = _region(cell, f"{cell.label:0{digits}}")
            roi.stroke_color = bytes((255, *rgb))
            if image.classes is not None:
                roi.props = f"class: {name}\n"
            entry = zipfile.ZipInfo(f"{roi.name}.roi", _EPOCH)
            entry.external_attr, entry.create_system = 0o644 << 16, 3
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, roi.tobytes())
    return buffer.getvalue()


def _region(cell: CellPolygons, name: str) -> Any:
    """Return the roifile.ImagejRoi of one cell."""
    import roifile

    rings = [ring for polygon in cell.polygons for ring in polygon]
    corners = np.concatenate(rings)
    if cell.is_simple:
        # Beyond ImageJ's 16-bit coordinates roifile adds floating point ones.
        roi = roifile.ImagejRoi.frompoints(corners, name=name)
        roi.roitype = roifile.ROI_TYPE.TRACED
        roi.options &= ~(roifile.ROI_OPTIONS.OVERLAY_BACKGROUNDS | roifile.ROI_OPTIONS.OVERLAY_LABELS)
    else:
        path = np.concatenate([_path(ring) for ring in rings])
        roi = roifile.ImagejRoi(
            roitype=roifile.ROI_TYPE.RECT, name=name, multi_coordinates=path, shape_roi_size=len(path)
        )
    roi.left, roi.top = corners.min(axis=0).tolist()
    roi.right, roi.bottom = corners.max(axis=0).tolist()
    return roi


def _path(ring: Any) -> Any:
    """Return ``ring`` as ImageJ's path of floats: each step's kind and end point, then a closing step."""
    steps = np.empty((len(ring), 3), np.float32)
    steps[:, 0] = _LINE
    steps[0, 0] = _MOVE
    steps[:, 1:] = ring
    return np.append(steps.reshape(-1), np.float32(_CLOSE))
