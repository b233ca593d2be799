"""Positions and outlines of cells: discs first, then outlines in polar form.

An outline is a table of radii, one per angle. So a cell's inside, its rim and its distance from the rim are a
comparison of two numbers per pixel, and pressing two cells together is a minimum: each is cut at the line of equal
power of the two discs, which is between them whatever their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.samples.params import SmearParams

FloatArray = npt.NDArray[np.float64]
Kind = Literal["red", "crenated", "teardrop", "white"]

N_ANGLES = 1024
ANGLES: FloatArray = np.linspace(0, 2 * np.pi, N_ANGLES, endpoint=False)

_TRIES = 25  # positions tried for one cell before the field counts as full
_PRESSED = (0.88, 1.0)  # distance of two pressed cells, in sums of their radii
_OVERLAPPING = (0.45, 0.85)
_NEAREST = 0.80  # closest distance of cells that do not overlap on purpose
_SOFTNESS = 18  # exponent of the soft minimum: rounds the corners of a pressed cell


@dataclass(frozen=True)
class Disc:
    """A cell before it has an outline: centre (x, y) and radius in px, and the indices of the discs it lies over."""

    x: float
    y: float
    radius: float
    kind: Kind
    over: frozenset[int]


def place_discs(rng: np.random.Generator, params: SmearParams) -> list[Disc]:
    """Place up to ``params.n_cells`` discs, some joined to an earlier one, the lowest first."""
    discs: list[Disc] = []
    centres = np.empty((params.n_cells, 2))
    radii = np.empty(params.n_cells)
    heading = rng.uniform(0, 2 * np.pi, size=params.n_cells)  # of the chain (rouleau) that a cell may belong to
    for _ in range(params.n_cells):
        n = len(discs)
        kind = _draw_kind(rng, params)
        radius = params.cell_diameter_px / 2 * rng.lognormal(0.0, params.diameter_spread)
        radius *= rng.uniform(1.35, 1.9) if kind == "white" else 1.0
        joins = n > 0 and rng.random() < params.clustering
        overlaps = joins and kind != "white" and rng.random() < params.overlap
        for _try in range(_TRIES):
            partner = int(rng.integers(n)) if joins else -1
            if joins:
                chained = overlaps and rng.random() < params.rouleaux
                angle = heading[partner] + rng.normal(0, 0.15) if chained else rng.uniform(0, 2 * np.pi)
                low, high = _OVERLAPPING if overlaps else _PRESSED
                distance = (radius + radii[partner]) * rng.uniform(low, high)
                place = centres[partner] + distance * np.array([np.cos(angle), np.sin(angle)])
            else:
                height, width = params.size_hw
                angle = heading[n]
                place = rng.uniform([-0.4 * radius, -0.4 * radius], [width + 0.4 * radius, height + 0.4 * radius])
            if not _in_reach(place, radius, params.size_hw):
                continue
            gaps = np.hypot(*(centres[:n] - place).T) / (radii[:n] + radius)
            over = frozenset({partner}) if overlaps else frozenset[int]()
            others = np.delete(gaps, partner) if joins else gaps
            if others.size and others.min() < (_NEAREST if joins else 1.04):
                continue
            centres[n], radii[n], heading[n] = place, radius, angle
            discs.append(Disc(float(place[0]), float(place[1]), radius, kind, over))
            break
    return discs


def outlines(rng: np.random.Generator, params: SmearParams, discs: list[Disc]) -> list[FloatArray]:
    """Return the radius in px at each of ``ANGLES`` for every disc; only cells that overlap on purpose cross."""
    free = [disc.radius * _free_form(rng, params, disc.kind) for disc in discs]
    centres = np.array([(disc.x, disc.y) for disc in discs]).reshape(-1, 2)
    reach = np.array([form.max() for form in free])
    gap = params.contact_gap_px / 2 * rng.lognormal(0.0, 0.35, size=len(discs))
    pressed = []
    for i, disc in enumerate(discs):
        offsets = centres - centres[i]
        distances = np.hypot(offsets[:, 0], offsets[:, 1])
        form = free[i]
        for j in np.flatnonzero(distances < reach + reach[i]):
            if j == i or j in disc.over or i in discs[j].over:
                continue
            # The line of equal power of both discs, seen from this centre.
            line = (distances[j] ** 2 + disc.radius**2 - discs[j].radius ** 2) / (2 * distances[j])
            towards = np.cos(ANGLES - np.arctan2(offsets[j, 1], offsets[j, 0]))
            limit = max(line - max(gap[i], gap[j]), 0.2 * disc.radius) / np.maximum(towards, 1e-3)
            form = _soft_minimum(form, limit)
        pressed.append(form)
    return pressed


def random_outline(rng: np.random.Generator, irregularity: float, elongation: float) -> FloatArray:
    """Return radii of a smooth closed shape with the area of the unit disc: an ellipse plus low Fourier orders."""
    axis_ratio = np.exp(abs(rng.normal(0.0, elongation)))
    tilt = rng.uniform(0, 2 * np.pi)
    form: FloatArray = 1 / np.sqrt(np.cos(ANGLES - tilt) ** 2 / axis_ratio + np.sin(ANGLES - tilt) ** 2 * axis_ratio)
    for order in range(3, 8):
        amplitude = rng.normal(0.0, irregularity) * (3 / order) ** 2
        form = form * (1 + amplitude * np.cos(order * ANGLES + rng.uniform(0, 2 * np.pi)))
    return _unit_area(form)


def _free_form(rng: np.random.Generator, params: SmearParams, kind: Kind) -> FloatArray:
    if kind == "white":
        return random_outline(rng, 0.02, 0.06)
    form = random_outline(rng, params.irregularity, params.elongation)
    if kind == "crenated":
        return _unit_area(form * _spikes(rng))
    if kind == "teardrop":
        away = _turn(ANGLES - rng.uniform(0, 2 * np.pi))
        tail = rng.uniform(0.15, 0.75) * np.exp(-(np.abs(away / rng.uniform(0.22, 0.4)) ** 1.4))
        return _unit_area(form * (1 + tail))
    return form


def _spikes(rng: np.random.Generator) -> FloatArray:
    """Return crenation: 9 to 24 blunt spikes of uneven height around the rim (an echinocyte)."""
    count = int(rng.integers(9, 25))
    centres = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (2 * np.pi / count)
    heights = rng.uniform(0.35, 1.0, count) * rng.uniform(0.05, 0.15)
    width = np.pi / count * rng.uniform(0.35, 0.6)
    bumps = heights * np.exp(-((np.abs(_turn(ANGLES[:, None] - centres)) / width) ** 1.5))
    return np.asarray(1 + bumps.sum(axis=1))


def _draw_kind(rng: np.random.Generator, params: SmearParams) -> Kind:
    draw = rng.random()
    kinds: tuple[tuple[Kind, float], ...] = (
        ("white", params.white_cell_share),
        ("crenated", params.crenated_share),
        ("teardrop", params.teardrop_share),
    )
    for kind, share in kinds:
        if draw < share:
            return kind
        draw -= share
    return "red"


def _in_reach(place: FloatArray, radius: float, size_hw: tuple[int, int]) -> bool:
    """Return whether a good part of the disc is in the frame."""
    height, width = size_hw
    inside = 0.5 * radius
    return bool(-inside < place[0] < width + inside and -inside < place[1] < height + inside)


def _soft_minimum(a: FloatArray, b: FloatArray) -> FloatArray:
    lower = np.minimum(a, b)
    ratio = lower / np.maximum(a, b)
    return np.asarray(lower * (1 + ratio**_SOFTNESS) ** (-1 / _SOFTNESS))


def _turn(angles: FloatArray) -> FloatArray:
    """Return the same angles in [-pi, pi)."""
    return np.asarray((angles + np.pi) % (2 * np.pi) - np.pi)


def _unit_area(form: FloatArray) -> FloatArray:
    """Scale radii so that the enclosed area, the mean of r^2 times pi, is that of the unit disc."""
    return np.asarray(form / np.sqrt(np.mean(form**2)))
