"""Piles of overlapping cells with exact ground truth and real texture, made from the isolated cells of a training tile.

A smear is viewed in transmitted light, and light is absorbed: where two cells overlap, their transmittances
multiply, so their optical densities add up (Beer-Lambert). An isolated cell, divided by the background around it, is
therefore a transmittance that can be laid over any other cell of the same photograph. Both outlines are known, which
no annotation of a real pile can offer: annotators draw one object, or guess the hidden edge.

A label image holds one cell per pixel. Where cells overlap, each pixel goes to the cell with the smaller elliptic
distance: the overlap is cut along the chord through the two crossings of the outlines.

Pure functions of the tile and a numpy generator, like ``augment``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_train.config import OverlapConfig

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
FloatImage = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

UNTAUGHT = IGNORED - 1
"""Label of excluded cells (class ``ignore``): nothing is learned from them, not even that they are cells."""
NO_CELLS = (IGNORED, UNTAUGHT)
"""Labels that do not stand for a single cell."""
_RING_PX = 4  # background ring around a cell: must be free of other cells; the cell is divided by it
_SOLIDITY = 0.9  # area over convex hull area: below it, two cells under one label, or a ragged mask
_SIZES = (0.4, 2.0)  # relative to the median whole cell: smaller is a platelet or fragment, larger a heap or white cell
_LEFT_OF_CELL = 0.35  # visible share of a cell: with less, nobody could find the label
_TRIES = 4


@dataclass(frozen=True)
class Cutout:
    """An isolated cell. ``transmittance``: float32 (h, w, 3), 1 = background. ``mask``: bool (h, w), its label.

    Both have a frame of ``_RING_PX`` around the cell's bounding box. ``label``: label of the cell in its tile.
    """

    transmittance: FloatImage
    mask: Mask
    label: int = 0

    @property
    def diameter_px(self) -> float:
        """Diameter of the disc of equal area."""
        return math.sqrt(4 / math.pi * np.count_nonzero(self.mask))

    def turned(self, quarters: int, flip: bool) -> Cutout:
        """The cell rotated by ``quarters`` of 90 degrees, mirrored if ``flip``; no pixel is interpolated."""
        light, mask = np.rot90(self.transmittance, quarters), np.rot90(self.mask, quarters)
        return Cutout(light[:, ::-1], mask[:, ::-1], self.label) if flip else Cutout(light, mask, self.label)


@dataclass(frozen=True)
class _Ellipse:
    """Ellipse with the moments of a region; ``inverse``: inverse of its covariance, both in (y, x) px."""

    centre: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]

    @classmethod
    def of(cls, mask: Mask) -> _Ellipse:
        points = np.argwhere(mask).astype(np.float64)
        centre = points.mean(axis=0)
        spread = (points - centre).T @ (points - centre) / len(points) + np.eye(2) / 12  # variance of a pixel's square
        return cls(centre, np.linalg.inv(spread))

    def distance(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Elliptic distance of ``points`` (n, 2): 1 on the ellipse, 0 in its centre. Semi-axis: twice the deviation."""
        offset = points - self.centre
        return np.asarray(np.sqrt(np.einsum("ni,ij,nj->n", offset, self.inverse, offset)) / 2)


def add_piles(
    rng: np.random.Generator, tile_hwc: Image, labels_hw: Labels, config: OverlapConfig
) -> tuple[Image, Labels, dict[int, int]]:
    """Copies of ``tile_hwc`` (S, S, 3) and ``labels_hw`` (S, S) in which some whole cells became piles; and for each
    new label the label of the cell that it copies.

    Each whole cell becomes the bottom of a pile with probability ``config.share``; piles grow to ``config.most`` cells.
    Cells come from the tile itself, so that magnification, stain and focus match. Without an isolated cell, or with
    a share of 0, the arrays are returned unchanged.
    """
    if config.share == 0:
        return tile_hwc, labels_hw, {}
    donors = cutouts(tile_hwc, labels_hw)
    if not donors:
        return tile_hwc, labels_hw, {}
    pile = _Pile(tile_hwc.astype(np.float32), labels_hw.copy())
    for label in _whole_labels(labels_hw):
        if rng.random() >= config.share:
            continue
        bottom = pile.labels == label
        if not bottom.any():
            continue
        _grow(rng, pile, _Ellipse.of(bottom), math.sqrt(4 / math.pi * np.count_nonzero(bottom)), donors, config)
    return np.clip(pile.image + 0.5, 0, 255).astype(np.uint8), pile.labels, pile.copy_of


def cutouts(tile_hwc: Image, labels_hw: Labels) -> list[Cutout]:
    """The isolated, convex, whole cells of a tile, in the order of their labels."""
    whole = _whole_labels(labels_hw)
    if not whole:
        return []
    areas = np.bincount(labels_hw.ravel())
    median = float(np.median(areas[whole]))
    found = []
    height, width = labels_hw.shape
    for label in whole:
        if not _SIZES[0] * median <= areas[label] <= _SIZES[1] * median:
            continue
        x, y, w, h = cv2.boundingRect((labels_hw == label).astype(np.uint8))
        box = np.s_[
            max(y - _RING_PX, 0) : min(y + h + _RING_PX, height), max(x - _RING_PX, 0) : min(x + w + _RING_PX, width)
        ]
        mask = labels_hw[box] == label
        if mask.shape != (h + 2 * _RING_PX, w + 2 * _RING_PX) or not _is_convex(mask):
            continue
        around = _grown(mask, _RING_PX) & ~mask
        if labels_hw[box][around].any():
            continue
        background = np.median(tile_hwc[box][around & ~_grown(mask, 1)], axis=0)
        if background.min() < 1:
            continue
        found.append(Cutout((tile_hwc[box] / background).astype(np.float32), mask, label))
    return found


