"""Appearance of a synthetic smear: ``SmearParams``, and ``random_params``, which draws a random laboratory.

Colours are optical densities, because stain absorbs: a cell of density ``d`` in a channel lets ``10 ** -d`` of the
light through (Beer-Lambert), and two overlapping cells add their densities. The stains and backgrounds below span
those of published smears: Giemsa, Wright and Leishman, blue-grey over violet to orange-red, pale to dark.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

Rgb = tuple[float, float, float]

RED_CELL_DIAMETER_UM = 7.5
"""Mean diameter of a human red cell on a dried smear; sets the length of the scale bar."""

STAINS: dict[str, tuple[Rgb, Rgb]] = {
    # name: (optical density of a red cell, of a white cell's nucleus)
    "giemsa-blue-grey": ((0.46, 0.42, 0.24), (0.75, 0.95, 0.40)),
    "giemsa-navy": ((0.62, 0.57, 0.35), (0.70, 1.00, 0.40)),
    "giemsa-violet": ((0.42, 0.48, 0.23), (0.70, 1.00, 0.35)),
    "giemsa-lilac": ((0.22, 0.28, 0.09), (0.55, 0.95, 0.25)),
    "giemsa-plum": ((0.40, 0.72, 0.44), (0.75, 1.10, 0.60)),
    "wright-pink": ((0.06, 0.22, 0.15), (0.65, 0.90, 0.30)),
    "wright-rose": ((0.11, 0.30, 0.19), (0.65, 0.85, 0.30)),
    "leishman-salmon": ((0.05, 0.22, 0.25), (0.60, 0.85, 0.25)),
    "eosin-red": ((0.07, 0.32, 0.27), (0.60, 0.80, 0.30)),
    "eosin-brown": ((0.14, 0.30, 0.38), (0.60, 0.75, 0.45)),
    "pale-grey": ((0.15, 0.14, 0.12), (0.40, 0.60, 0.30)),
    "pale-green": ((0.13, 0.10, 0.085), (0.35, 0.60, 0.25)),
}

BACKGROUNDS: dict[str, Rgb] = {
    "white": (253.0, 253.0, 253.0),
    "off-white": (230.0, 231.0, 230.0),
    "yellowish": (240.0, 237.0, 216.0),
    "greenish": (226.0, 233.0, 221.0),
    "pinkish": (244.0, 229.0, 231.0),
    "bluish": (214.0, 220.0, 229.0),
    "warm": (216.0, 206.0, 190.0),
    "grey": (151.0, 150.0, 143.0),
}

_SHARES = (
    "clustering",
    "overlap",
    "rouleaux",
    "pallor_share",
    "crenated_share",
    "teardrop_share",
    "target_share",
    "white_cell_share",
    "parasite_share",
    "overlap_density",
)
_NOT_NEGATIVE = (
    "n_cells",
    "diameter_spread",
    "elongation",
    "irregularity",
    "contact_gap_px",
    "pallor",
    "rim",
    "halo",
    "edge_px",
    "texture",
    "platelets_per_cell",
    "debris",
    "residue",
    "gradient",
    "vignette",
    "blur_px",
    "noise",
    "sharpen",
)


@dataclass(frozen=True, kw_only=True)
class SmearParams:
    """One laboratory, slide and camera. Lengths in image px; shares in [0, 1]; densities are optical (log10).

    Layout: ``size_hw``; ``n_cells`` requested (fewer if the field is full); ``cell_diameter_px`` median and
    ``diameter_spread`` (standard deviation of its logarithm); ``clustering``: share of cells that join another;
    ``overlap``: share of those that lie over the other, the rest press against it with a gap of ``contact_gap_px``;
    ``rouleaux``: share of overlapping cells that extend a chain.
    Form: ``elongation`` and ``irregularity`` (spreads); ``crenated_share``, ``teardrop_share``, ``target_share``.
    Density across a cell: ``pallor`` (depth of the pale centre, 0 none, 1 as pale as the background), its
    ``pallor_share`` and ``pallor_size`` (of the radius); ``rim`` (darker edge); ``halo`` (bright fringe outside it);
    ``edge_px`` (softness); ``texture``; ``overlap_density``: share of the lower cell's density that adds to the upper.
    Other things: ``white_cell_share`` (cells, counted), ``parasite_share``, ``platelets_per_cell`` and ``debris``
    (background, not counted; debris 1 is a dirty slide).
    Picture: ``cell_density`` and ``nucleus_density`` (RGB); ``background`` (RGB, 0..255); ``residue`` (stain left
    between cells); ``gradient`` and ``vignette`` (loss of light at the edge, share); ``blur_px``; ``noise`` (standard
    deviation in grey levels); ``sharpen``; ``jpeg_quality`` (0: not compressed); ``scale_bar``.
    """

    size_hw: tuple[int, int] = (1200, 1600)
    n_cells: int = 90
    cell_diameter_px: float = 90.0
    diameter_spread: float = 0.07
    clustering: float = 0.5
    overlap: float = 0.3
    rouleaux: float = 0.1
    contact_gap_px: float = 1.5
    elongation: float = 0.10
    irregularity: float = 0.03
    crenated_share: float = 0.03
    teardrop_share: float = 0.02
    target_share: float = 0.03
    pallor: float = 0.5
    pallor_share: float = 0.8
    pallor_size: float = 0.45
    rim: float = 0.12
    halo: float = 0.03
    edge_px: float = 1.2
    texture: float = 0.05
    overlap_density: float = 0.9
    white_cell_share: float = 0.01
    parasite_share: float = 0.03
    platelets_per_cell: float = 0.05
    debris: float = 0.3
    cell_density: Rgb = STAINS["giemsa-violet"][0]
    nucleus_density: Rgb = STAINS["giemsa-violet"][1]
    background: Rgb = BACKGROUNDS["off-white"]
    residue: float = 0.02
    gradient: float = 0.04
    vignette: float = 0.06
    blur_px: float = 0.8
    noise: float = 1.3
    sharpen: float = 0.3
    jpeg_quality: int = 0
    scale_bar: bool = False

    def __post_init__(self) -> None:
        """Raise ``UsageError`` naming each invalid value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [f"{name} must be in [0, 1], got {values[name]}" for name in _SHARES if not 0 <= values[name] <= 1]
        wrong += [f"{name} must be at least 0, got {values[name]}" for name in _NOT_NEGATIVE if not values[name] >= 0]
        if min(self.size_hw) < 1:
            wrong.append(f"size_hw must be positive, got {self.size_hw}")
        if not self.cell_diameter_px >= 12:
            wrong.append(
                f"cell_diameter_px must be at least 12 (smaller cells have no visible shape), got "
                f"{self.cell_diameter_px}"
            )
        if self.n_cells > 65535:
            wrong.append(f"n_cells must be at most 65535 (labels are stored in 16 bits), got {self.n_cells}")
        if not 0.05 <= self.pallor_size <= 1:
            wrong.append(f"pallor_size must be in [0.05, 1], got {self.pallor_size}")
        if not 0 <= self.jpeg_quality <= 100:
            wrong.append(f"jpeg_quality must be 0 (none) to 100, got {self.jpeg_quality}")
        for name in ("cell_density", "nucleus_density", "background"):
            if len(values[name]) != 3 or not all(0 <= value < 256 for value in values[name]):
                wrong.append(f"{name} must be three numbers in [0, 255], got {values[name]}")
        if wrong:
            raise UsageError(f"cannot make such a smear: {'; '.join(wrong)}")


