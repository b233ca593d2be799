"""Bodies that absorb light: red cells, white cells, parasites, platelets and dirt, as layers of optical density.

Each painter takes a ``Patch``, the pixels around one body in polar form, and returns ``Layer``s: a density (h, w)
times an RGB colour. This module does not handle labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.samples.layout import N_ANGLES, FloatArray
from cellseg_deploy.samples.params import SmearParams

Plane = npt.NDArray[np.float32]


class Layer(NamedTuple):
    """Optical density (h, w) float32 of one dye in a patch, and the dye's RGB density at 1."""

    density_hw: Plane
    colour: Plane


@dataclass(frozen=True)
class Patch:
    """The frame's pixels around one body: ``window`` into the frame, all arrays (h, w) float32 in px.

    ``dx``, ``dy``: offset from the centre; ``rho``: distance from it; ``rim``: the outline's radius in that direction.
    ``radius``: of the disc of equal area.
    """

    window: tuple[slice, slice]
    dx: Plane
    dy: Plane
    rho: Plane
    rim: Plane
    radius: float

    @property
    def depth(self) -> Plane:
        """Distance inwards from the outline along the ray from the centre; negative outside."""
        return self.rim - self.rho

    def alpha(self, softness_px: float) -> Plane:
        """Coverage in [0, 1]: 1 inside, 0 outside, 0.5 on the outline, smooth over ``softness_px``."""
        return smooth_step(self.depth / max(softness_px, 0.7) + 0.5)


def patch(x: float, y: float, outline_px: FloatArray, size_hw: tuple[int, int], margin_px: float) -> Patch | None:
    """Return the pixels within ``margin_px`` of an outline around (x, y), or None if none are in the frame."""
    reach = float(outline_px.max()) + margin_px
    top, bottom = max(0, int(y - reach)), min(size_hw[0], int(y + reach) + 2)
    left, right = max(0, int(x - reach)), min(size_hw[1], int(x + reach) + 2)
    if top >= bottom or left >= right:
        return None
    dx, dy = np.meshgrid(
        np.arange(left, right, dtype=np.float32) - np.float32(x),
        np.arange(top, bottom, dtype=np.float32) - np.float32(y),
    )
    rho, angle = cv2.cartToPolar(dx, dy)
    index = (angle * np.float32(N_ANGLES / (2 * np.pi)) + np.float32(0.5)).astype(np.int32) % N_ANGLES
    rim = outline_px.astype(np.float32)[index]
    radius = float(np.sqrt(np.mean(outline_px**2)))
    return Patch((slice(top, bottom), slice(left, right)), dx, dy, rho, rim, radius)


def red_cell(
    rng: np.random.Generator, params: SmearParams, cell: Patch, noise_hw: Plane, *, crenated: bool
) -> list[Layer]:
    """Paint a red cell: a disc thinner in the middle, with a rim, a fringe, grain and sometimes a parasite."""
    softness = params.edge_px * rng.lognormal(0.0, 0.25)
    inside = cell.alpha(softness)
    thickness = np.float32(rng.lognormal(0.0, 0.10)) * np.ones_like(cell.rho)
    thickness *= 1 - _pallor(rng, params, cell)
    edge_width = np.float32(0.10 * cell.radius)
    thickness += np.float32(params.rim * rng.uniform(0.5, 1.5)) * np.exp(-((cell.depth / edge_width) ** 2))
    slope = rng.normal(0.0, 0.05, size=2) / cell.radius
    thickness *= 1 + np.float32(slope[0]) * cell.dx + np.float32(slope[1]) * cell.dy
    thickness *= 1 + np.float32(params.texture) * noise_hw
    if crenated:  # spikes seen from above are dark spots
        thickness *= 1 + np.float32(rng.uniform(0.1, 0.3)) * np.clip(noise_hw, 0, 2)
    colour = _colour(rng, params.cell_density, 0.02)
    layers = [Layer(np.maximum(thickness, 0) * inside, colour)]
    if params.halo > 0:
        layers.append(Layer(_fringe(rng, params, cell), np.ones(3, np.float32)))
    if rng.random() < params.parasite_share:
        layers.append(_parasite(rng, params, cell, inside))
    return layers


