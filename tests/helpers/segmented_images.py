"""Segmented images made for tests: known forms, synthetic smears, and the photographs with their masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.images.read import pair_by_stem, read_image, read_labels
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.samples import SmearParams, make_smear


def segmented(labels: np.ndarray, pixels: np.ndarray | None = None, **changes: Any) -> SegmentedImage:
    """What a run would give for ``labels``; every seventh cell is not counted."""
    labels = np.asarray(labels, np.int32)
    table = measure(labels)
    inside = (labels > 0).astype(np.float32)
    values: dict[str, Any] = {
        "name": "sub/smear.png",
        "pixels_hwc": np.full((*labels.shape, 3), 200, np.uint8) if pixels is None else pixels,
        "labels": labels,
        "table": table,
        "counted": np.arange(len(table)) % 7 != 6,
        "probabilities_khw": np.stack([0.9 * inside, 0.25 * inside])[:, ::2, ::2],
        "channels": ("foreground", "boundary"),
        "scale": 0.5,
        "pixel_size_um": None,
        "model": "stub",
        "task": "counting",
    }
    return SegmentedImage(**(values | changes))


def classified(
    labels: np.ndarray, names: tuple[str, ...] = ("red", "white", "platelet"), **changes: Any
) -> SegmentedImage:
    """``segmented`` by a network that tells ``names`` apart, which the cells have in turn; the last does not count."""
    plain = segmented(labels, **changes)
    by_rule, n = plain.counted, len(plain.table)
    index = np.arange(n) % len(names)
    classes = CellClasses(names, names[:-1], index, 0.5 + index / 10)
    plain.table.columns.update(classes.columns)
    return replace(plain, classes=classes, by_rule=by_rule, counted=by_rule & classes.counts)


def odd_labels() -> np.ndarray:
    """All that is hard for outlines: a hole, touching cells, a label in two pieces, a diagonal touch, a lone pixel."""
    labels = np.zeros((12, 20), np.int32)
    labels[0:5, 0:6] = 1
    labels[2, 2:4] = 0
    labels[0:5, 6:9] = 2
    labels[7:9, 1:3] = 3
    labels[9:11, 3:5] = 3  # meets its other piece at a corner
    labels[8:12, 8:12] = 4
    labels[9, 9] = labels[10, 10] = 0  # two holes that meet at a corner
    labels[11, 19] = 5
    return labels


def smear(seed: int = 0, n_cells: int = 30) -> SegmentedImage:
    """A synthetic smear of 400 x 500 px."""
    made = make_smear(SmearParams(size_hw=(400, 500), n_cells=n_cells, cell_diameter_px=50), seed)
    return segmented(made.labels_hw, made.image_hwc)


def photographs(data: Path) -> Iterator[SegmentedImage]:
    """The validation photographs with the cells of their masks."""
    folder = data / "bbbc041seg" / "val"
    for pair in pair_by_stem(folder / "images", folder / "masks"):
        yield segmented(read_labels(pair.mask), read_image(pair.image).pixels_hwc, name=pair.image.name)