def random_params(
    rng: np.random.Generator,
    *,
    size_hw: tuple[int, int] = (1200, 1600),
    cell_diameter_px: float | None = None,
) -> SmearParams:
    """Draw a random laboratory: stain, camera, cell density and health of the blood.

    ``cell_diameter_px`` fixes the median diameter; by default it is drawn around 90 px (70 to 115). Optical lengths
    (gap, edge, blur) grow with the cells, as they do with magnification. The draw depends on ``rng`` alone, not on the
    size, except ``n_cells``, which follows the size.
    """
    diameter = float(rng.uniform(70, 115)) if cell_diameter_px is None else cell_diameter_px
    zoom = diameter / 90.0
    cover = float(rng.triangular(0.05, 0.25, 0.55))
    cell_density, nucleus_density = _stain(rng)

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def either(usual: tuple[float, float], rare: tuple[float, float], share: float) -> float:
        return between(*(rare if rng.random() < share else usual))

    def sometimes(share: float, low: float, high: float) -> float:
        return either((0.0, 0.0), (low, high), share)

    return SmearParams(
        size_hw=size_hw,
        n_cells=max(1, round(cover * size_hw[0] * size_hw[1] / (np.pi / 4 * diameter**2))),
        cell_diameter_px=diameter,
        diameter_spread=between(0.03, 0.14),
        clustering=between(0.1, 0.85),
        overlap=between(0.05, 0.6),
        rouleaux=sometimes(0.25, 0.2, 0.7),
        contact_gap_px=between(0.5, 3.0) * zoom,
        elongation=float(rng.triangular(0.03, 0.07, 0.22)),
        irregularity=float(rng.triangular(0.005, 0.012, 0.045)),
        crenated_share=either((0.0, 0.08), (0.3, 0.9), 0.2),  # rare: a slide that dried badly
        teardrop_share=either((0.0, 0.02), (0.02, 0.1), 0.3),
        target_share=sometimes(0.5, 0.0, 0.25),
        pallor=either((0.0, 0.6), (0.6, 0.95), 0.35),
        pallor_share=between(0.5, 1.0),
        pallor_size=between(0.35, 0.72),
        rim=between(0.0, 0.35),
        halo=float(rng.triangular(0.0, 0.01, 0.07)),
        edge_px=between(0.8, 2.2) * zoom,
        texture=between(0.01, 0.12),
        overlap_density=between(0.55, 1.0),
        white_cell_share=sometimes(0.5, 0.0, 0.03),
        parasite_share=sometimes(0.5, 0.0, 0.15),
        platelets_per_cell=sometimes(0.5, 0.0, 0.25),
        debris=between(0.0, 1.0),
        cell_density=cell_density,
        nucleus_density=nucleus_density,
        background=_background(rng),
        residue=either((0.0, 0.03), (0.03, 0.08), 0.15),
        gradient=between(0.0, 0.15),
        vignette=either((0.0, 0.1), (0.1, 0.35), 0.2),
        blur_px=either((0.5, 1.5), (1.6, 3.2), 0.2) * zoom,
        noise=between(0.3, 3.0),
        sharpen=sometimes(0.5, 0.1, 0.8),
        jpeg_quality=int(sometimes(0.5, 60, 96)),
        scale_bar=bool(rng.random() < 0.25),
    )


def _stain(rng: np.random.Generator) -> tuple[Rgb, Rgb]:
    """Draw one of ``STAINS``, jittered in hue and darkness."""
    names = sorted(STAINS)
    cell, nucleus = STAINS[names[int(rng.integers(len(names)))]]
    darkness = np.clip(rng.lognormal(0.0, 0.25), 0.55, 1.6)
    hue = rng.lognormal(0.0, 0.1, size=3)
    return _rgb(np.array(cell) * hue * darkness), _rgb(np.array(nucleus) * hue * np.sqrt(darkness))


def _background(rng: np.random.Generator) -> Rgb:
    """Draw one of ``BACKGROUNDS``, jittered in brightness and tint."""
    names = sorted(BACKGROUNDS)
    base = np.array(BACKGROUNDS[names[int(rng.integers(len(names)))]])
    return _rgb(np.clip(base * rng.uniform(0.94, 1.02) * rng.normal(1.0, 0.008, size=3), 0, 255))


def _rgb(values: npt.NDArray[np.float64]) -> Rgb:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
