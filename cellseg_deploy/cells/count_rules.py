"""Which cells count, where the image border cuts some.

``all``              every cell that was found, whole or cut. Right for the number in this very picture; too many
                     for a density, because a cell on the border of two neighbouring fields is counted in both.
``exclude-border``   none that touches the border. Right for shape and size, which a cut cell does not have; too few
                     for a density, and large cells are lost more often than small ones.
``frame``            the unbiased counting frame (Gundersen, Notes on the estimation of the numerical density of
                     arbitrary profiles: the edge effect, J. Microsc. 111 (1977) 219-223) with the picture as the
                     frame: cells that touch the left or the bottom side are out, those at the top or the right side
                     are in; out where a cell touches both. Of fields that tile a slide each cell is then counted
                     once, whatever its size, so cells / area is a density without bias, as far as cut cells are found
                     at all: operating points leave out those of which less than a share is seen
                     (``min_border_area_rel``), for these a field counts too few. (Gundersen's forbidden line
                     goes on beyond the frame, where a picture shows nothing: a cell that winds round a corner of the
                     picture may still be counted in two fields.)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

CountRule = Literal["all", "exclude-border", "frame"]
COUNT_RULES: tuple[CountRule, ...] = ("all", "exclude-border", "frame")


def counted(
    boxes: npt.NDArray[np.int64],
    image_hw: tuple[int, int],
    rule: CountRule,
    at_edge: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether each cell counts under ``rule``, bool (n,).

    ``boxes``: left, top, width, height of each cell in px, (n, 4). ``at_edge``: whether the edge of the field of view
    lies at its left, top, right, bottom, bool (n, 4), where the field is not the whole picture; it counts as border.
    Raises ``UsageError`` for an unknown rule.
    """
    check_rule(rule)
    left, top, width, height = boxes.T
    at_left, at_bottom = left == 0, top + height == image_hw[0]
    at_top, at_right = top == 0, left + width == image_hw[1]
    if at_edge is not None:
        at_left, at_top, at_right, at_bottom = (
            here | edge for here, edge in zip((at_left, at_top, at_right, at_bottom), at_edge.T, strict=True)
        )
    if rule == "all":
        return np.ones(len(boxes), np.bool_)
    if rule == "frame":
        return np.asarray(~(at_left | at_bottom))
    return np.asarray(~(at_left | at_bottom | at_top | at_right))


def check_rule(rule: str) -> None:
    """Raise ``UsageError`` if there is no such rule."""
    if rule not in COUNT_RULES:
        raise UsageError(f"count rule must be one of {', '.join(COUNT_RULES)}, got {rule!r}")
