"""Photographs of the same content: a field that was brightened, resized, recompressed or stored twice.

A network trained on one of them cannot be evaluated on the other. A small view of the saturation is compared (cells
are coloured, the background is not), which light and size hardly change. Its local mean is subtracted, so that a
bright side or a vignette, which all photographs of one microscope share, does not make them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import plural
from cellseg_deploy.images.read import read_image

SIDE_PX, AROUND_PX = 24, 9
ALIKE = 0.8
"""Correlation above which two photographs are considered the same."""


def view(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Comparison vector of an RGB image (h, w, 3): float32 (576,) of length 1, or zeros where the image is uniform."""
    small = cv2.resize(image_hwc, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    largest = small.max(axis=2)
    saturation = (largest - small.min(axis=2)) / np.maximum(largest, 1)
    local = saturation - cv2.blur(saturation, (AROUND_PX, AROUND_PX), borderType=cv2.BORDER_REFLECT)
    flat = (local - local.mean()).ravel()
    length = float(np.linalg.norm(flat))
    return np.asarray(flat / length if length > 1e-3 else np.zeros_like(flat), np.float32)


def groups_of(paths: Sequence[Path]) -> list[list[int]]:
    """Indices of ``paths`` in groups of the same content, each ascending, in the order of their first image.

    Chains make one group. Raises ``DataError`` naming an image that cannot be read.
    """
    views = np.array([view(read_image(path).pixels_hwc) for path in paths], np.float32).reshape(len(paths), -1)
    alike = views @ views.T > ALIKE
    leader = list(range(len(paths)))
    for i, j in np.argwhere(np.triu(alike, 1)).tolist():
        old, new = max(leader[i], leader[j]), min(leader[i], leader[j])
        leader = [new if first == old else first for first in leader]
    found: dict[int, list[int]] = {}
    for index, first in enumerate(leader):
        found.setdefault(first, []).append(index)
    return list(found.values())


def words(groups: Sequence[Sequence[int]]) -> str:
    """One line about groups with several images, empty if there are none."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return ""
    images, n_groups = sum(map(len, several)), plural(len(several), "group")
    return f"{images} images show the same content as another ({n_groups}): groups are not divided"
