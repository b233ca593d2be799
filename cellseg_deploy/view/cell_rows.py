"""What a page shows of cells: outlines and the figures of the table, of all cells or those that an edit changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.count_rules import CountRule, counted
from cellseg_deploy.cells.edits import Patch
from cellseg_deploy.cells.field_of_view import Mask, edges
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.measure import CellTable, measure
from cellseg_deploy.cells.polygons import cell_polygons

SHOWN = ("area_px", "equivalent_diameter_px", "circularity", "solidity", "touches_border")
Row = dict[str, Any]


def rows_of(labels: Labels, *, numbers: Iterable[int] | None = None, patch: Patch | None = None) -> list[Row]:
    """Return a row for each cell of ``labels`` (h, w), or for ``numbers`` only, which ``patch`` holds, ascending.

    A row has ``n``, the label, ``box`` (left, top, width, height), ``at`` (the centroid, in the coordinates of
    ``polygons``), ``rings`` (flat lists x, y, x, y, ...; holes as rings of their own) and ``SHOWN``.
    """
    wanted = None if numbers is None else sorted(set(numbers))
    if wanted is None:
        return _rows(labels, 0, 0, labels.shape)
    top, left = (0, 0) if patch is None else (patch.top, patch.left)
    height, width = labels.shape if patch is None else patch.after.shape
    around = labels[top : top + height, left : left + width]
    crop = np.where(np.isin(around, wanted), around, 0).astype(np.int32)
    return _rows(crop, top, left, labels.shape)


def counts(
    rows: list[Row],
    labels: Labels,
    rule: CountRule,
    *,
    field: Mask | None = None,
    model_cell_px: float | None = None,
    class_of: list[int] | None = None,
    class_counts: list[bool] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether each cell of ``rows``, all those of ``labels``, counts: by ``rule`` and by its class, bool (n,)."""
    numbers = np.array([row["n"] for row in rows], np.int64)
    at_edge = None
    if field is not None and len(rows):
        at_edge = edges(labels, field, int(numbers.max()))[numbers - 1]
    by_rule = counted(
        np.array([row["box"] for row in rows], np.int64).reshape(-1, 4),
        (labels.shape[0], labels.shape[1]),
        rule,
        at_edge,
        areas_px=np.array([row["area_px"] for row in rows], np.int64),
        model_cell_px=model_cell_px,
        class_of=None if class_of is None else np.array(class_of, np.int64),
    )
    return by_rule if class_counts is None else by_rule & np.array(class_counts, np.bool_).reshape(-1)


def _rows(crop: Labels, top: int, left: int, image_hw: tuple[int, ...]) -> list[Row]:
    table: CellTable = measure(crop)
    columns = table.columns
    boxes = table.boxes + np.array([left, top, 0, 0])
    at_side = (boxes[:, 0] == 0) | (boxes[:, 1] == 0)
    at_side |= (boxes[:, 0] + boxes[:, 2] == image_hw[1]) | (boxes[:, 1] + boxes[:, 3] == image_hw[0])
    found = []
    for index, cell in enumerate(cell_polygons(crop)):
        rings = [ring + np.array([left, top]) for polygon in cell.polygons for ring in polygon]
        row: Row = {
            "n": cell.label,
            "box": boxes[index].tolist(),
            "at": [
                round(float(columns["centroid_x_px"][index]) + left + 0.5, 1),
                round(float(columns["centroid_y_px"][index]) + top + 0.5, 1),
            ],
            "rings": [ring.reshape(-1).tolist() for ring in rings],
        }
        row |= {name: round(float(columns[name][index]), 3) for name in SHOWN[1:4]}
        row |= {"area_px": int(columns["area_px"][index]), "touches_border": bool(at_side[index])}
        found.append(row)
    return found
