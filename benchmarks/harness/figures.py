"""Figures of the benchmarks as PNG, drawn as ``cellseg_deploy.evaluate.plots`` does: no display, no global state."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellseg_deploy.evaluate.plots import COLOURS, DPI, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "0.75"


@dataclass(frozen=True)
class Bar:
    """``value``: None if nothing was measured. ``spread``: half of the error bar. ``note``: text next to the bar."""

    label: str
    value: float | None
    spread: float = 0.0
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars; one colour per group. ``logarithmic``: for values of very different size."""

    title: str
    x_label: str
    bars: tuple[Bar, ...]
    logarithmic: bool = False


@dataclass(frozen=True)
class Lines:
    """A panel of curves: by name x and y. ``logarithmic``: both axes; ``logarithmic_y``: y only. ``slope_one``: a
    proportional line, as a guide for the eye."""

    title: str
    x_label: str
    y_label: str
    curves: dict[str, tuple[list[float], list[float]]]
    logarithmic: bool = True
    slope_one: bool = False
    logarithmic_y: bool = False


@dataclass(frozen=True)
class Stacks:
    """A panel of horizontal bars made of parts: the parts of each bar by name, in the order of ``parts``."""

    title: str
    x_label: str
    parts: tuple[str, ...]
    bars: dict[str, dict[str, float]]


Panel = Bars | Lines | Stacks


def panels_png(panels: Sequence[Panel], *, title: str) -> bytes:
    """Draw all ``panels``, two per row; nothing without matplotlib, which is an extra."""
    if importlib.util.find_spec("matplotlib") is None:
        return b""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(_height(panel) for panel in panels)
    figure = figure_class()(figsize=(7.4 * columns, tallest * rows + 0.5), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).reshape(-1))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        axis.grid(visible=True, color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x_label)
        if isinstance(panel, Bars):
            _draw_bars(axis, panel)
        elif isinstance(panel, Stacks):
            _draw_stacks(axis, panel)
        else:
            _draw_lines(axis, panel)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _height(panel: Panel) -> float:
    n = len(panel.bars) if isinstance(panel, Bars | Stacks) else 0
    return max(3.6, 0.34 * n + 1.2)


def _draw_bars(axis: Axes, panel: Bars) -> None:
    groups = list(dict.fromkeys(bar.group for bar in panel.bars))
    longest = max((bar.value for bar in panel.bars if bar.value is not None), default=1.0)
    for place, bar in enumerate(panel.bars):
        colour = COLOURS[groups.index(bar.group) % len(COLOURS)]
        if bar.value is not None:
            error: dict[str, Any] = {"xerr": bar.spread, "error_kw": {"lw": 1, "ecolor": "0.3"}} if bar.spread else {}
            axis.barh(place, bar.value, color=colour, height=0.7, **error)
        # Next to the end of the bar; without a bar, at the left edge of the panel.
        at, anchor = (
            (0.0, axis.get_yaxis_transform()) if bar.value is None else (bar.value + bar.spread, axis.transData)
        )
        colour = "0.5" if bar.value is None else "0.2"
        axis.text(at, place, f"  {bar.note}", va="center", fontsize=8, color=colour, transform=anchor)
    axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=8)
    axis.set_ylim(len(panel.bars) - 0.5, -0.5)  # first bar on top; a bar without a value also has its place
    if panel.logarithmic:
        axis.set_xscale("log")
        smallest = min((bar.value for bar in panel.bars if bar.value), default=longest)
        axis.set_xlim(smallest / 2, 4 * longest)
    else:
        axis.set_xlim(0, 1.35 * longest)
    axis.grid(visible=False, axis="y")


def _draw_stacks(axis: Axes, panel: Stacks) -> None:
    colours = [*COLOURS, _GREY, "0.55", "0.35", "#8C6D31", "#5254A3", "#637939"]
    lefts = dict.fromkeys(panel.bars, 0.0)
    for part, colour in zip(panel.parts, colours, strict=False):
        widths = [bar.get(part, 0.0) for bar in panel.bars.values()]
        axis.barh(range(len(widths)), widths, left=list(lefts.values()), color=colour, label=part, height=0.7)
        lefts = {name: left + width for (name, left), width in zip(lefts.items(), widths, strict=True)}
    axis.set_yticks(range(len(panel.bars)), list(panel.bars), fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(visible=False, axis="y")


def _draw_lines(axis: Axes, panel: Lines) -> None:
    for place, (name, (x, y)) in enumerate(panel.curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(x, y, marker=".", color=colour, label=name)
        if panel.slope_one and x:
            axis.plot(x, [y[-1] * value / x[-1] for value in x], color=colour, linewidth=1, linestyle="--")
    axis.set_ylabel(panel.y_label)
    if panel.logarithmic:
        axis.set_xscale("log")
    if panel.logarithmic or panel.logarithmic_y:
        axis.set_yscale("log")
    axis.legend(fontsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No "Software" entry: the same numbers give the same bytes with the same matplotlib.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
