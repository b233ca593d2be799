"""Statistics of a set of images: size, magnification clues, cells, crowding, light and stain.

Cells are those of the masks if there are any, otherwise those that the model finds. A photograph does not state its
magnification; the clues are cell size, a scale bar, and the pixel size that some programs write into the file.
Whether a model was trained on similar images: ``training_match``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.field_of_view import find_field, without_surround
from cellseg_deploy.cells.measure import boxes
from cellseg_deploy.cells.stain import colours, negative_note
from cellseg_deploy.images.resolution import Resolution

NEIGHBOUR_PX = 10
_BAR_MIN_WIDTH, _BAR_MAX_HEIGHT, _BAR_MIN_ASPECT, _BAR_MIN_FILL = 0.04, 0.03, 5.0, 0.95
_BAR_CONTRAST = 10  # grey levels around pure black or white within which a drawn bar stays, including JPEG error

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ImageFacts:
    """One image. ``areas_px``: its cells, except those at the border (their size is unknown).

    ``crowded``: cells with another cell within ``NEIGHBOUR_PX``; ``n_cells``: all. ``scale_bar``: left, top, width,
    height in px, None if none is found. ``colours``: of ``stain.colours``. ``resolution``: as stated by the file.
    ``negative``: result of ``stain.negative_note``.
    """

    name: str
    width_px: int
    height_px: int
    n_cells: int
    crowded: int
    areas_px: npt.NDArray[np.float64]
    covered: float
    scale_bar: tuple[int, int, int, int] | None
    colours: dict[str, float] = field(default_factory=dict)
    resolution: tuple[Resolution, ...] = ()
    negative: str = ""

    @property
    def diameters_px(self) -> npt.NDArray[np.float64]:
        """Diameter of the disc with each cell's area."""
        return np.sqrt(4 * self.areas_px / math.pi)

    @property
    def median_diameter_px(self) -> float | None:
        """Median of ``diameters_px``, None without a whole cell."""
        return float(np.median(self.diameters_px)) if len(self.areas_px) else None

    @property
    def crowded_share(self) -> float | None:
        """Share of cells with another cell within ``NEIGHBOUR_PX``; None without cells."""
        return self.crowded / self.n_cells if self.n_cells else None


def look_at(
    name: str, image_hwc: Image, labels: Labels, *, min_area_px: int, resolution: tuple[Resolution, ...] = ()
) -> ImageFacts:
    """Compute facts of a photograph, uint8 RGB (h, w, 3), with the cells ``labels`` (h, w); smaller ones are specks."""
    area = np.bincount(labels.reshape(-1))
    area[0] = 0
    numbers = np.flatnonzero(area >= min_area_px)
    kept = np.where(np.isin(labels, numbers), labels, 0)
    cell_boxes = boxes(kept, numbers)
    left, top, width, height = cell_boxes.T
    whole = (left > 0) & (top > 0) & (left + width < labels.shape[1]) & (top + height < labels.shape[0])
    inside = kept > 0
    field = find_field(image_hwc)
    shown = image_hwc if field is None else without_surround(image_hwc, field)
    return ImageFacts(
        name=name,
        width_px=labels.shape[1],
        height_px=labels.shape[0],
        n_cells=len(numbers),
        crowded=int(near_another(kept, numbers, cell_boxes, NEIGHBOUR_PX).sum()),
        areas_px=area[numbers[whole]].astype(np.float64),
        covered=float(inside.mean()),
        scale_bar=find_scale_bar(image_hwc),
        colours=colours(shown, inside),
        resolution=resolution,
        negative=negative_note(shown, inside),
    )


def near_another(
    labels: Labels, numbers: npt.NDArray[np.int64], cell_boxes: npt.NDArray[np.int64], distance_px: int
) -> npt.NDArray[np.bool_]:
    """Return whether a pixel of another cell is within ``distance_px`` (centre to centre) of each cell, bool (n,)."""
    import cv2

    y, x = np.mgrid[-distance_px : distance_px + 1, -distance_px : distance_px + 1]
    disc = (x * x + y * y <= distance_px * distance_px).astype(np.uint8)
    result = np.zeros(len(numbers), np.bool_)
    for index, (number, (left, top, width, height)) in enumerate(zip(numbers, cell_boxes, strict=True)):
        window = labels[
            max(top - distance_px, 0) : top + height + distance_px,
            max(left - distance_px, 0) : left + width + distance_px,
        ]
        around = cv2.dilate((window == number).astype(np.uint8), disc) > 0
        result[index] = bool((around & (window > 0) & (window != number)).any())
    return result