def white_cell(rng: np.random.Generator, params: SmearParams, cell: Patch, noise_hw: Plane) -> list[Layer]:
    """Paint a white cell: pale granular cytoplasm around a dark nucleus of one to five lobes."""
    inside = cell.alpha(params.edge_px * 1.3)
    lobes = int(rng.choice([1, 2, 3, 4, 5], p=[0.35, 0.15, 0.2, 0.2, 0.1]))
    nucleus = _nucleus(rng, cell, lobes) * inside
    pink = np.array([0.3, 0.7, 0.35]) if lobes > 1 and rng.random() < 0.6 else np.array([0.5, 0.55, 0.22])
    granules = 1 + np.float32(rng.uniform(0.05, 0.25)) * noise_hw
    cytoplasm = inside * granules * np.float32(rng.uniform(0.15, 0.45))
    chromatin = (
        nucleus * (1 + np.float32(0.12) * cv2.GaussianBlur(noise_hw, (0, 0), 1.5)) * np.float32(rng.uniform(0.8, 1.1))
    )
    return [
        Layer(np.maximum(cytoplasm, 0), _colour(rng, (pink[0], pink[1], pink[2]), 0.15)),
        Layer(np.maximum(chromatin, 0), _colour(rng, params.nucleus_density, 0.08)),
    ]


def platelet(rng: np.random.Generator, params: SmearParams, body: Patch, noise_hw: Plane) -> list[Layer]:
    """Paint a platelet: a violet granular fragment, paler towards its edge."""
    inside = body.alpha(0.35 * body.radius)
    core = np.exp(-((body.rho / (0.7 * body.rim)) ** 2)) * np.maximum(1 + np.float32(0.6) * noise_hw, 0)
    density = inside * (np.float32(0.18) + np.float32(rng.uniform(0.15, 0.6)) * core)
    red, green, blue = params.nucleus_density
    return [Layer(density, _colour(rng, (0.7 * red, green, 0.9 * blue), 0.1))]


def speck(rng: np.random.Generator, params: SmearParams, body: Patch) -> list[Layer]:
    """Paint dirt: a grain of precipitated stain, a dark dust grain, or a bright refracting one."""
    inside = body.alpha(rng.uniform(0.8, 3.0))
    draw = rng.random()
    if draw < 0.45:
        return [Layer(inside * np.float32(rng.uniform(0.1, 0.9)), _colour(rng, params.nucleus_density, 0.3))]
    if draw < 0.8:
        return [Layer(inside * np.float32(rng.uniform(0.05, 0.5)), np.ones(3, np.float32))]
    ring = np.exp(-((body.depth / np.float32(1.5)) ** 2)) * np.float32(0.12)
    return [Layer(ring - inside * np.float32(0.08), np.ones(3, np.float32))]


