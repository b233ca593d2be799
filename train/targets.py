"""From a label image to training targets: foreground, boundary band or distance to the edge, and weights.

Everything is derived from the *instances* of one tile, after it was cut and warped, so that widths in pixels mean
the same at every scale that the augmentation draws.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.errors import UsageError

Labels = npt.NDArray[np.int32]
FloatMap = npt.NDArray[np.float32]


def foreground_target(labels_hw: Labels) -> npt.NDArray[np.uint8]:
    """Foreground mask: 1 inside cells, 0 elsewhere and on the line where two cells touch; uint8 (H, W).

    Masks separate touching cells by a background line of a few pixels, which halving the image can erase. Pixels with
    a 4-neighbour of another cell become background, so that the line the network must learn is always there. Foreground
    of unknown instance (``IGNORED``) is not separated from its neighbours.
    """
    touching = np.zeros(labels_hw.shape, np.bool_)
    # Rows, then columns: a transposed view writes into the same arrays.
    for labels, found in ((labels_hw, touching), (labels_hw.T, touching.T)):
        first, second = labels[:-1], labels[1:]
        meet = (first != second) & (first > 0) & (second > 0) & (first != IGNORED) & (second != IGNORED)
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
    a pixel. d2 is measured on the middle line between two cells, where it equals d1, and carried 2 px to each side;
    further from that line the weight is 0, which covers the narrow gaps that matter completely.
    """
    background = (foreground_hw == 0).astype(np.uint8)
    if weight == 0 or not background.any() or not foreground_hw.any():
        return np.zeros(labels_hw.shape, np.float32)
    d1, nearest = cv2.distanceTransformWithLabels(background, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    # OpenCV numbers the zero pixels; each pixel holds its own number.
    owner_of = np.zeros(int(nearest.max()) + 1, np.int32)
    owner_of[nearest[background == 0]] = labels_hw[background == 0]
    owner = _as_float(owner_of[nearest])
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    middle = cv2.dilate(owner, cross) != cv2.erode(owner, cross)
    # On the line d1 is a pixel short of half the gap.
    half_gap = cv2.dilate(d1, np.ones((3, 3), np.uint8))
    peak = np.where(middle, np.exp(-((2 * half_gap) ** 2) / (2 * sigma_px**2)), 0).astype(np.float32)
    spread = cv2.dilate(peak, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    return np.asarray(weight * spread * background, np.float32)


def distance_target(foreground_hw: npt.NDArray[np.uint8], labels_hw: Labels) -> FloatMap:
    """Distance of each cell pixel to the edge of its cell over the largest such distance in it; float32 (H, W) in
    [0, 1], 0 in the background.

    Distances are relative to each cell's own maximum, as for StarDist's object probability (Schmidt et al. 2018): one
    seed threshold then means the same share of a small and of a large cell, at any magnification. ``foreground_hw`` is
    ``foreground_target(labels_hw)``, whose cells are separated, so one transform serves them all. The border of the
    array is not an edge: a cell cut by it continues outside, so pass labels wide enough to hold the tile's cells.
    """
    if not foreground_hw.any():
        return np.zeros(labels_hw.shape, np.float32)
    if foreground_hw.all():  # no edge: OpenCV would return a meaningless number
        return np.ones(labels_hw.shape, np.float32)
    distance = cv2.distanceTransform(foreground_hw, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    inside = foreground_hw > 0
    owner = labels_hw[inside]
    largest = np.zeros(int(owner.max()) + 1, np.float32)
    np.maximum.at(largest, owner, distance[inside])
    out = np.zeros(labels_hw.shape, np.float32)
    out[inside] = distance[inside] / largest[owner]
    return out


def surface_distance(mask_hw: npt.NDArray[np.uint8], clip_px: float) -> FloatMap:
    """Signed distance to the edge of ``mask_hw``: negative inside, positive outside, in units of ``clip_px``.

    Float32 (H, W) in [-1, 1]; phi_G of Kervadec et al. 2019 (boundary loss, eq. 5), measured from the line between
    pixels, and clipped. A band of four pixels has 2 px of inside but a whole tile of outside: without the clip the far
    background would dominate the loss. An empty (full) mask gives +1 (-1) everywhere.
    """
    inside = mask_hw > 0
    if inside.all() or not inside.any():
        return np.full(mask_hw.shape, -1 if inside.all() else 1, np.float32)
    within = inside.astype(np.uint8)
    away = cv2.distanceTransform(1 - within, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) - np.float32(0.5)
    deep = cv2.distanceTransform(within, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) - np.float32(0.5)
    return np.asarray(np.clip(np.where(inside, -deep, away) / np.float32(clip_px), -1, 1), np.float32)


def _as_float(labels_hw: Labels) -> FloatMap:
    # OpenCV's morphology does not support int32; float32 is exact to 2^24 cells.
    return labels_hw.astype(np.float32)
