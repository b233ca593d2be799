"""summary.csv: one row per group of images.

Numbers per image are means over the images that are done. The interval is Student's for the mean of the group,
mean +- t(0.975, n - 1) * sd / sqrt(n): what other images of the same specimen are expected to average to, as far as the
images are independent and about normal; its lower end is not below 0. Density and confluence are those of all fields of
view together, so that large images weigh more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.outputs import tables
from cellseg_deploy.report.results import Floats, ImageRow, Results

_BOM = b"\xef\xbb\xbf"
"""Tells Excel that the file is UTF-8."""
_MEGAPIXEL = 1e6
_UM2_PER_MM2 = 1e6


@dataclass(frozen=True)
class GroupSummary:
    """Sums of one group. ``images``: all of them, ``failed`` included; ``warned``: images with a warning.

    ``cells``: found; ``counted``: by the count rule. ``mean``, ``sd``, ``interval``: of counted cells per image; None
    where there are too few images. ``per_megapixel``, ``per_mm2``: counted cells by area of the field of view; None if
    the area or the size of a pixel is unknown. ``median_area_px``: over all cells whose class counts;
    ``median_area_um2``: only if all images have one pixel size.
    """

    group: str
    images: int
    failed: int
    warned: int
    cells: int
    counted: int
    by_class: dict[str, int]
    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    per_megapixel: float | None
    per_mm2: float | None
    confluence: float | None
    median_area_px: float | None
    median_area_um2: float | None


def summarise(results: Results) -> list[GroupSummary]:
    """Return the sums of each group, sorted by group."""
    areas = dict[str, list[Floats]]()
    for image, cells in results.cells():
        areas.setdefault(image.group, []).append(cells.area_px)
    return [
        _of_group(group, [image for image in results.images if image.group == group], areas.get(group, []), results)
        for group in results.groups
    ]


def _of_group(group: str, images: Sequence[ImageRow], areas: Sequence[Floats], results: Results) -> GroupSummary:
    done = [image for image in images if image.is_done]
    counts = np.array([image.values["counted"] for image in done], np.float64)
    mean, sd, interval = _mean_sd_interval(counts)
    fields_px = np.array([image.values.get("field_px") or np.nan for image in done])
    sizes_um = [image.values.get("pixel_size_um") for image in done]
    covered = np.array([image.values["confluence"] for image in done]) * fields_px
    median = float(np.median(np.concatenate(areas))) if sum(map(len, areas)) else None
    size_um = sizes_um[0] if sizes_um and sizes_um.count(sizes_um[0]) == len(sizes_um) else None
    area_mm2 = sum(
        px * um**2 / _UM2_PER_MM2 if um else np.nan for px, um in zip(fields_px.tolist(), sizes_um, strict=True)
    )
    return GroupSummary(
        group=group,
        images=len(images),
        failed=len(images) - len(done),
        warned=sum(bool(image.warnings) for image in done),
        cells=sum(image.values["cells"] for image in done),
        counted=int(counts.sum()),
        by_class={name: sum(image.by_class.get(name, 0) for image in done) for name in results.classes},
        mean=mean,
        sd=sd,
        interval=interval,
        per_megapixel=_ratio(counts.sum(), fields_px.sum() / _MEGAPIXEL),
        per_mm2=_ratio(counts.sum(), area_mm2),
        confluence=_ratio(covered.sum(), fields_px.sum()),
        median_area_px=median,
        median_area_um2=None if median is None or size_um is None else median * size_um**2,
    )


def _mean_sd_interval(counts: Floats) -> tuple[float | None, float | None, tuple[float, float] | None]:
    if not len(counts):
        return None, None, None
    mean = float(counts.mean())
    if len(counts) == 1:
        return mean, None, None
    from scipy.special import stdtrit

    sd = float(counts.std(ddof=1))
    half = float(stdtrit(len(counts) - 1, 0.975)) * sd / math.sqrt(len(counts))
    return mean, sd, (max(0.0, mean - half), mean + half)


def _ratio(number: float, of: float) -> float | None:
    return float(number / of) if of > 0 and math.isfinite(number) else None


def columns(classes: Sequence[str], *, with_um: bool) -> tuple[str, ...]:
    """Columns of summary.csv for a model with ``classes``; ``with_um``: the size of a pixel is known somewhere."""
    return (
        *("group", "images", "failed", "warnings", "cells", "counted"),
        *(f"count_{name}" for name in classes),
        *("counted_per_image", "counted_per_image_sd", "counted_per_image_ci95_low", "counted_per_image_ci95_high"),
        *("counted_per_megapixel", "confluence", "median_cell_area_px"),
        *(("counted_per_mm2", "median_cell_area_um2") if with_um else ()),
    )


def rows(summaries: Sequence[GroupSummary], *, with_um: bool) -> list[tuple[Any, ...]]:
    """Values of ``columns`` for each group."""
    return [
        (
            *(one.group, one.images, one.failed, one.warned, one.cells, one.counted),
            *one.by_class.values(),
            *(one.mean, one.sd, *(one.interval or (None, None))),
            *(one.per_megapixel, one.confluence, one.median_area_px),
            *((one.per_mm2, one.median_area_um2) if with_um else ()),
        )
        for one in summaries
    ]


def write(path: Path, results: Results) -> None:
    """Write summary.csv of ``results`` to ``path``. Raises ``OutputError``."""
    with_um = any("pixel_size_um" in image.values for image in results.images)
    header = columns(results.classes, with_um=with_um)
    write_bytes(path, _BOM + tables.csv_rows([header, *rows(summarise(results), with_um=with_um)]))
