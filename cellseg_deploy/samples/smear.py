"""One smear: cells laid on the slide from lowest to highest, their labels, and the photograph."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.samples import bodies
from cellseg_deploy.samples.layout import FloatArray, outlines, place_discs, random_outline
from cellseg_deploy.samples.optics import photograph, residue, smooth_noise
from cellseg_deploy.samples.params import SmearParams

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

MIN_VISIBLE = 0.4
"""Share of a cell's pixels in the frame that must stay visible under later cells."""

MIN_IN_FRAME = 0.15
"""Share of a cell's area that must be in the frame; otherwise the cell is not placed."""


@dataclass(frozen=True)
class Smear:
    """``image_hwc``: RGB uint8 (h, w, 3). ``labels_hw``: int32 (h, w), 0 background, 1..n in raster order.

    ``classes``: of the cells 1..n, ``red`` or ``white``.
    """

    image_hwc: npt.NDArray[np.uint8]
    labels_hw: Labels
    classes: tuple[str, ...]

    @property
    def n_cells(self) -> int:
        """Number of labelled cells."""
        return int(self.labels_hw.max(initial=0))


def make_smear(params: SmearParams, seed: int) -> Smear:
    """Make the smear of ``params`` and ``seed``; deterministic.

    Every drawn cell is labelled, and every label is one 4-connected region of at least ``MIN_VISIBLE`` of the cell's
    pixels in the frame; of two overlapping cells the upper owns the overlap. Platelets and dirt are background.
    Layout, bodies and optics have separate random streams, so a change of stain or noise does not change the truth.
    """
    layout_rng, body_rng, dirt_rng, optics_rng = np.random.default_rng(seed).spawn(4)
    slide = Slide(params, body_rng)
    discs = place_discs(layout_rng, params)
    for disc, outline_px in zip(discs, outlines(layout_rng, params, discs), strict=True):
        slide.add_cell(disc.x, disc.y, outline_px, disc.kind)
    slide.add_background(dirt_rng)
    labels = raster_order(slide.labels)
    placed = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    placed[labels] = slide.labels  # the cells of 1..n, by their order on the slide
    classes = tuple(slide.classes[cell] for cell in placed[1:])
    return Smear(photograph(optics_rng, params, slide.density), labels, classes)