class _Pile:
    """A tile to which cells are added. ``image``: float32 (S, S, 3) in 0..255. ``labels``: int32 (S, S)."""

    def __init__(self, image: FloatImage, labels: Labels) -> None:
        self.image, self.labels = image, labels
        numbers, pixels = np.unique(labels, return_counts=True)
        self._whole_px = dict(zip(numbers.tolist(), pixels.tolist(), strict=True))  # before any cell was laid over them
        self.copy_of: dict[int, int] = {}

    def lay(self, cell: Cutout, centre_yx: npt.NDArray[np.float64]) -> _Ellipse | None:
        """Lay ``cell`` with its centre at ``centre_yx``; return None without changes if it would hide another cell or
        extend past the tile."""
        h, w = cell.mask.shape
        top, left = (round(float(c) - side / 2) for c, side in zip(centre_yx, (h, w), strict=True))
        if top < 0 or left < 0 or top + h > self.labels.shape[0] or left + w > self.labels.shape[1]:
            return None
        box = np.s_[top : top + h, left : left + w]
        own = _Ellipse.of(cell.mask)
        own = _Ellipse(own.centre + np.array([top, left]), own.inverse)
        mine = self._mine(cell.mask, box, own)
        if mine is None:
            return None
        label = max(self._whole_px) + 1
        while label in NO_CELLS:
            label += 1
        self.copy_of[label] = cell.label
        self._whole_px[label] = int(np.count_nonzero(cell.mask))
        self.labels[box][mine] = label
        # The rim of a mask is a pixel or two off the rim of the cell; fading out hides the seam.
        edge = cv2.GaussianBlur(_grown(cell.mask, 2).astype(np.float32), (0, 0), 0.8)[..., None]
        self.image[box] *= 1 + edge * (cell.transmittance - 1)
        return own

    def _mine(self, mask: Mask, box: tuple[slice, slice], own: _Ellipse) -> Mask | None:
        """Pixels of ``mask`` that the new cell gets, None if it or a cell below would no longer be visible."""
        below = np.where(mask, self.labels[box], 0)
        if np.isin(below, NO_CELLS).any():  # what lies there has no outline that could be cut
            return None
        mine = mask.copy()
        corner = (box[0].start, box[1].start)
        for label in np.unique(below[below > 0]).tolist():
            region = self.labels == label
            shared = below == label
            points = np.argwhere(shared).astype(np.float64) + np.array(corner, np.float64)
            lost = own.distance(points) < _Ellipse.of(region).distance(points)
            mine[shared] = lost
            left = region.copy()
            left[box][shared] = ~lost
            if np.count_nonzero(left) < _LEFT_OF_CELL * self._whole_px[label] or not _is_one_piece(left):
                return None
        if np.count_nonzero(mine) < _LEFT_OF_CELL * np.count_nonzero(mask) or not _is_one_piece(mine):
            return None
        return mine


def _grow(
    rng: np.random.Generator,
    pile: _Pile,
    bottom: _Ellipse,
    diameter_px: float,
    donors: list[Cutout],
    config: OverlapConfig,
) -> None:
    """Lay one to ``config.most - 1`` cells over ``bottom``: a heap, or a rouleau, whose cells follow one direction."""
    n_more = 1
    while n_more < config.most - 1 and rng.random() < config.further_p:
        n_more += 1
    is_rouleau = rng.random() < config.rouleau_p
    direction = rng.uniform(0, 2 * math.pi)
    donor = donors[int(rng.integers(len(donors)))]
    centre = bottom.centre
    for _ in range(n_more):
        for _ in range(_TRIES):
            angle = direction + (rng.normal(0, 0.15) if is_rouleau else 0.0)
            cell = donor.turned(int(rng.integers(4)), bool(rng.integers(2)))
            apart = rng.uniform(*config.distance) * (diameter_px + cell.diameter_px) / 2
            laid = pile.lay(cell, centre + apart * np.array([math.sin(angle), math.cos(angle)]))
            if laid is not None:
                centre, diameter_px = laid.centre, cell.diameter_px
                break
            if not is_rouleau:
                direction = rng.uniform(0, 2 * math.pi)
                donor = donors[int(rng.integers(len(donors)))]
        else:
            return
        if not is_rouleau:
            direction = rng.uniform(0, 2 * math.pi)
            donor = donors[int(rng.integers(len(donors)))]


def _whole_labels(labels_hw: Labels) -> list[int]:
    """Labels of cells that do not touch the border of the tile, ascending."""
    border = np.unique(np.concatenate([labels_hw[0], labels_hw[-1], labels_hw[:, 0], labels_hw[:, -1]]))
    return sorted(set(np.unique(labels_hw).tolist()) - {0, *NO_CELLS} - set(border.tolist()))


def _grown(mask: Mask, px: int) -> Mask:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * px + 1, 2 * px + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def _is_one_piece(mask: Mask) -> bool:
    return bool(cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] == 2)


def _is_convex(mask: Mask) -> bool:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:
        return False
    hull = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(contours[0]), 1)
    return bool(np.count_nonzero(mask) >= _SOLIDITY * np.count_nonzero(hull))
