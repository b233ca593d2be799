"""The sweep: every metric against the threshold that parts the cells, for each method the network's channels allow.

``threshold`` has one threshold for both jobs: where it is high enough to part touching cells, it has eaten their rims.
``boundary`` and its like have two: the seeds' threshold parts, the foreground's says how far a cell reaches. So each
method is swept along every threshold it has, the other one kept at the model's operating point.
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
    """One method at one threshold, over all images. ``parameter``: which of its settings was set to ``threshold``."""

    method: str
    parameter: str
    threshold: float
    figures: dict[str, float]

    @property
    def curve(self) -> str:
        """Name of the curve this point lies on."""
        return f"{self.method}: {self.parameter.removesuffix('_threshold')} threshold"


def sweep(
    items: Sequence[Judged],
    labelling: Labelling,
    methods: Sequence[InstanceParams],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    on_point: Callable[[], None] | None = None,
) -> list[Point]:
    """All ``methods`` along all their thresholds, in this order. ``on_point`` is told after each point."""
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
    """Names of the thresholds of a method."""
    return [name for name in params.__struct_fields__ if name.endswith("threshold")]


def method_name(params: InstanceParams) -> str:
    """The method's name, as in the JSON of an operating point."""
    return str(params.__struct_config__.tag)


def rows(points: Sequence[Point]) -> list[list[object]]:
    """Rows of sweep.csv, header first."""
    header: list[object] = ["method", "parameter", "threshold", *METRICS]
    return [header, *([p.method, p.parameter, p.threshold, *(p.figures[m] for m in METRICS)] for p in points)]
