"""Label images against boxes and points, worked out by hand. Cells are rectangles, so that their boxes are exact."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cellseg_deploy.annotations.objects import Boxes, Points
from cellseg_deploy.annotations.score import ClassScore, at_border, intersections, pool_marks, score_marks, unmarked
from cellseg_deploy.cells.ignored import IGNORED

Box = tuple[int, int, int, int]


def labels_of(*cells: Box, hw: tuple[int, int] = (100, 100)) -> npt.NDArray[np.int32]:
    labels = np.zeros(hw, np.int32)
    for number, (left, top, right, bottom) in enumerate(cells, 1):
        labels[top:bottom, left:right] = 2 * number  # numbers with gaps
    return labels


def boxes_of(*boxes: Box, classes: tuple[str, ...] | None = None) -> Boxes:
    return Boxes(np.array(boxes, np.float64).reshape(-1, 4), classes or ("",) * len(boxes))


def points_of(*points: tuple[float, float], classes: tuple[str, ...] | None = None) -> Points:
    return Points(np.array(points, np.float64).reshape(-1, 2), classes or ("",) * len(points))


def test_intersection_and_union() -> None:
    common, union = intersections(
        boxes_of((0, 0, 10, 10)).boxes_xyxy, boxes_of((5, 0, 15, 10), (20, 0, 30, 5)).boxes_xyxy
    )
    assert common.tolist() == [[50, 0]]
    assert union.tolist() == [[150, 150]]


def test_the_border_is_one_px_wide() -> None:
    boxes = boxes_of((1, 20, 9, 30), (2, 20, 9, 30), (20, 20, 99, 30), (20, 20, 98, 30), (20, 20, 30, 50))
    assert at_border(boxes.boxes_xyxy, (51, 100)).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(("shift", "hits"), [(0, 1), (10, 1), (11, 0)])
def test_a_shifted_box_is_hit_to_an_iou_of_one_half(shift: int, hits: int) -> None:
    """30 px wide, shifted by 10: 20 in common, 40 in the union."""
    score = score_marks(boxes_of((20, 20, 50, 50)), labels_of((20 + shift, 20, 50 + shift, 50)))
    assert (score.n_true, score.n_predicted, score.hits) == (1, 1, hits)


def test_a_match_is_one_to_one() -> None:
    """Both halves of the cell have an IoU of 1/2 with it: one hit, and one piece."""
    score = score_marks(boxes_of((20, 20, 60, 60)), labels_of((20, 20, 40, 60), (40, 20, 60, 60)))
    assert (score.hits, score.n_predicted, score.pieces, score.merges) == (1, 2, 1, 0)


def test_pairs_are_chosen_so_that_most_are_hit() -> None:
    """The first cell fits both boxes, the second only the first box."""
    true = boxes_of((20, 20, 50, 50), (29, 20, 59, 50))
    score = score_marks(true, labels_of((25, 20, 55, 50), (11, 20, 25, 50)))
    assert score.hits == 1
    score = score_marks(true, labels_of((30, 20, 55, 50), (15, 20, 30, 50)))
    assert score.hits == 1
    apart = score_marks(true, labels_of((40, 20, 59, 50), (20, 20, 40, 50)))
    assert apart.hits == 2
    assert apart.overlapping == (2, 2)


def test_a_merge_holds_two_boxes_that_nobody_else_matches() -> None:
    true = boxes_of((20, 20, 40, 40), (40, 20, 60, 40))
    merged = score_marks(true, labels_of((20, 20, 60, 40)))
    assert (merged.merges, merged.pieces, merged.n_predicted) == (1, 0, 1)
    nested = boxes_of((20, 20, 60, 60), (40, 40, 60, 60))  # as a platelet on a cell, which was found too
    labels = labels_of((20, 20, 60, 60), (42, 42, 60, 60))
    labels[45:60, 45:60] = 2  # most of the small box is the large cell's
    assert score_marks(nested, labels).merges == 0


def test_border_objects_count_neither_way() -> None:
    true = boxes_of((0, 20, 20, 40), (40, 40, 60, 60))
    labels = labels_of((2, 20, 20, 40), (40, 40, 60, 60), (80, 80, 100, 100))  # the first matches a box at the border
    score = score_marks(true, labels)
    assert (score.n_true, score.n_predicted, score.hits, score.left_out) == (1, 1, 1, (1, 2))
    reaching = score_marks(boxes_of((2, 20, 20, 40)), labels_of((0, 20, 20, 40)))  # matches a box that counts
    assert (reaching.n_true, reaching.n_predicted, reaching.hits) == (1, 1, 1)


def test_other_classes_count_neither_way() -> None:
    true = boxes_of((20, 20, 40, 40), (50, 50, 70, 70), classes=("RBC", "WBC"))
    labels = labels_of((20, 20, 40, 40), (50, 50, 70, 70), (80, 20, 90, 30))
    score = score_marks(true, labels, classes=["RBC"])
    assert (score.n_true, score.n_predicted, score.hits) == (1, 2, 1)
    assert score.by_class == {"RBC": ClassScore(1, 1, 0)}


def test_pieces_belong_to_the_box_they_lie_in() -> None:
    true = boxes_of((20, 20, 60, 60), (55, 20, 75, 60), classes=("WBC", "RBC"))
    score = score_marks(true, labels_of((30, 30, 40, 40), (42, 42, 54, 54), (57, 21, 75, 59), (80, 80, 90, 90)))
    assert (score.pieces, score.hits, score.n_predicted) == (2, 1, 4)
    assert score.by_class == {"RBC": ClassScore(1, 1, 0), "WBC": ClassScore(1, 0, 2)}


def test_points() -> None:
    """One point in a cell, two in the next, none in the third; one beside all."""
    true = points_of((15, 15), (35, 15), (45, 15), (50, 80))
    score = score_marks(true, labels_of((10, 10, 20, 20), (30, 10, 50, 20), (60, 60, 70, 70)))
    assert (score.n_true, score.n_predicted, score.hits, score.merges) == (4, 3, 1, 1)


def test_points_at_the_border() -> None:
    """Cells inside have 400 px, a diameter of 22.6 px: 11.3 px from the border is near it."""
    true = points_of((5, 50), (50, 11), (50, 12), (35, 35), (100, 100))
    score = score_marks(true, labels_of((0, 40, 20, 60), (30, 30, 50, 50)))
    assert (score.n_true, score.n_predicted, score.hits) == (2, 1, 1)
    assert score.left_out == (3, 1)


def test_points_of_other_classes() -> None:
    """A cell of another class is left out; in a cell with both the point asked for is missed."""
    true = points_of((15, 15), (35, 15), (45, 15), classes=("b", "a", "b"))
    score = score_marks(true, labels_of((10, 10, 20, 20), (30, 10, 50, 20)), classes=["a"])
    assert (score.n_true, score.n_predicted, score.hits, score.merges) == (1, 1, 0, 1)


def test_objects_that_nobody_marked_count_neither_way() -> None:
    """Objects: one with a point, two without, one of unknown instance. On each lies a cell; one lies beside all."""
    cells = ((10, 10, 20, 20), (30, 10, 40, 20), (50, 10, 60, 20), (70, 10, 80, 20), (30, 60, 40, 70))
    objects = labels_of(*cells[:3])
    objects[10:20, 70:80] = IGNORED
    objects[10:20, 55:60] = 0  # half of that cell is on the object, half on background
    true = points_of((15, 15), (50, 80), classes=("red", "red"))
    without = unmarked(true, objects)
    assert np.array_equal(without, (objects > 0) & (objects != 2))
    score = score_marks(true, labels_of(*cells), unmarked_hw=without)
    assert (score.n_true, score.n_predicted, score.hits, score.left_out) == (2, 3, 1, (0, 2))
    assert score_marks(true, labels_of(*cells)).n_predicted == 5
    moved = points_of((15, 15), (35, 15))  # a cell with a point is judged by that, wherever it lies
    assert score_marks(moved, labels_of(*cells), unmarked_hw=without).hits == 2


def test_specks_and_nothing() -> None:
    assert score_marks(boxes_of(), labels_of((20, 20, 30, 30)), min_area_px=101).n_predicted == 0
    for empty in (boxes_of(), points_of()):
        pooled = pool_marks([score_marks(empty, labels_of())])
        assert (pooled["f1"], pooled["precision"], pooled["recall"], pooled["by_class"]) == (1, 1, 1, {})
    assert pool_marks([score_marks(points_of((50, 50)), labels_of())])["f1"] == 0


def test_pooling_adds_up_before_it_divides() -> None:
    one = score_marks(boxes_of((20, 20, 40, 40), classes=("a",)), labels_of((20, 20, 40, 40)))
    none = score_marks(boxes_of((20, 20, 40, 40), (50, 50, 60, 60), classes=("a", "a")), labels_of())
    pooled = pool_marks([one, none])
    assert (pooled["recall"], pooled["precision"], pooled["f1"]) == (1 / 3, 1, 2 / 4)
    assert (pooled["count_mae"], pooled["count_bias"]) == (1, -1)
    assert pooled["by_class"] == {"a": {"n": 3, "found": 1, "recall": 1 / 3, "pieces": 0}}
