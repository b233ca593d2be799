"""Compare images with those that a model was trained on, by one measurement of both.

The training images are described by a ``DataSummary`` in the model file: for each quantity the median over the images
and the 5th and 95th percentile. An image is similar if it is between these, plus or minus a quarter of their
distance, or a tolerance if the training images are all alike: about the smallest visible difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellseg_deploy.cells import stain
from cellseg_deploy.evaluate.image_statistics import DataFacts, ImageFacts, summarise
from cellseg_deploy.models.spec import DATA_SUMMARY_VERSION, DataSummary, ModelSpec, Spread

SIZE_RANGE = (0.7, 1.3)
"""Range of median diameters, as multiples of the model's own, for which it needs no scale setting."""
_FEW_CELLS = 20
_NAMED = 3  # images in a sentence
_DIGITS = 4


@dataclass(frozen=True)
class Quantity:
    """``label``: description with unit. ``group``: name in warnings. ``tolerance``: in the quantity's unit."""

    name: str
    label: str
    group: str
    tolerance: float


QUANTITIES: tuple[Quantity, ...] = (
    Quantity("covered", "share of the image covered", "density", 0.1),
    Quantity("crowded_share", "share of crowded cells", "density", 0.1),
    *(Quantity(name, label, "light", tolerance) for name, (label, tolerance) in stain.LIGHT.items()),
    *(Quantity(name, label, "stain", tolerance) for name, (label, tolerance) in stain.STAIN.items()),
)
DIAMETER = "diameter_px"
_OF_GROUP = {
    "density": "cells lie more or less densely than in the training images",
    "light": "the background, so light or camera, differs from the training images",
    "stain": "the stain of the cells differs from the training images",
}


@dataclass(frozen=True)
class Comparison:
    """One quantity here and in the training images; None if there is no figure.

    ``range``: what counts as similar. ``outside``: whether the median here is outside; None if not compared.
    ``odd_images``: images outside the range.
    """

    quantity: Quantity
    here: Spread | None
    training: Spread | None
    range: tuple[float, float] | None = None
    outside: bool | None = None
    odd_images: tuple[str, ...] = ()


def values_of(image: ImageFacts) -> dict[str, float]:
    """Return each of ``QUANTITIES`` that is defined for ``image``."""
    crowded = {} if image.crowded_share is None else {"crowded_share": image.crowded_share}
    return {"covered": image.covered, **crowded, **image.colours}


def summary(images: Sequence[ImageFacts]) -> DataSummary:
    """Summarise ``images``, at least one, as a model file describes its training images; four significant digits."""
    spreads = {quantity.name: _over_images(images, quantity.name) for quantity in QUANTITIES}
    spreads[DIAMETER] = _spread(np.concatenate([image.diameters_px for image in images]))
    return DataSummary(
        version=DATA_SUMMARY_VERSION,
        n_images=len(images),
        n_cells=sum(image.n_cells for image in images),
        values={name: spread for name, spread in spreads.items() if spread is not None},
    )


def training_diameter_px(spec: ModelSpec) -> float:
    """Return the median cell diameter of the model's training images in their own px."""
    return spec.cell_diameter_px / spec.image_scale


def training_summary(spec: ModelSpec) -> tuple[DataSummary | None, str]:
    """Return the training summary of ``spec``, or None and a sentence on why it is unusable here."""
    found = spec.training.data_summary
    what = f"the model {spec.name} has no description of its training images"
    if found is None:
        return None, f"{what}, so light, stain and crowding are not compared; only the size of its cells is known"
    if found.version != DATA_SUMMARY_VERSION:
        return None, (
            f"the model {spec.name} describes its training images in version {found.version}, this program measures "
            f"version {DATA_SUMMARY_VERSION}, so light, stain and crowding are not compared"
        )
    return found, ""


