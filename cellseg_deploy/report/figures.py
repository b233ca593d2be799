"""Data of the report's figures: counts of images, and distributions in bins, so that a million cells need no space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cellseg_deploy.cells.several import looks_like_several
from cellseg_deploy.report.results import CellRows, Floats, ImageRow, Results

_SHAPE_BINS = 40
_AREA_BINS = 40
_MAX_GROUPS = 30
"""Groups with an own row in a figure: the first ones. All are in the table."""
SHAPES = {
    "eccentricity": ("Eccentricity", "0 is round, near 1 is long", (0.0, 1.0)),
    "solidity": ("Solidity", "1 is convex, less is dented", (0.7, 1.0)),
}


class CellSums:
    """Collected from all cells in one pass: areas and binned shapes by group.

    ``suspects``: image -> number of its cells that look like several.
    """

    def __init__(self, cells: Iterable[tuple[ImageRow, CellRows]]) -> None:
        self.suspects = dict[str, int]()
        self._areas = dict[str, list[Floats]]()
        self._shapes: dict[str, dict[str, Floats]] = {name: {} for name in SHAPES}
        for image, rows in cells:
            if number := int(looks_like_several(rows.area_px, rows.solidity, rows.is_cut, rows.class_of).sum()):
                self.suspects[image.name] = number
            whole = ~rows.is_cut
            self._areas.setdefault(image.group, []).append(rows.area_px[whole].astype(np.float32))
            for name, (_, _, limits) in SHAPES.items():
                values = np.clip(getattr(rows, name)[whole], *limits)
                counts = np.histogram(values, _SHAPE_BINS, limits)[0].astype(np.float64)
                kept = self._shapes[name]
                kept[image.group] = kept.get(image.group, np.zeros(_SHAPE_BINS)) + counts

    def distributions(self) -> list[dict[str, Any]]:
        """One figure each: ``title``, ``note``, ``edges`` of the bins, and ``groups``: name -> share of its cells."""
        areas = {group: np.concatenate(parts) for group, parts in self._areas.items()}
        every = np.concatenate(list(areas.values())) if areas else np.zeros(0)
        figures = list[dict[str, Any]]()
        if len(every):
            high = float(np.quantile(every, 0.995)) * 1.2
            edges = np.linspace(0, _rounded(high), _AREA_BINS + 1)
            counts = {group: np.histogram(np.clip(a, 0, edges[-1]), edges)[0] for group, a in areas.items()}
            note = "whole cells; the last bin holds all that are larger"
            figures.append(_figure("area", "Cell area, px", note, edges, counts))
            for name, (title, note, limits) in SHAPES.items():
                edges = np.linspace(*limits, _SHAPE_BINS + 1)
                figures.append(_figure(name, title, f"whole cells; {note}", edges, self._shapes[name]))
        return figures


def _rounded(value: float) -> float:
    digits = 10 ** max(0, len(str(int(value))) - 2)
    return float(np.ceil(value / digits) * digits)


def _figure(name: str, title: str, note: str, edges: Floats, counts: Mapping[str, Any]) -> dict[str, Any]:
    shares = {
        group: [round(float(share), 5) for share in np.asarray(number) / max(1, np.sum(number))]
        for group, number in sorted(counts.items())[:_MAX_GROUPS]
    }
    return {"name": name, "title": title, "note": note, "edges": [round(float(e), 6) for e in edges], "groups": shares}


def counts_by_group(results: Results) -> dict[str, Any]:
    """Figure of counted cells per image: ``groups`` in order, ``points`` (index of the group, count, image)."""
    groups = list(results.groups[:_MAX_GROUPS])
    points = [
        (groups.index(image.group), image.values["counted"], image.name)
        for image in results.images
        if image.is_done and image.group in groups
    ]
    return {"groups": groups, "left_out": len(results.groups) - len(groups), "points": points}


def classes_by_group(results: Results, summaries: Sequence[Any]) -> dict[str, Any]:
    """Figure of the classes: ``names`` and, by group, the number of cells of each; empty without classes."""
    if not results.classes:
        return {}
    return {
        "names": list(results.classes),
        "groups": {one.group: list(one.by_class.values()) for one in summaries[:_MAX_GROUPS]},
    }
