"""Cells that the border cuts: all visible ones are labelled, and by the rule ``half`` neighbouring fields add up."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_spec

from cellseg_deploy import Segmenter
from cellseg_deploy.cells.count_rules import CountRule, counted
from cellseg_deploy.cells.instances import join_fragments, segment
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import ThresholdParams
from cellseg_deploy.samples import SmearParams, make_smear

RADIUS = 20
DISC_PX = int(np.pi * RADIUS**2)
WHOLE = [(x, y) for x in range(60, 260, 50) for y in range(60, 260, 50)]


def field_with(cut: tuple[float, float], whole: list[tuple[int, int]] = WHOLE, radius: float = RADIUS) -> np.ndarray:
    """Label image of 300 x 300 px with whole discs, and as the last one a disc around ``cut``, (x, y)."""
    labels = np.zeros((300, 300), np.int32)
    y, x = np.mgrid[:300, :300]
    for number, (cx, cy) in enumerate(whole, start=1):
        labels[(x - cx) ** 2 + (y - cy) ** 2 <= RADIUS**2] = number
    labels[(x - cut[0]) ** 2 + (y - cut[1]) ** 2 <= radius**2] = len(whole) + 1
    return labels


def counts(labels: np.ndarray, rule: CountRule = "half", model_cell_px: float | None = DISC_PX) -> list[bool]:
    table = measure(labels)
    areas = table.columns["area_px"]
    result = counted(table.boxes, labels.shape, rule, areas_px=areas, model_cell_px=model_cell_px)
    return [bool(value) for value in result]


@pytest.mark.parametrize("side", ["left", "top", "right", "bottom"])
@pytest.mark.parametrize(("inside", "expected"), [(-17, False), (-6, False), (-2, False), (2, True), (6, True)])
def test_a_disc_cut_by_a_side_counts_from_its_half_on(side: str, inside: float, expected: bool) -> None:
    """``inside``: how far its centre lies within the side."""
    far = 299 - inside
    at = {"left": (inside, 30), "top": (30, inside), "right": (far, 30), "bottom": (30, far)}[side]
    found = counts(field_with(at))
    assert all(found[:-1])
    assert found[-1] is expected


@pytest.mark.parametrize(
    ("centre", "share", "expected"),
    [((0, 0), 0.27, False), ((4, 4), 0.4, False), ((5, 8), 0.5, True), ((10, 10), 0.67, True), ((20, -8), 0.26, False)],
)
def test_a_disc_cut_by_a_corner_counts_from_its_half_on(
    centre: tuple[float, float], share: float, expected: bool
) -> None:
    labels = field_with(centre)
    assert np.count_nonzero(labels == labels.max()) / DISC_PX == pytest.approx(share, abs=0.03)
    assert counts(labels)[-1] is expected


def test_where_few_cells_are_whole_the_model_s_cell_is_the_measure() -> None:
    labels = field_with((1, 30), whole=WHOLE[:7])
    assert counts(labels)[-1]
    assert not counts(labels, model_cell_px=1.3 * DISC_PX)[-1]
    assert counts(field_with((1, 30)), model_cell_px=1.3 * DISC_PX)[-1]  # sixteen say that cells are smaller here
    assert counts(labels, model_cell_px=None)[-1]


def test_specks_are_no_measure_of_a_cell() -> None:
    labels = field_with((-10, 30))
    for number, left in enumerate(range(5, 290, 6), start=100):  # 48 platelets
        labels[290:293, left : left + 3] = number
    assert not counts(labels)[len(WHOLE)]


def test_half_needs_areas() -> None:
    with pytest.raises(UsageError, match="give areas_px"):
        counted(np.zeros((1, 4), np.int64), (9, 9), "half")


PARAMS = ThresholdParams(min_area_rel=0.2, min_border_area_rel=0.5)


def test_every_visible_cell_is_labelled_and_noise_is_not() -> None:
    foreground = np.zeros((1, 300, 300), np.float32)
    for x, depth in ((20, 12), (80, 6), (140, 4), (200, 1)):  # 0.38, 0.19, 0.13 and 0.03 of a cell of 40 px
        foreground[0, :depth, x : x + 40] = 1
    foreground[0, 120:134, 20:34] = 1  # 0.16 of a cell, away from the border: a speck
    foreground[0, 120:160, 100:140] = 1
    found = segment(foreground, ("foreground",), PARAMS, cell_diameter_px=40, border_cells="visible")
    assert sorted(np.bincount(found.reshape(-1))[1:].tolist()) == [40, 160, 240, 480, 1600]
    foreground[0, 0, 200:240] = 0
    foreground[0, 0, 200:230] = 1
    found = segment(foreground, ("foreground",), PARAMS, cell_diameter_px=40, border_cells="visible")
    assert found.max() == 4  # a strip of 30 px is below three hundredths
    by_model = segment(foreground, ("foreground",), PARAMS, cell_diameter_px=40)
    assert by_model.max() == 1


def test_a_fragment_at_the_border_belongs_to_the_cell_it_was_split_from() -> None:
    labels = np.zeros((8, 12), np.int32)
    labels[0:6, 0:4] = 1
    labels[0:6, 4] = 2  # a strip along the cell: six pixels of common line, one at the border
    labels[0:1, 5:10] = 3  # the end of another cell: five at the border, one pixel of common line with the strip
    assert (join_fragments(labels, 10) == labels).all()
    joined = join_fragments(labels, 10, at_border=True)
    assert (joined == np.where(labels == 2, 1, labels)).all()


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r"border cells must be one of visible, model, got 'some'"):
        Segmenter(DarknessBackend(), border_cells="some")  # type: ignore[arg-type]


def test_quarters_of_smears_add_up_to_the_whole() -> None:
    """By ``half`` and ``frame``; with the limit of the model ``frame`` lost slivers, and ``all`` counts twice."""
    spec = make_spec(
        tile_size=224, halo=16, image_scale=0.5, cell_diameter_px=20.0, operating_points={"counting": PARAMS}
    )
    totals: dict[tuple[str, str], list[int]] = {}
    for seed in range(4):
        params = SmearParams(
            size_hw=(900, 1200),
            n_cells=160,
            cell_diameter_px=40,
            clustering=0,
            overlap=0,
            rouleaux=0,
            pallor=0,
            debris=0,
        )
        truth = make_smear(params, seed).labels_hw
        shown = np.where(truth[..., np.newaxis] > 0, 40, 215).astype(np.uint8).repeat(3, axis=2)
        quarters = [shown[top : top + 450, left : left + 600] for top in (0, 450) for left in (0, 600)]
        for border in ("visible", "model"):
            segmenter = Segmenter(DarknessBackend(spec), border_cells=border)  # type: ignore[arg-type]
            whole, *parts = (segmenter(np.ascontiguousarray(picture)) for picture in (shown, *quarters))
            for rule in ("half", "frame", "all"):
                pair = totals.setdefault((border, rule), [0, 0])
                pair[0] += int(whole.counted(rule).sum())  # type: ignore[arg-type]
                pair[1] += sum(int(part.counted(rule).sum()) for part in parts)  # type: ignore[arg-type]
    error = {key: (parts - whole) / whole for key, (whole, parts) in totals.items()}
    assert totals["visible", "half"][0] > 500
    assert abs(error["visible", "half"]) <= 0.02
    assert abs(error["visible", "frame"]) <= 0.02
    assert error["model", "frame"] < -0.03
    assert error["visible", "all"] > 0.06


def test_the_edge_of_a_round_field_is_border() -> None:
    """Discs as in ``test_field_of_view``: those cut by the edge are there, and counted from about their half on."""
    y, x = np.ogrid[:600, :800]
    field = (x - 400) ** 2 + (y - 300) ** 2 <= 280**2
    centres = [(x, y) for x in range(140, 680, 40) for y in range(40, 580, 40)]
    picture = draw_discs((600, 800), centres)
    picture[~field] = 0
    found = Segmenter(DarknessBackend())(picture)
    assert found.field is not None
    inside = sum(bool(found.field[y, x]) for x, y in centres)
    border = found.table.columns["touches_border"]
    assert int(found.counted().sum()) == pytest.approx(inside, rel=0.03)
    assert 0 < int((found.counted() & border).sum()) < int(border.sum())
    assert int(found.counted("exclude-border").sum()) == int((~border).sum())
