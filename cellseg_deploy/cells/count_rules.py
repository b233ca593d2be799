"""Which cells count when the image border cuts some. Every cell is labelled and measured, whatever the rule.

``half``             the default: whole cells, and cut cells of which at least half is estimated to be in the picture.
                     One of two adjacent fields has the larger part of a cell, so sums add up.
``all``              every detected cell, whole or cut. Right for what this one picture shows; too many for a density,
                     because a cell on the border of two neighbouring fields is counted in both.
``exclude-border``   only cells that do not touch the border. Right for shape and size, which a cut cell lacks; too few
                     for a density, and large cells are lost more often than small ones.
``frame``            the unbiased counting frame (Gundersen, Notes on the estimation of the numerical density of
                     arbitrary profiles: the edge effect, J. Microsc. 111 (1977) 219-223) with the picture as the
                     frame: cells that touch the left or the bottom side are excluded, those that touch only the top or
                     the right side are included. When fields tile a slide, each cell is then counted once, whatever
                     its size, so cells / area is an unbiased density, as far as slivers are detected.
                     (Gundersen's forbidden line continues beyond the frame, where a picture shows nothing: a cell that
                     winds round a corner of the picture may still be counted in two fields.)

How ``half`` works: a cut cell counts if its area is at least half that of the typical cell: the median whole cell of
the same image, or the model's if there are too few. Area does not depend on how the cell is cut: one side, a corner,
opposite sides and the edge of a round field are treated alike, and a sliver never counts as a cell. Estimates from the
visible shape (an ellipse's area / (chord * depth) at the border reaches pi / 4 when half of it is in) need no typical
cell, but they change a lot with one pixel of depth, and touching cells are not ellipses: the quarters of ten
photographs summed to -2 % of the whole that way, to -0.4 % by area.
A large cell cut in two may count twice and a small one not at all; these errors cancel out if sizes scatter evenly. A
cell whose quarters lie in four fields counts in none. With classes, each cell is compared with its own class: a third
of a white cell is as large as half a red one, and a whole platelet is not.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

CountRule = Literal["half", "all", "exclude-border", "frame"]
COUNT_RULES: tuple[CountRule, ...] = ("half", "all", "exclude-border", "frame")
DEFAULT_RULE: CountRule = "half"

_FEW_CELLS = 8  # with fewer whole cells, the model's cell is a better estimate than their median
_SMALLEST_CELL = 0.1  # share of the model's cell; smaller objects (platelets, debris) are left out of the median


def counted(
    boxes: npt.NDArray[np.int64],
    image_hw: tuple[int, int],
    rule: CountRule,
    at_edge: npt.NDArray[np.bool_] | None = None,
    *,
    areas_px: npt.NDArray[np.integer[Any]] | None = None,
    model_cell_px: float | None = None,
    class_of: npt.NDArray[np.integer[Any]] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether each cell counts under ``rule``, bool (n,).

    ``boxes``: left, top, width, height of each cell in px, (n, 4). ``at_edge``: whether the edge of the field of view
    lies at the cell's left, top, right, bottom, bool (n, 4), if the field is not the whole picture; it is border too.
    For ``half``: ``areas_px`` of the cells in px, (n,), and ``model_cell_px``, the area of the model's typical cell in
    px of the image, None without a model. ``class_of``: number of each cell's class, (n,), None without classes; the
    typical cell is then the median whole cell of the class, or the model's if the class has none. Raises
    ``UsageError`` for an unknown rule, or ``half`` without areas.
    """
    check_rule(rule)
    if rule == "all":
        return np.ones(len(boxes), np.bool_)
    at_side = _at_side(boxes, image_hw)
    if at_edge is not None:
        at_side |= at_edge
    if rule == "frame":
        return np.asarray(~(at_side[:, 0] | at_side[:, 3]))
    whole = np.asarray(~at_side.any(axis=1))
    if rule == "exclude-border":
        return whole
    if areas_px is None:
        raise UsageError("count rule half judges by the cells' areas: give areas_px")
    if class_of is None:
        return np.asarray(whole | (2 * areas_px >= _typical_px(areas_px, whole, model_cell_px)))
    typical_px = np.zeros(len(areas_px), np.float64)
    for number in np.unique(class_of):
        its = class_of == number
        of_model = None if (whole & its).any() else model_cell_px
        typical_px[its] = _typical_px(areas_px[its], whole[its], of_model)
    return np.asarray(whole | (2 * areas_px >= typical_px))


def check_rule(rule: str) -> None:
    """Raise ``UsageError`` if ``rule`` is unknown."""
    if rule not in COUNT_RULES:
        raise UsageError(f"count rule must be one of {', '.join(COUNT_RULES)}, got {rule!r}")


def _at_side(boxes: npt.NDArray[np.int64], image_hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Whether each cell touches the picture's left, top, right, bottom, bool (n, 4)."""
    left, top, width, height = boxes.T
    return np.stack([left == 0, top == 0, left + width == image_hw[1], top + height == image_hw[0]], axis=1)


def _typical_px(
    areas_px: npt.NDArray[np.integer[Any]], whole: npt.NDArray[np.bool_], model_cell_px: float | None
) -> float:
    """Area in px of a whole cell, from the image's ``whole`` cells (n,) and the model's cell.

    Without a model, the median of the whole cells is used however few they are; without any, that of the cut cells.
    """
    if model_cell_px is None:
        known = areas_px[whole] if whole.any() else areas_px
        return float(np.median(known)) if len(known) else 0.0
    cells = areas_px[whole & (areas_px >= _SMALLEST_CELL * model_cell_px)]
    return model_cell_px if len(cells) < _FEW_CELLS else float(np.median(cells))
