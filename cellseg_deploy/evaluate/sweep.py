"""Sweep every metric against the threshold that splits the cells, for each method the network's channels allow.

``threshold`` has one threshold for both jobs: if it is high enough to split touching cells, it erodes their rims.
``boundary`` and similar methods have two: one for seeds, which splits, and one for the foreground, which sets how far a
cell reaches. Each method is swept along each of its thresholds, the other kept at the model's operating point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from cellseg_deploy.cells.metrics import MAP_THRESHOLDS
from cellseg_deploy.evaluate.calibration import Judged, Labelling, figures
from cellseg_deploy.models.spec import InstanceParams

THRESHOLDS: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
METRICS = (
    *("dice", "iou", "f1", "map", "count_mape", "count_mae", "count_bias"),
    *("f1_apart", "count_mape_apart", "count_mae_apart", "count_bias_apart", "merges", "splits"),
)


@dataclass(frozen=True)
class Point:
    """One method at one threshold, over all images. ``parameter``: the setting that was set to ``threshold``."""

    method: str
    parameter: str
    threshold: float
    figures: dict[str, float]

    @property
    def curve(self) -> str:
        """Name of the curve this point is on."""
        return f"{self.method}: {self.parameter.removesuffix('_threshold')} threshold"


def sweep(
    items: Sequence[Judged],
    labelling: Labelling,
    methods: Sequence[InstanceParams],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    on_point: Callable[[], None] | None = None,
) -> list[Point]:
    """Score all ``methods`` along all their thresholds, in this order. ``on_point`` is called after each point."""
    points = []
    for params in methods:
        for name in swept(params):
            for threshold in thresholds:
                moved = msgspec.structs.replace(params, **{name: threshold})
                pooled = figures([labelling.score(item, moved, MAP_THRESHOLDS) for item in items])
                points.append(Point(method_name(params), name, threshold, pooled))
                if on_point is not None:
                    on_point()
    return points


def swept(params: InstanceParams) -> list[str]:
    """Return the names of a method's thresholds."""
    return [name for name in params.__struct_fields__ if name.endswith("threshold")]


def method_name(params: InstanceParams) -> str:
    """Return the method's name, as in the JSON of an operating point."""
    return str(params.__struct_config__.tag)


def rows(points: Sequence[Point]) -> list[list[object]]:
    """Return rows of sweep.csv, header first."""
    header: list[object] = ["method", "parameter", "threshold", *METRICS]
    return [header, *([p.method, p.parameter, p.threshold, *(p.figures[m] for m in METRICS)] for p in points)]
