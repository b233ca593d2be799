"""``python -m cellseg_benchmarks robustness``: what is changed in an image, and what becomes of the counts."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cellseg_benchmarks.cli import command
from cellseg_benchmarks.quality import robustness
from cellseg_deploy.cli.console import run


def square(shade: int = 100) -> tuple[Any, Any]:
    """A dark square of 20 px on light ground, with its truth."""
    image, labels = np.full((40, 60, 3), 200, np.uint8), np.zeros((40, 60), np.int32)
    image[10:30, 10:30], labels[10:30, 10:30] = shade, 1
    return image, labels


def dark(image_hwc: Any) -> Any:
    """Stands in for a Segmenter: what is darker than 150 is one cell."""
    return SimpleNamespace(labels=(image_hwc[..., 1] < 150).astype(np.int32))


def test_one_changes_nothing() -> None:
    image, labels = square()
    for condition in robustness.CONDITIONS:
        assert 1.0 in robustness.CONDITIONS[condition]
        same, truth = robustness.changed(image, labels, condition, 1.0)
        assert np.array_equal(same, image)
        assert np.array_equal(truth, labels)


def test_what_the_conditions_do() -> None:
    image, labels = square()
    half, truth = robustness.changed(image, labels, "size", 0.5)
    assert (half.shape, truth.shape, np.count_nonzero(truth)) == ((20, 30, 3), (20, 30), 100)
    stained, same = robustness.changed(image, labels, "stain", 2.0)
    assert same is labels
    assert stained[0, 0].tolist() == [round(200 * 200 / 255)] * 3  # twice the optical density: transmission squared
    bright, _ = robustness.changed(image, labels, "brightness", 1.2)
    assert bright[20, 20].tolist() == [120] * 3
    assert robustness.changed(image, labels, "brightness", 2.0)[0].max() == 255
    cast, _ = robustness.changed(image, labels, "cast", 1.44)
    assert cast[20, 20].tolist() == [120, 100, 83]
    with pytest.raises(ValueError, match="condition must be one of size, stain"):
        robustness.changed(image, labels, "focus", 2.0)


def test_rows_tell_where_it_breaks() -> None:
    segmenters: Any = {robustness.FIXED: dark, robustness.AUTO: dark}
    rows = robustness.conditions(segmenters, lambda: [square(), square(140)], min_area_px=20)
    n_sizes = len(robustness.SIZES)
    assert len(rows) == sum(len(values) for values in robustness.CONDITIONS.values()) + n_sizes  # sizes at both scales
    found = {(row.condition, row.value, row.scale): row.figures for row in rows}
    assert found["size", 0.5, robustness.AUTO]["f1"] == 1
    assert found["brightness", 1.0, robustness.FIXED]["count_mape"] == 0
    assert found["brightness", 1.2, robustness.FIXED]["n_predicted"] == 1  # 140 became 168
    assert found["brightness", 1.2, robustness.FIXED]["count_bias"] == -0.5
    assert found["brightness", 1.2, robustness.FIXED]["f1"] < found["brightness", 1.0, robustness.FIXED]["f1"] == 1


def test_cells_cut_by_the_border_count_neither_way_in_the_inner_columns() -> None:
    image, labels = square()
    image[:8, 40:50] = 100  # a cell at the border that the ground truth, as masks do, left out

    def two(image_hwc: Any) -> Any:
        found = (image_hwc[..., 1] < 150).astype(np.int32)
        found[: found.shape[0] // 4] *= 2
        return SimpleNamespace(labels=found)

    segmenters: Any = {robustness.FIXED: two, robustness.AUTO: two}
    rows = robustness.conditions(segmenters, lambda: [(image, labels)], min_area_px=20)
    (usual,) = (row.figures for row in rows if (row.condition, row.value) == ("stain", 1.0))
    assert (usual["f1_inner"], usual["count_mape_inner"]) == (1, 0)
    assert (usual["f1"], usual["count_mape"]) == (2 / 3, 1)


def test_specks_are_judged_by_the_truths_size() -> None:
    """A square of 100 px: a fixed limit of 200 px would take it for a speck."""
    stub: Any = Stub(SimpleNamespace(min_object_rel=None))
    image, labels = square()
    small = (image[::2, ::2], labels[::2, ::2])
    assert small[1].sum() == 100
    rows = robustness.conditions({robustness.FIXED: stub, robustness.AUTO: stub}, lambda: [small])
    found = {(row.condition, row.value, row.scale): row.figures for row in rows}
    assert found["brightness", 1.0, robustness.FIXED]["n_true"] == 1


class Stub:
    """``dark`` as a Segmenter with a model."""

    def __init__(self, spec: Any) -> None:
        self.backend = SimpleNamespace(spec=spec)

    def __call__(self, image_hwc: Any) -> Any:
        return dark(image_hwc)


def test_crowding_is_made_as_it_is_called() -> None:
    def touching(image: Any, labels: Any) -> float:
        """Share of cell pixels with another cell to the right or below."""
        right, below = labels[:, 1:], labels[1:]
        pairs = ((labels[:, :-1], right), (labels[:-1], below))
        return sum(np.count_nonzero((a > 0) & (b > 0) & (a != b)) for a, b in pairs) / np.count_nonzero(labels)

    shares = {
        level: np.mean([touching(*made) for made in robustness._smears(level, 0.5, 0)]) for level in robustness.CROWDING
    }
    assert shares["apart"] < shares["overlapping"] < shares["crowded"]
    (image, _), *_ = robustness._smears("apart", 0.5, 0)
    assert image.shape == (450, 600, 3)


def test_the_command_leaves_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(robustness, "CONDITIONS", {"size": (0.5,), "stain": (1.0,)})
    monkeypatch.setattr(robustness, "CROWDING", {"apart": robustness.CROWDING["apart"]})
    monkeypatch.setattr(robustness, "CROWDING_SIZES", (0.5,))
    monkeypatch.setattr(robustness, "SMEARS", 1)
    out = tmp_path / "out"
    assert run(command, ["robustness", "-o", str(out), "--quiet"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "conditions.png",
        "crowding.png",
        "robustness.csv",
        "robustness.md",
    ]
    with (out / "robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["condition"], row["scale"]) for row in rows] == [
        ("size", robustness.FIXED),
        ("size", robustness.AUTO),
        ("stain", robustness.FIXED),
        ("apart", robustness.FIXED),
        ("apart", robustness.AUTO),
    ]
    assert float(rows[2]["f1"]) > 0.9
    assert "| stain | 1 |" in capsys.readouterr().out
    assert run(command, ["robustness", "-o", str(out)]) == 6
    assert run(command, ["robustness", "-o", str(tmp_path / "x"), "--images", str(tmp_path)]) == 2