def find_scale_bar(image_hwc: Image) -> tuple[int, int, int, int] | None:
    """Return left, top, width, height of a drawn bar: an almost black or white, solid, flat rectangle; None if absent.

    A clue, not a proof: no number is read. The widest candidate is returned.
    """
    import cv2

    height, width = image_hwc.shape[:2]
    best: tuple[int, int, int, int] | None = None
    red, green, blue = cv2.split(image_hwc)
    brightest, darkest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    for drawn in (brightest <= _BAR_CONTRAST, darkest >= 255 - _BAR_CONTRAST):
        _, _, stats, _ = cv2.connectedComponentsWithStats(drawn.astype(np.uint8), connectivity=4)
        for left, top, w, h, area in stats[1:].tolist():
            flat = w >= _BAR_MIN_WIDTH * width and 2 <= h <= _BAR_MAX_HEIGHT * height and w >= _BAR_MIN_ASPECT * h
            # A saturated edge row of the camera spans the picture; a bar is inside it.
            apart = left > 0 and left + w < width and top > 0 and top + h < height
            if flat and apart and area >= _BAR_MIN_FILL * w * h and (best is None or w > best[2]):
                best = (left, top, w, h)
    return best


@dataclass(frozen=True)
class DataFacts:
    """Facts of all images together; lengths in px of the images, None if nothing could be measured.

    ``resolutions``: tag -> number of images whose file states it. ``um_per_px``: width of a pixel in micrometres, if
    every file states the same one.
    """

    n_images: int
    n_cells: int
    sizes: dict[str, int]
    cells_per_image: float
    covered: float
    area_quantiles_px: dict[str, float] | None
    median_diameter_px: float | None
    diameter_iqr_px: tuple[float, float] | None
    crowded_share: float | None
    scale_bars: int
    resolutions: dict[str, int]
    um_per_px: float | None


def summarise(images: Sequence[ImageFacts]) -> DataFacts:
    """Pool the facts of images: cells of all images form one population. ``images`` must not be empty."""
    areas = np.concatenate([image.areas_px for image in images])
    diameters = np.sqrt(4 * areas / math.pi)
    n_cells = sum(image.n_cells for image in images)
    sizes: dict[str, int] = {}
    for image in images:
        key = f"{image.width_px}x{image.height_px}"
        sizes[key] = sizes.get(key, 0) + 1
    tags = [str(tag) for image in images for tag in image.resolution]
    pixels = np.array([image.width_px * image.height_px for image in images])
    return DataFacts(
        n_images=len(images),
        n_cells=n_cells,
        sizes=sizes,
        cells_per_image=n_cells / len(images),
        covered=float(np.average([image.covered for image in images], weights=pixels)),
        area_quantiles_px={str(q): float(np.quantile(areas, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        if len(areas)
        else None,
        median_diameter_px=float(np.median(diameters)) if len(areas) else None,
        diameter_iqr_px=(float(np.quantile(diameters, 0.25)), float(np.quantile(diameters, 0.75)))
        if len(areas)
        else None,
        crowded_share=sum(image.crowded for image in images) / n_cells if n_cells else None,
        scale_bars=sum(image.scale_bar is not None for image in images),
        resolutions={tag: tags.count(tag) for tag in sorted(set(tags))},
        um_per_px=_one_pixel_size(images),
    )


def _one_pixel_size(images: Sequence[ImageFacts]) -> float | None:
    sizes = [next((tag.um_per_px[0] for tag in image.resolution if not tag.is_of_print), None) for image in images]
    known = [size for size in sizes if size is not None]
    return known[0] if len(known) == len(sizes) and max(known) <= 1.01 * min(known) else None
