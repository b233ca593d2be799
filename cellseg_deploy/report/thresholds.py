"""Counts and outlines of one image at several thresholds, as the page draws them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.report.thumbnails import fitted, jpeg_text

THRESHOLDS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(1, 20))
MAX_IMAGES = 24
_SIDE = 900

Labels = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


def encode(pixels_hwc: npt.NDArray[np.uint8], used: float, steps: Iterable[tuple[float, Labels, Bools]]) -> str:
    """Return the JSON text of an image ``pixels_hwc`` (h, w, 3).

    ``used``: threshold of the run. ``steps``: threshold, labels (h, w) and whether each cell counts, (n,). Outlines are
    simplified to half a px of the picture that is shown, at most 900 px wide.
    """
    picture = fitted(pixels_hwc, _SIDE)
    factor = picture.shape[1] / pixels_hwc.shape[1]
    content = {
        "size": [picture.shape[1], picture.shape[0]],
        "picture": jpeg_text(picture),
        "used": used,
        "steps": [_step(threshold, labels, counted, factor) for threshold, labels, counted in steps],
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _step(threshold: float, labels: Labels, counted: Bools, factor: float) -> dict[str, Any]:
    outlines = _outlines(labels, factor)
    return {
        "threshold": threshold,
        "cells": len(counted),
        "counted": int(counted.sum()),
        "outlines": [line for line, is_in in zip(outlines, counted.tolist(), strict=True) if is_in],
        "others": [line for line, is_in in zip(outlines, counted.tolist(), strict=True) if not is_in],
    }


def _outlines(labels: Labels, factor: float) -> list[list[float]]:
    """x, y, x, y, ... of the largest outline of each cell 1..n, in px of the picture."""
    import cv2

    from cellseg_deploy.cells.polygons import cell_polygons

    lines = []
    for cell in cell_polygons(labels):
        ring = max((polygon[0] for polygon in cell.polygons), key=len).astype(np.float32) * np.float32(factor)
        simple = cv2.approxPolyDP(ring.reshape(-1, 1, 2), 0.5, True).reshape(-1)
        lines.append([round(float(value), 1) for value in simple])
    return lines
