"""Pictures of an evaluation: axes point up, and the best of each curve is in view, however bad the network."""

from __future__ import annotations

from typing import Any

import pytest

from cellseg_deploy.evaluate import plots
from cellseg_deploy.evaluate.sweep import METRICS, Point

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def drawn(monkeypatch: pytest.MonkeyPatch, peak: float, error: float) -> dict[str, Any]:
    """The panels of sweep.png by metric, for scores with a ``peak`` at 0.5 and count errors of at least ``error``."""
    shape = {0.1: 0.1, 0.3: 0.7, 0.5: 1.0, 0.7: 0.8, 0.9: 0.05}
    points = [
        Point("threshold", "threshold", t, {m: error / s if m.startswith("count") else peak * s for m in METRICS})
        for t, s in shape.items()
    ]
    figures: list[Any] = []
    to_png = plots.to_png
    monkeypatch.setattr(plots, "to_png", lambda figure: (figures.append(figure), to_png(figure))[1])
    assert plots.sweep_png(points, title="t").startswith(b"\x89PNG")
    return dict(zip([metric for metric, _ in plots._PANELS], figures[0].axes, strict=True))


@pytest.mark.parametrize(("peak", "error"), [(0.95, 0.02), (0.31, 0.3), (0.25, 0.6), (0.02, 3.0), (0.0, 0.0)])
def test_axes_of_the_sweep_point_up_and_hold_the_best(
    monkeypatch: pytest.MonkeyPatch, peak: float, error: float
) -> None:
    for metric, axis in drawn(monkeypatch, peak, error).items():
        low, high = axis.get_ylim()
        best = 100 * error if metric.startswith("count") else peak
        assert 0 <= low < high, metric
        assert low <= best <= high, metric


def test_ends_that_lose_every_cell_do_not_squeeze_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(monkeypatch, 0.95, 0.02)
    assert panels["f1"].get_ylim()[0] == 0.3
    assert panels["count_mape_apart"].get_ylim()[1] == 40