class Slide:
    """Density (h, w, 3) and labels (h, w), extended by each body."""

    def __init__(self, params: SmearParams, rng: np.random.Generator) -> None:
        self.params = params
        self.rng = rng
        self.density = np.zeros((*params.size_hw, 3), np.float32)
        self.labels: Labels = np.zeros(params.size_hw, np.int32)
        # Per label at placement: its pixels in the frame, and the window that holds them.
        self.areas = [0]
        self.windows = [(slice(0), slice(0))]
        self.classes = [""]
        side = int(5 * params.cell_diameter_px)
        self.grain = smooth_noise(rng, (side, side), max(2.0, 0.07 * params.cell_diameter_px))

    def add_cell(self, x: float, y: float, outline_px: FloatArray, kind: str) -> None:
        """Lay a cell on top, unless it would hide another cell or is itself too little visible."""
        cell = bodies.patch(x, y, outline_px, self.params.size_hw, margin_px=0.3 * float(outline_px.mean()))
        # One stream per cell: whether an earlier cell was placed must not change this one's appearance.
        (rng,) = self.rng.spawn(1)
        if cell is None:
            return
        mask: Mask = cell.rho <= cell.rim
        mask = _largest_region(mask)
        area = int(mask.sum())
        if area < MIN_IN_FRAME * np.pi * cell.radius**2 or self._hides_one(cell.window, mask):
            return
        self.areas.append(area)
        self.windows.append(cell.window)
        self.classes.append("white" if kind == "white" else "red")
        self.labels[cell.window][mask] = len(self.areas) - 1
        noise = self._noise(rng, cell.rho.shape)
        if kind == "white":
            layers = bodies.white_cell(rng, self.params, cell, noise)
        else:
            layers = bodies.red_cell(rng, self.params, cell, noise, crenated=kind == "crenated")
        below = self.density[cell.window]
        below *= 1 - (1 - np.float32(self.params.overlap_density)) * cell.alpha(self.params.edge_px)[..., None]
        self._add(cell, layers)

    def add_background(self, rng: np.random.Generator) -> None:
        """Add platelets, dirt and stain residue, which must not be counted."""
        params = self.params
        height, width = params.size_hw
        expected = params.n_cells * params.platelets_per_cell
        for _ in range(int(rng.poisson(expected))):
            radius = params.cell_diameter_px / 2 * rng.uniform(0.16, 0.36)
            outline = radius * random_outline(rng, 0.09, 0.2)
            body = bodies.patch(rng.uniform(0, width), rng.uniform(0, height), outline, params.size_hw, 0.4 * radius)
            if body is not None and not self.labels[body.window].any():
                self._add(body, bodies.platelet(rng, params, body, self._noise(rng, body.rho.shape)))
        specks = params.debris * 40 * height * width / (1200 * 1600) * (90 / params.cell_diameter_px) ** 2
        for _ in range(int(rng.poisson(specks))):
            radius = params.cell_diameter_px / 90 * np.clip(rng.lognormal(0.6, 0.5), 0.8, 9)
            outline = radius * random_outline(rng, 0.12, 0.4)
            body = bodies.patch(rng.uniform(0, width), rng.uniform(0, height), outline, params.size_hw, 6.0)
            if body is not None:
                self._add(body, bodies.speck(rng, params, body))
        if params.residue > 0:
            tint = np.array(params.nucleus_density, np.float32)
            self.density += residue(rng, params)[..., None] * tint

    def _add(self, body: bodies.Patch, layers: list[bodies.Layer]) -> None:
        colours = np.stack([layer.colour for layer in layers])
        self.density[body.window] += np.stack([layer.density_hw for layer in layers], axis=-1) @ colours

    def _noise(self, rng: np.random.Generator, shape_hw: tuple[int, ...]) -> bodies.Plane:
        top = int(rng.integers(self.grain.shape[0] - min(shape_hw[0], self.grain.shape[0]) + 1))
        left = int(rng.integers(self.grain.shape[1] - min(shape_hw[1], self.grain.shape[1]) + 1))
        return self.grain[top : top + shape_hw[0], left : left + shape_hw[1]]

    def _hides_one(self, window: tuple[slice, slice], mask: Mask) -> bool:
        """Return whether a cell on top with this mask would cut or hide an earlier cell."""
        before = self.labels[window].copy()
        beneath = np.flatnonzero(np.bincount(before[mask]))
        self.labels[window][mask] = 0
        hidden = any(self._is_hidden(label) for label in beneath[beneath > 0])
        self.labels[window] = before
        return hidden

    def _is_hidden(self, label: int) -> bool:
        """Return whether too little of a cell is visible, or its visible part is not connected."""
        seen: Mask = self.labels[self.windows[label]] == label
        visible = int(seen.sum())
        return visible < MIN_VISIBLE * self.areas[label] or int(_largest_region(seen).sum()) < visible


def raster_order(labels_hw: Labels) -> Labels:
    """Return the same regions numbered 1..n by their first pixel in raster order."""
    flat = labels_hw.ravel()
    backwards = np.flatnonzero(flat)[::-1]
    first = np.full(int(labels_hw.max(initial=0)) + 1, flat.size)
    first[flat[backwards]] = backwards  # of several assignments to one index the last wins: the first pixel
    order = np.argsort(first, kind="stable")[: np.count_nonzero(first < flat.size)]
    table = np.zeros(len(first), np.int32)
    table[order] = np.arange(1, len(order) + 1)
    return np.asarray(table[labels_hw])


def _largest_region(mask: Mask) -> Mask:
    """Return the largest 4-connected region of ``mask``."""
    count, regions = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    if count <= 2:
        return mask
    sizes = np.bincount(regions.ravel())
    return np.asarray(regions == 1 + int(np.argmax(sizes[1:])))