def smooth_step(values: Plane) -> Plane:
    """Return the cubic step from 0 at 0 to 1 at 1."""
    t = np.clip(values, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _pallor(rng: np.random.Generator, params: SmearParams, cell: Patch) -> Plane:
    """Return the missing share of thickness: the pale centre, sometimes a slit, sometimes with a dark middle."""
    if rng.random() > params.pallor_share or params.pallor == 0:
        return np.zeros_like(cell.rho)
    depth = np.clip(params.pallor * rng.lognormal(0.0, 0.3), 0, 0.97)
    size = params.pallor_size * rng.lognormal(0.0, 0.2) * cell.radius
    stretch = rng.uniform(1.6, 2.8) if rng.random() < 0.07 else np.exp(abs(rng.normal(0, 0.12)))
    tilt = rng.uniform(0, np.pi)
    shift = rng.normal(0, 0.07 * cell.radius, size=2)
    u = (cell.dx - np.float32(shift[0])) * np.float32(np.cos(tilt)) + (cell.dy - np.float32(shift[1])) * np.float32(
        np.sin(tilt)
    )
    v = (cell.dy - np.float32(shift[1])) * np.float32(np.cos(tilt)) - (cell.dx - np.float32(shift[0])) * np.float32(
        np.sin(tilt)
    )
    # Squared distance in units of the pallor, warped to follow the outline so that the pallor stays inside its cell.
    square = (u * u / np.float32(stretch) + v * v * np.float32(stretch)) / np.float32(size * size)
    square *= (np.float32(cell.radius) / cell.rim) ** 2
    pale = np.exp(-(square ** np.float32(rng.uniform(0.8, 2.2))))
    if rng.random() < params.target_share:
        pale -= np.float32(rng.uniform(0.5, 0.9)) * np.exp(-6 * square)
    return np.asarray(np.float32(depth) * pale)


def _fringe(rng: np.random.Generator, params: SmearParams, cell: Patch) -> Plane:
    """Return the bright line just outside the outline: light refracted outwards by the thick rim (negative density)."""
    width = np.float32(0.05 * cell.radius * rng.lognormal(0.0, 0.2))
    outside = -cell.depth
    line = np.exp(-(((outside - width) / width) ** 2)) * (outside > 0)
    return np.asarray(np.float32(-params.halo * rng.lognormal(0.0, 0.3)) * line)


def _parasite(rng: np.random.Generator, params: SmearParams, cell: Patch, inside: Plane) -> Layer:
    """Paint a malaria parasite or an inclusion: one to eight dots, a ring with a dot, or an irregular blot."""
    colour = _colour(rng, params.nucleus_density, 0.15)
    reach = 0.5 * cell.radius
    x, y = rng.uniform(-reach, reach, size=2)
    distance = np.hypot(cell.dx - np.float32(x), cell.dy - np.float32(y))
    form = rng.choice(["dots", "ring", "blot"])
    if form == "ring":
        ring = np.float32(rng.uniform(0.15, 0.25) * cell.radius)
        density = 0.45 * np.exp(-(((distance - ring) / np.float32(0.05 * cell.radius)) ** 2))
        dot = np.hypot(cell.dx - np.float32(x) - ring, cell.dy - np.float32(y))
        density += 0.9 * np.exp(-((dot / np.float32(0.07 * cell.radius)) ** 2))
        return Layer(density * inside, colour)
    spread = (0.5 if form == "dots" else 0.22) * cell.radius
    grain = (0.05 if form == "dots" else 0.12) * cell.radius
    density = np.zeros_like(cell.rho)
    for _ in range(int(rng.integers(1, 9)) if form == "dots" else 7):
        dot_x, dot_y = np.array([x, y]) * (0.4 if form == "dots" else 1.0) + rng.normal(0, spread * 0.6, size=2)
        dot = np.hypot(cell.dx - np.float32(dot_x), cell.dy - np.float32(dot_y))
        size = np.float32(grain * rng.uniform(0.7, 1.6))
        density = np.maximum(density, np.float32(rng.uniform(0.4, 0.9)) * np.exp(-((dot / size) ** 4)))
    return Layer(density * inside, colour)


def _nucleus(rng: np.random.Generator, cell: Patch, lobes: int) -> Plane:
    """Return the coverage of a nucleus: soft balls along an arc, merged where they touch."""
    if lobes == 1:
        size = rng.uniform(0.6, 0.85) * cell.radius
        x, y = rng.normal(0, 0.08 * cell.radius, size=2)
        field = size / np.maximum(np.hypot(cell.dx - np.float32(x), cell.dy - np.float32(y)), 1)
        return smooth_step(np.asarray((field - 1) * 8 + 0.5, dtype=np.float32))
    size = rng.uniform(0.95, 1.15) * cell.radius * 0.62 / np.sqrt(lobes) ** 0.8
    start, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.3) * np.pi / lobes * 1.3
    field = np.zeros_like(cell.rho)
    for i in range(lobes):
        angle = start + i * turn + rng.normal(0, 0.1)
        x, y = 0.42 * cell.radius * np.cos(angle), 0.42 * cell.radius * np.sin(angle)
        square = (cell.dx - np.float32(x)) ** 2 + (cell.dy - np.float32(y)) ** 2
        field += np.exp(-square / np.float32((size * rng.uniform(0.85, 1.15)) ** 2))
    return smooth_step(np.asarray((field - np.exp(-1.0)) * 5 + 0.5, dtype=np.float32))


def _colour(rng: np.random.Generator, density: tuple[float, float, float], jitter: float) -> Plane:
    return np.asarray(np.array(density) * rng.lognormal(0.0, jitter, size=3), dtype=np.float32)
