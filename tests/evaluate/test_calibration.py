"""The search for settings, on probabilities whose best settings are known by construction."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cellseg_deploy.cells.probability_calibration import reliability
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.evaluate import calibration
from cellseg_deploy.evaluate.calibration import Labelling, Scorer
from cellseg_deploy.evaluate.probability_store import kept_images
from cellseg_deploy.evaluate.sweep import METRICS, rows, sweep
from cellseg_deploy.models.spec import BoundaryParams, DistanceParams, InstanceParams, ThresholdParams

LABELLING = Labelling(("foreground",), 20.0, 0)


@dataclass(frozen=True)
class Judged:
    probabilities_khw: npt.NDArray[np.floating]
    true_labels: npt.NDArray[np.integer]


def smear(seed: int, bridge: float = 0.66) -> Judged:
    """Pairs of squares (16 x 16, 0.97) two px apart, with ``bridge`` between: parted at 0.7 and no lower."""
    probabilities = np.full((1, 80, 120), 0.02, np.float32)
    true = np.zeros((80, 120), np.int32)
    rng = np.random.default_rng(seed)
    number = 0
    for top in (4, 30, 56):
        for left in (4, 44, 84):
            shift = int(rng.integers(0, 3))
            for x in (left, left + 18):
                number += 1
                window = np.s_[top + shift : top + shift + 16, x : x + 16]
                true[window] = number
                probabilities[0][window] = 0.97
            probabilities[0, top + shift : top + shift + 16, left + 16 : left + 18] = bridge
    return Judged(probabilities.astype(np.float16), true)


ITEMS = [smear(seed) for seed in range(4)]
START: dict[str, InstanceParams] = {
    "counting": ThresholdParams(foreground_threshold=0.5),
    "confluence": ThresholdParams(foreground_threshold=0.5),
}


def test_the_search_finds_the_threshold_that_parts_the_cells() -> None:
    scorer = Scorer(ITEMS, LABELLING)
    chosen = calibration.search(scorer, [START["counting"]], "counting")
    assert chosen.foreground_threshold == 0.7  # 0.7 to 0.95 part them alike: the first stays
    assert calibration.figures(scorer.scores(chosen, range(4)))["f1_apart"] == 1
    assert chosen.min_area_rel == START["counting"].min_area_rel  # nothing is changed without a gain


def test_a_choice_is_made_on_the_images_named_and_on_no_other() -> None:
    """Two images of each kind: what the second kind needs must not leak into the choice for the first."""
    items = [smear(0), smear(1), smear(2, bridge=0.92), smear(3, bridge=0.92)]
    scorer = Scorer(items, LABELLING)
    starts = [START["counting"]]
    assert calibration.search(scorer, starts, "counting", [0, 1]).foreground_threshold == 0.7
    assert calibration.search(scorer, starts, "counting", [2, 3]).foreground_threshold == 0.95
    fit = calibration.cross_fit(scorer, starts, "counting", [[0, 1], [2, 3]])
    assert [choice.foreground_threshold for choice in fit.choices] == [0.95, 0.7]
    f1 = [score.f1_at(0.5) for score in fit.scores]
    assert f1[:2] == [1, 1]
    assert max(f1[2:]) < 0.7  # chosen on the others: held out means held out


def test_every_image_is_held_out_once() -> None:
    assert sorted(image for fold in calibration.deal(11) for image in fold) == list(range(11))
    assert len(calibration.deal(11)) == 5
    assert calibration.deal(2) == [[0], [1]]
    with pytest.raises(UsageError, match="at least 2 images"):
        calibration.deal(1)
    with pytest.raises(UsageError, match="at least one image"):
        calibration.search(Scorer([], LABELLING), [ThresholdParams()], "counting")


def test_each_score_is_computed_once_and_alike_in_parallel() -> None:
    calls: list[int] = []

    class Counting(Labelling):
        def score(self, item: Any, params: Any, thresholds: Any = (0.5,)) -> Any:
            calls.append(id(item))
            return super().score(item, params, thresholds)

    one, many = Scorer(ITEMS, Counting(("foreground",), 20.0, 0)), Scorer(ITEMS, LABELLING, workers=3)
    assert one.scores(ThresholdParams(), [0, 1]) == many.scores(ThresholdParams(), [0, 1])
    assert one.scores(ThresholdParams(), range(4)) == many.scores(ThresholdParams(), range(4))
    assert (len(calls), one.n_tried) == (4, 1)


def pooled(**values: float) -> dict[str, float]:
    return {"f1_apart": 0.9, "count_mape_apart": 0.05, "dice": 0.95, "area_error": 0.02} | values


def test_rank() -> None:
    def counting(**values: float) -> tuple[float, ...]:
        return calibration.rank("counting", pooled(**values))

    def confluence(**values: float) -> tuple[float, ...]:
        return calibration.rank("confluence", pooled(**values))

    assert counting(f1_apart=0.92) > counting(count_mape_apart=0)
    assert counting(f1_apart=0.901, count_mape_apart=0.06) < counting()  # within noise: the count error decides
    assert counting(dice=0.96) > counting()
    assert counting(count_mape_apart=math.nan) >= counting(count_mape_apart=0)
    assert confluence(dice=0.96) > confluence(area_error=0)
    assert confluence(dice=0.9501, area_error=0.03) < confluence()
    assert confluence(f1_apart=1) == confluence()


@pytest.mark.parametrize("params", [ThresholdParams(), BoundaryParams(), DistanceParams()])
def test_axes_are_settings_of_the_method(params: InstanceParams) -> None:
    names = [name for task in ("counting", "confluence") for g in calibration.search_axes(params, task) for name in g]  # type: ignore[arg-type]
    assert set(names) <= set(params.__struct_fields__)
    assert ("seed_threshold" in names) == ("seed_threshold" in params.__struct_fields__)
    for group in calibration.search_axes(params, "confluence"):
        assert "seed_threshold" not in group


def test_other_methods_are_tried_too_and_the_model_s_own_first() -> None:
    own = BoundaryParams(seed_threshold=0.77)
    starts = calibration.starting_points({"counting": own}, "counting", "boundary")
    assert [type(start) for start in starts] == [BoundaryParams, ThresholdParams]
    assert starts[0] == own
    assert [type(s) for s in calibration.starting_points({}, "counting", "distance")] == [
        ThresholdParams,
        DistanceParams,
    ]


def test_intervals_hold_the_figure_and_narrow_with_more_images() -> None:
    scores = Scorer([smear(0), smear(1, bridge=0.9)] * 3, LABELLING).scores(
        ThresholdParams(foreground_threshold=0.7), range(6)
    )
    few = calibration.intervals(scores, ["f1", "dice"], repeats=200)
    many = calibration.intervals(scores * 6, ["f1", "dice"], repeats=200)
    f1 = calibration.figures(scores)["f1"]
    assert few["f1"][0] < f1 < few["f1"][1]
    assert many["f1"][1] - many["f1"][0] < 0.7 * (few["f1"][1] - few["f1"][0])
    assert few == calibration.intervals(scores, ["f1", "dice"], repeats=200)


def test_calibrate_says_how_much_it_matters() -> None:
    found = calibration.calibrate(Scorer(ITEMS, LABELLING), START, "plain")["counting"]
    assert found.before == START["counting"]
    assert found.before_figures is not None
    assert found.before_figures["f1_apart"] < 0.7
    assert (found.fit_figures["f1_apart"], found.fit_figures["map"]) == (1, 1)
    assert found.before_figures["map"] < 0.7
    moved = {step.value: step.figures["f1_apart"] for step in found.steps if step.parameter == "foreground_threshold"}
    assert moved[0.6] < 0.7
    assert moved[0.95] == 1


def test_sweep_moves_one_threshold_at_a_time() -> None:
    points = sweep(ITEMS, LABELLING, [ThresholdParams()], thresholds=(0.5, 0.8))
    assert [(point.curve, point.threshold) for point in points] == [
        ("threshold: foreground threshold", 0.5),
        ("threshold: foreground threshold", 0.8),
    ]
    assert points[0].figures["f1"] < 0.7
    assert points[1].figures["f1"] == 1
    assert points[1].figures["map"] == 1
    assert "map" not in calibration.figures(Scorer(ITEMS, LABELLING).scores(ThresholdParams(), [0]))
    table = rows(points)
    assert table[0][3:] == list(METRICS)
    assert table[2][:3] == ["threshold", "foreground_threshold", 0.8]
    labelling = Labelling(("foreground", "boundary"), 20.0, 0)
    items = [Judged(np.repeat(item.probabilities_khw, 2, axis=0), item.true_labels) for item in ITEMS[:1]]
    both = sweep(items, labelling, [BoundaryParams()], thresholds=(0.5,))
    assert [point.parameter for point in both] == ["foreground_threshold", "seed_threshold"]


def test_reliability_by_hand() -> None:
    """Twelve pixels at 0.25 of which four are cell, four at 1.0 of which one is not: ECE = (1 + 1) / 16."""
    probabilities = np.full((4, 4), 0.25)
    probabilities[3] = 1.0
    true = np.zeros((4, 4), np.int32)
    true[0] = 1
    true[3, 1:] = 2
    found = reliability(probabilities, true, bins=4)
    assert found.pixels.tolist() == [0, 12, 0, 4]
    assert found.ece == pytest.approx(1 / 8)
    assert [values.tolist() for values in found.curve] == [[0.25, 1.0], [1 / 3, 0.75]]
    assert (found + found).ece == pytest.approx(found.ece)
    doubled = reliability(probabilities, true.repeat(2, axis=0).repeat(2, axis=1), bins=4)
    assert doubled.cell.tolist() == found.cell.tolist()
    with pytest.raises(UsageError, match="probabilities"):
        reliability(probabilities[None], true)


def test_kept_images_come_back_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    big = ITEMS[0].true_labels.astype(np.int32) * 70_000
    with kept_images() as kept:
        kept.add("a", ITEMS[0].probabilities_khw.astype(np.float32), ITEMS[0].true_labels)
        kept.add("b", ITEMS[1].probabilities_khw, big)
        assert np.array_equal(kept[0].probabilities_khw, ITEMS[0].probabilities_khw)
        assert kept[0].true_labels.dtype == np.uint16
        assert np.array_equal(kept[1].true_labels, big)
        assert [item.name for item in kept] == ["a", "b"]
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_kept_is_swept_and_what_a_running_one_keeps_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import time, numpy as np; from cellseg_deploy.evaluate.probability_store import kept_images\n"
        "with kept_images() as kept:\n"
        "    kept.add('a', np.zeros((1, 4, 4), np.float32), np.zeros((4, 4), np.int32))\n"
        "    print(kept[0]._base.parent, flush=True); time.sleep(60)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "cellseg-notes").mkdir()  # somebody else's, whatever its name
    try:
        killed, running = (Path(process.stdout.readline().strip()) for process in both if process.stdout)
        assert (killed / "0.p.npy").exists()
        assert killed.stat().st_mode & 0o077 == 0  # nobody else may look at the photographs' masks
        both[0].send_signal(signal.SIGKILL)
        both[0].wait()
        assert (killed / "0.p.npy").exists()
        with kept_images():
            assert not killed.exists()
            assert (running / "0.p.npy").exists()
    finally:
        for process in both:
            process.kill()
            process.communicate()
    with kept_images():
        assert not running.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cellseg-notes"]


def test_no_place_to_keep_anything_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match=r"no temporary folder can be made .*nowhere.* set TMPDIR"), kept_images():
        pass
