"""Which images a person should look at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cellseg_deploy.cells import stain
from cellseg_deploy.models.spec import DATA_SUMMARY_VERSION, ModelSpec
from cellseg_deploy.report.results import ImageRow

MAX_Z = 3.5
"""Of a modified z-score, above which a value is an outlier: Iglewicz and Hoaglin, How to Detect and Handle Outliers
(1993)."""
_FEW_IMAGES = 8
_SIZES = (0.7, 1.3)  # cell diameters as multiples of the model's, as in the comparison of cellseg-evaluate describe
_COMPARED = {"covered": ("covered share", 0.1), **stain.LIGHT, **stain.STAIN}
WHOLE_RUN = "(whole run)"
"""Stands for the image where the run as a whole is unlike the training images."""
_FEW_CELLS = 8


@dataclass(frozen=True)
class Outlier:
    """One value of one image. ``what``: the quantity; ``typical``: what was expected, in words."""

    image: str
    what: str
    value: float
    typical: str


def _density(image: ImageRow) -> float | None:
    field_px = image.values.get("field_px")
    return image.values["counted"] / field_px * 1e6 if field_px else None


def _covered(image: ImageRow) -> float:
    return float(image.values["confluence"])


def _area(image: ImageRow) -> float | None:
    area, scale = image.values.get("median_cell_area_px"), image.values.get("scale")
    return None if area is None or scale is None else float(area * scale**2)


def _area_of_drawn(image: ImageRow) -> float | None:
    area = image.values.get("median_cell_area_px")
    return None if area is None or image.values.get("scale") is not None else float(area)


_QUANTITIES: dict[str, Callable[[ImageRow], float | None]] = {  # none depends on the size of the image
    "counted cells per megapixel": _density,
    "covered share": _covered,
    "median cell area at the network's scale, px": _area,
    "median cell area, px": _area_of_drawn,
}


def outliers(images: Sequence[ImageRow]) -> list[Outlier]:
    """Values that lie far from those of the other images, by the modified z-score 0.6745 (x - median) / MAD.

    With fewer than eight images nothing is an outlier, and with a MAD of 0 (most values are equal) neither.
    """
    found = list[Outlier]()
    done = [image for image in images if image.is_done]
    for what, value_of in _QUANTITIES.items():
        known = [(image.name, value) for image in done if (value := value_of(image)) is not None]
        values = np.array([value for _, value in known])
        if len(values) < _FEW_IMAGES:
            continue
        median = float(np.median(values))
        mad = float(np.median(np.abs(values - median)))
        if mad == 0:
            continue
        for image, value in known:
            z = 0.6745 * (value - median) / mad
            if abs(z) > MAX_Z:
                found.append(Outlier(image, what, value, f"median of the run {median:.4g}, robust z {z:+.1f}"))
    return found


def unlike_training(images: Sequence[ImageRow], spec: ModelSpec) -> list[Outlier]:
    """Images whose covered share, cell size, light or stain is outside of what the model was trained on, as far as it
    records it.

    The limits are those of ``cellseg-evaluate describe``. Where the median of the run is outside, that is one line for
    ``WHOLE_RUN`` instead of one per image.
    """
    found = list[Outlier]()
    summary = spec.training.data_summary
    trained = {} if summary is None or summary.version != DATA_SUMMARY_VERSION else summary.values
    done = [image for image in images if image.is_done]
    for name, (what, tolerance) in _COMPARED.items():
        usual = trained.get(name)
        values = [(image.name, value) for image in done if (value := _compared(image, name)) is not None]
        if usual is None or not values:
            continue
        low, high = usual.limits(tolerance)
        text = f"training images {usual.median:.2g}, mostly {usual.p05:.2g} to {usual.p95:.2g}"
        median = float(np.median([value for _, value in values]))
        if len(values) > 1 and not low <= median <= high:
            found.append(Outlier(WHOLE_RUN, f"{what}, median", median, text))
            continue
        found += [Outlier(image, what, value, text) for image, value in values if not low <= value <= high]
    for image in done:
        area, scale = image.values.get("median_cell_area_px"), image.values.get("scale")
        if area and scale and image.values["cells"] >= _FEW_CELLS:
            diameter = float(np.sqrt(4 / np.pi * area)) * scale
            if not _SIZES[0] <= diameter / spec.cell_diameter_px <= _SIZES[1]:
                text = f"the model's cells are {spec.cell_diameter_px:.0f} px"
                found.append(Outlier(image.name, "cell diameter at the network's scale, px", diameter, text))
    return found


def _compared(image: ImageRow, name: str) -> float | None:
    """Value of ``image`` for a name in ``_COMPARED``; None in journals of earlier versions, and without cells."""
    value = image.values["confluence"] if name == "covered" else image.values.get("colours", {}).get(name)
    return None if value is None else float(value)


def reasons(images: Sequence[ImageRow], found: Sequence[Outlier]) -> dict[str, list[str]]:
    """Why each image needs a look, in a few words each; images that need none are left out.

    Cells that look like several are no reason: half of such hints are wrong, and most photographs have some.
    """
    why, unusual = dict[str, list[str]](), dict[str, list[str]]()
    for one in found:
        unusual.setdefault(one.image, []).append(f"unusual {one.what}")
    for image in images:
        words = [] if image.is_done else ["failed"]
        words += [*image.warnings, *unusual.get(image.name, [])]
        if words:
            why[image.name] = list(dict.fromkeys(words))
    return why
