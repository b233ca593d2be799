"""Figures of an evaluation, as PNG. The only module that imports matplotlib, from the extra ``plots``.

Drawn with the object interface and no display: no global state, no window.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.engine_cache import cache_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cellseg_deploy.cells.probability_calibration import Reliability
    from cellseg_deploy.evaluate.agreement import Limits
    from cellseg_deploy.evaluate.sweep import Point

DPI = 110
# Okabe and Ito's colours: also distinguishable by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANELS: tuple[tuple[str, str], ...] = (
    ("dice", "Dice"),
    ("iou", "IoU"),
    ("map", "mean AP, IoU 0.50 to 0.95"),
    ("f1", "F1, all components"),
    ("f1_apart", "F1 apart from clumps"),
    ("count_mape_apart", "count error apart from clumps, %"),
)


def sweep_png(points: Sequence[Point], *, title: str) -> bytes:
    """Plot each metric against the threshold, one line per curve of ``points``, with the best point of each marked."""
    figure, axes = make_figure(2, 3, (13, 7.4))
    curves = list(dict.fromkeys(point.curve for point in points))
    for axis, (metric, label) in zip(axes, _PANELS, strict=True):
        is_error = metric.startswith("count")
        for colour, curve in zip(pick_colours(len(curves)), curves, strict=True):
            on_curve = [point for point in points if point.curve == curve]
            x = np.array([point.threshold for point in on_curve])
            y = np.array([point.figures[metric] for point in on_curve]) * (100 if is_error else 1)
            axis.plot(x, y, marker=".", color=colour, label=curve)
            if np.isfinite(y).any():
                best = int(np.nanargmin(y) if is_error else np.nanargmax(y))
                axis.plot(x[best], y[best], marker="o", markersize=9, fillstyle="none", color=colour)
        axis.set_ylim(*y_limits(axis, errors=is_error))
        axis.set_xlim(0, 1)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("threshold")
    axes[0].legend(fontsize=8, loc="lower center")
    figure.suptitle(title, fontsize=11)
    return to_png(figure)


def y_limits(axis: Axes, *, errors: bool) -> tuple[float, float]:
    """Return lower and upper limits for the curves of ``axis``: scores from 0 to 1, or ``errors`` in percent.

    Extreme thresholds lose every cell, so scores below 0.3 and errors above 40 are cropped, unless the best third of
    all points is as bad.
    """
    drawn = [np.asarray(line.get_ydata(), np.float64) for line in axis.lines]
    values = np.concatenate([*drawn, np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = max(0.05 * (high - low), 0.01)
    if errors:
        return 0.0, min(high + margin, max(40.0, 1.1 * float(np.percentile(values, 33))))
    return max(0.0, low - margin, min(0.3, float(np.percentile(values, 67)) - 0.1)), high + margin


def reliability_png(found: Reliability, *, title: str) -> bytes:
    """Plot the reliability curve with its ideal diagonal, and below it the number of pixels in each bin."""
    figure, (curve, counts) = make_figure(2, 1, (5.2, 6.4), height_ratios=(3, 1), sharex=True)
    probability, share = found.curve
    curve.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="true probabilities")
    curve.plot(probability, share, marker="o", color=COLOURS[0], label=f"foreground, ECE {found.ece:.4f}")
    curve.set_ylabel("share of pixels that are cell")
    curve.set_ylim(0, 1)
    curve.legend(fontsize=9, loc="upper left")
    bins = len(found.pixels)
    counts.bar((np.arange(bins) + 0.5) / bins, np.maximum(found.pixels, 0.5), width=0.9 / bins, color="0.6")
    counts.set_yscale("log")
    counts.set_ylabel("pixels")
    counts.set_xlabel("probability of cell that the network gave")
    counts.set_xlim(0, 1)
    figure.suptitle(title, fontsize=11)
    return to_png(figure)


def curves_png(
    panels: Sequence[tuple[str, dict[str, tuple[list[float], list[float]]]]], *, y_label: str, title: str = ""
) -> bytes:
    """Plot one panel per entry of ``panels``: title, and x and y of its curves by name. x is a factor: 1 is marked."""
    columns = min(2, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, axes = make_figure(n_rows, columns, (6.2 * columns, 3.6 * n_rows))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, curves) in zip(axes, panels, strict=False):
        for colour, (label, (x, y)) in zip(pick_colours(len(curves)), curves.items(), strict=True):
            axis.plot(x, y, marker=".", color=colour, label=label)
        axis.axvline(1, color="0.6", linewidth=1, linestyle="--")
        axis.set_ylim(0, 1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("factor")
        axis.set_ylabel(y_label)
    axes[0].legend(fontsize=8, loc="center left")
    figure.suptitle(title, fontsize=11)
    return to_png(figure)


def agreement_png(by_hand: npt.NDArray[np.int64], found: npt.NDArray[np.int64], limits: Limits) -> bytes:
    """Draw a Bland-Altman plot: each image's difference ``found - by_hand`` against the mean of both counts, (n,) each.

    Lines at the bias and the limits of agreement, labelled with values and, on the right, 95 % confidence intervals.
    """
    figure, (axis,) = make_figure(1, 1, (8.2, 5))
    axis.axhline(0, color="0.5", linewidth=1, zorder=1)
    # The three intervals next to each other: with few images they overlap.
    for name, one, colour, style, place in (
        ("bias", limits.bias, COLOURS[0], "-", 0.975),
        ("lower limit", limits.lower, COLOURS[1], "--", 0.955),
        ("upper limit", limits.upper, COLOURS[1], "--", 0.995),
    ):
        if not np.isfinite(one.value) or (one is not limits.bias and limits.sd == 0):
            continue  # one image has no limits, and with equal differences they equal the bias
        axis.axhline(one.value, color=colour, linestyle=style, linewidth=1.6)
        if np.isfinite(one.low):
            ends = ([place, place], [one.low, one.high])
            axis.plot(*ends, color=colour, marker="_", linewidth=2, transform=axis.get_yaxis_transform())
        axis.annotate(
            f"{name}\n{one.value:+.1f}",
            (1.01, one.value),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )
    axis.scatter((by_hand + found) / 2, found - by_hand, s=26, color="0.15", alpha=0.65, linewidths=0, zorder=3)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.07 * (high - low))
    axis.set_xlabel("cells per image, mean of found and by hand")
    axis.set_ylabel("found - by hand, cells per image")
    figure.suptitle(f"Agreement with counts by hand (images: {limits.n}); bars: 95 % confidence intervals", fontsize=11)
    return to_png(figure)


@dataclass(frozen=True)
class Histogram:
    """One panel: ``values`` (n,), and, if known, the expected median and range."""

    label: str
    values: npt.NDArray[np.float64]
    expected: float | None = None
    expected_range: tuple[float, float] | None = None


def histograms_png(panels: Sequence[Histogram], *, title: str, columns: int) -> bytes:
    """Draw a histogram per entry of ``panels`` in rows of ``columns``, with its median, over the expected range."""
    n_rows = -(-len(panels) // columns)
    figure, axes = make_figure(n_rows, columns, (4.3 * columns, 3.4 * n_rows))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        values, expected = panel.values, panel.expected
        if panel.expected_range is not None:
            axis.axvspan(*panel.expected_range, color=COLOURS[1], alpha=0.15, linewidth=0)
        if expected is not None:
            axis.axvline(expected, color=COLOURS[1], linestyle="--", label=f"training images {expected:.4g}")
        if len(values):
            axis.hist(values, bins=min(40, max(5, round(len(values) ** 0.5))), color=COLOURS[0], alpha=0.8)
            axis.axvline(float(np.median(values)), color="0.2", label=f"median {np.median(values):.4g}")
        axis.set_xlabel(panel.label)
        axis.locator_params(axis="x", nbins=6)
        if len(values) or expected is not None:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return to_png(figure)


def figure_class() -> type[Figure]:
    """Return matplotlib's ``Figure``, imported so that its font list goes to our cache folder, not the home folder.

    User settings are not read: the same numbers give everybody the same picture.
    """
    if "matplotlib" not in sys.modules:
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder().with_name("matplotlib")))
    from matplotlib.figure import Figure

    return Figure


def make_figure(n_rows: int, n_columns: int, size: tuple[float, float], **grid: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure of ``size`` inches with panels row by row; ``grid``: ``sharex``, matplotlib's grid settings."""
    figure = figure_class()(figsize=size, dpi=DPI, layout="constrained")
    share = {"sharex": grid.pop("sharex", False)}
    axes = figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=grid or None, **share)
    flat: list[Axes] = list(axes.reshape(-1))
    for axis in flat:
        axis.grid(visible=True, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, flat


def pick_colours(n: int) -> list[str]:
    """Return ``n`` colours of ``COLOURS``, repeated from the first if there are too few."""
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def to_png(figure: Figure) -> bytes:
    """Encode the finished figure as PNG."""
    buffer = io.BytesIO()
    # No "Software" entry: the same numbers give the same bytes with the same matplotlib.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