def compare(images: Sequence[ImageFacts], spec: ModelSpec) -> list[Comparison]:
    """Compare every quantity of ``images`` (at least one) with the training images of ``spec``.

    Crowding depends on px: it is compared only if cells have the size of the training images' cells.
    """
    training, _ = training_summary(spec)
    of_size = _is_of_size(summarise(images).median_diameter_px, spec)
    found = []
    for quantity in QUANTITIES:
        here = _over_images(images, quantity.name)
        known = None if training is None else training.values.get(quantity.name)
        if here is None or known is None or (quantity.name == "crowded_share" and not of_size):
            found.append(Comparison(quantity, here, known))
            continue
        low, high = known.limits(quantity.tolerance)
        every = [(image.name, values_of(image).get(quantity.name)) for image in images]
        odd = tuple(name for name, value in every if value is not None and not low <= value <= high)
        outside = not low <= here.median <= high
        found.append(Comparison(quantity, here, known, (low, high), outside, odd))
    return found


def warnings(
    images: Sequence[ImageFacts], facts: DataFacts, compared: Sequence[Comparison], spec: ModelSpec
) -> list[str]:
    """Describe how these images differ from the training images of ``spec`` and from each other, a sentence each."""
    found = _of_size(images, facts, spec)
    for group, sentence in _OF_GROUP.items():
        here = [one for one in compared if one.quantity.group == group]
        outside = [_beside(one) for one in here if one.outside]
        if outside:
            found.append(f"{sentence}: {'; '.join(outside)}")
            continue
        names = list(dict.fromkeys(name for one in here for name in one.odd_images))
        if names:
            what = ", ".join(one.quantity.label for one in here if one.odd_images)
            found.append(f"{len(names)} of {facts.n_images} images unlike the training images ({what}): {_some(names)}")
    negatives = [image for image in images if image.negative]
    if negatives:
        listed = _some([image.name for image in negatives])
        found.append(f"{len(negatives)} of {facts.n_images} images ({listed}): {negatives[0].negative}")
    if facts.scale_bars:
        found.append(
            f"a scale bar seems to be drawn into {facts.scale_bars} of {facts.n_images} images: it may be "
            "counted as a cell, and it gives the magnification"
        )
    return found


def _of_size(images: Sequence[ImageFacts], facts: DataFacts, spec: ModelSpec) -> list[str]:
    expected, median = training_diameter_px(spec), facts.median_diameter_px
    low, high = SIZE_RANGE
    if median is None:
        return ["no whole cell was found, so the magnification cannot be checked"]
    found: list[str] = []
    if sum(len(image.areas_px) for image in images) < _FEW_CELLS:
        found.append(f"fewer than {_FEW_CELLS} whole cells were found: every figure here is uncertain")
    if not _is_of_size(median, spec):
        found.append(
            f"cells are {median:.0f} px wide (median), {median / expected:.2f} times those of the training images "
            f"({expected:.0f} px): give `cell_diameter_px={median:.0f}`, or auto"
        )
    odd = [
        image.name
        for image in images
        if image.median_diameter_px is not None and not low <= image.median_diameter_px / median <= high
    ]
    if odd:
        found.append(
            f"cells of {_some(odd)} differ in size from the others' ({low:g} to {high:g} times their median): "
            "several magnifications in one folder? Put each in its own folder: cells are measured per folder"
        )
    sizes = {tag.um_per_px for image in images for tag in image.resolution if not tag.is_of_print}
    if sizes and max(map(max, sizes)) > SIZE_RANGE[1] * min(map(min, sizes)):
        found.append("the files name several pixel sizes (see data.csv): several magnifications in one folder?")
    return found


def _is_of_size(median_px: float | None, spec: ModelSpec) -> bool:
    return median_px is not None and SIZE_RANGE[0] <= median_px / training_diameter_px(spec) <= SIZE_RANGE[1]


def _beside(one: Comparison) -> str:
    assert one.here is not None
    assert one.training is not None
    there = f"{one.training.median:.3g}, usually {one.training.p05:.3g} to {one.training.p95:.3g}"
    return f"{one.quantity.label} {one.here.median:.3g} (training {there})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _over_images(images: Sequence[ImageFacts], name: str) -> Spread | None:
    found = (values_of(image).get(name) for image in images)
    return _spread(np.array([value for value in found if value is not None]))


def _spread(values: np.ndarray) -> Spread | None:
    if not len(values):
        return None
    low, median, high = (_rounded(float(q)) for q in np.quantile(values, (0.05, 0.5, 0.95)))
    return Spread(median=median, p05=low, p95=high)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value
