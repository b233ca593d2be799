"""From a label image to what the network is taught: foreground, boundary band, and the weight of thin gaps.

Everything is derived from the *instances* of one tile, after it was cut and warped, so that widths in pixels mean
the same at every scale the augmentation draws.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

Labels = npt.NDArray[np.int32]
FloatMap = npt.NDArray[np.float32]


def foreground_target(labels_hw: Labels) -> npt.NDArray[np.uint8]:
    """1 inside cells, 0 elsewhere and on the line where two cells touch; uint8 (H, W).

    Masks part touching cells by a background line of a few pixels, which halving the image can swallow. Pixels with
    a 4-neighbour of another cell become background, so that the line the network must learn is always there.
    """
    touching = np.zeros(labels_hw.shape, np.bool_)
    # Rows, then columns: a transposed view writes into the same arrays.
    for labels, found in ((labels_hw, touching), (labels_hw.T, touching.T)):
        first, second = labels[:-1], labels[1:]
        meet = (first != second) & (first > 0) & (second > 0)
        found[:-1] |= meet
        found[1:] |= meet
    return ((labels_hw > 0) & ~touching).astype(np.uint8)


def boundary_target(labels_hw: Labels, width_px: int) -> npt.NDArray[np.uint8]:
    """1 within ``width_px / 2`` px of an edge between a cell and anything else; uint8 (H, W). ``width_px`` is even."""
    if width_px < 2 or width_px % 2:
        raise UsageError(f"boundary width must be even and at least 2 px, got {width_px}")
    values = _as_float(labels_hw)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px + 1, width_px + 1))
    return np.asarray(cv2.dilate(values, kernel) != cv2.erode(values, kernel), np.uint8)


def gap_weights(foreground_hw: npt.NDArray[np.uint8], labels_hw: Labels, weight: float, sigma_px: float) -> FloatMap:
    """Extra weight ``weight * exp(-(d1 + d2)^2 / (2 sigma^2))`` of background pixels; float32 (H, W), 0 in cells.

    d1, d2: distances to the nearest and second nearest cell (Ronneberger et al. 2015, eq. 2). d1 is exact to within
    a pixel. d2 is read off the middle line between two cells, where it equals d1, and carried 2 px to each side;
    further from that line the weight is 0, which for the narrow gaps that matter leaves none of it out.
    """
    background = (foreground_hw == 0).astype(np.uint8)
    if weight == 0 or not background.any() or not foreground_hw.any():
        return np.zeros(labels_hw.shape, np.float32)
    d1, nearest = cv2.distanceTransformWithLabels(background, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    # OpenCV numbers the zero pixels; the number of each is found at the pixel itself.
    owner_of = np.zeros(int(nearest.max()) + 1, np.int32)
    owner_of[nearest[background == 0]] = labels_hw[background == 0]
    owner = _as_float(owner_of[nearest])
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    middle = cv2.dilate(owner, cross) != cv2.erode(owner, cross)
    # Beside the line d1 is a pixel short of half the gap.
    half_gap = cv2.dilate(d1, np.ones((3, 3), np.uint8))
    peak = np.where(middle, np.exp(-((2 * half_gap) ** 2) / (2 * sigma_px**2)), 0).astype(np.float32)
    spread = cv2.dilate(peak, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    return np.asarray(weight * spread * background, np.float32)


def _as_float(labels_hw: Labels) -> FloatMap:
    # OpenCV's morphology knows no int32; float32 is exact to 2^24 cells.
    return labels_hw.astype(np.float32)
