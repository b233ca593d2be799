"""Label images made from boxes or points and the foreground of a teacher."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cellseg_deploy.annotations.objects import Boxes, Points
from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cli import console
from cellseg_deploy.images.read import read_labels
from cellseg_deploy.samples import write_samples
from cellseg_deploy.segmenter import Segmenter
from cellseg_train.checkpoint import load_record
from cellseg_train.cli import command
from cellseg_train.truth import labels_from_boxes, labels_from_points

SMALL = ["--tile-size", 112, "--tiny-width", 48, "--tiny-depth", 1, "--decoder-channels", "16,16,8"]
FAST = [*SMALL, "--image-skip", "none", "--epochs", 1, "--image-scale", 0.4, "--device", "cpu", "--threads", 1]


def disc(mask: np.ndarray, x: int, y: int, radius: int) -> None:
    cv2.circle(mask.view(np.uint8), (x, y), radius, 1, -1)


def empty(height: int = 100, width: int = 160) -> np.ndarray:
    return np.zeros((height, width), np.bool_)


def boxes(*corners: tuple[float, float, float, float], names: tuple[str, ...] = ()) -> Boxes:
    return Boxes(np.array(corners, np.float64).reshape(-1, 4), names or ("RBC",) * len(corners))


def test_overlapping_cells_are_cut_along_the_crossings_of_their_outlines():
    foreground = empty()
    disc(foreground, 50, 50, 20)
    disc(foreground, 80, 50, 20)
    labels = labels_from_boxes(foreground, boxes((30, 30, 71, 71), (60, 30, 101, 71)))
    assert (labels[foreground] > 0).all()
    assert (labels[40:60, 36:65] == 1).all()
    assert (labels[40:60, 66:95] == 2).all()


@pytest.mark.parametrize("quarters", range(4))
def test_a_cell_that_the_border_cuts_is_part_of_a_round_one(quarters):
    whole = empty(100, 100)
    disc(whole, 3, 50, 20)
    foreground = np.rot90(whole, quarters)
    y, x = np.nonzero(foreground)
    labels = labels_from_boxes(foreground, boxes((x.min(), y.min(), x.max() + 1, y.max() + 1)))
    assert np.array_equal(labels == 1, foreground)


def test_most_of_the_ellipse_is_a_cell_without_foreground_and_all_of_a_white_one():
    box = (30, 30, 70, 70)
    red = labels_from_boxes(empty(), boxes(box))
    white = labels_from_boxes(empty(), boxes(box, names=("WBC",)))
    area = np.pi * 20**2
    assert np.count_nonzero(red) == pytest.approx(0.92 * area, rel=0.02)
    assert np.count_nonzero(white) == pytest.approx(area, rel=0.02)
    given = labels_from_boxes(empty(), boxes(box, names=("giant",)), ("Giant",))
    assert np.array_equal(given > 0, white > 0)


def test_foreground_in_the_corner_of_a_box_is_of_white_cells_only():
    foreground = empty()
    foreground[30:70, 30:70] = True
    box = (30, 30, 70, 70)
    assert labels_from_boxes(foreground, boxes(box))[30, 30] == IGNORED
    assert labels_from_boxes(foreground, boxes(box, names=("white cell",)))[30, 30] == 1


def test_foreground_without_a_mark_is_unknown_and_no_cell_reaches_far_out():
    foreground = empty()
    disc(foreground, 50, 50, 20)
    disc(foreground, 120, 50, 20)
    foreground[48:52, 50:120] = True
    labels = labels_from_boxes(foreground, boxes((30, 30, 71, 71)))
    assert (labels[:, 76:][foreground[:, 76:]] == IGNORED).all()
    assert (labels[~foreground] == 0).all()


def test_an_image_marked_as_empty_is_background():
    foreground = empty()
    disc(foreground, 50, 50, 20)
    assert not labels_from_boxes(foreground, boxes()).any()


def test_points_share_a_component_and_leave_others_unknown():
    foreground = empty()
    disc(foreground, 40, 50, 20)
    disc(foreground, 70, 50, 20)
    disc(foreground, 130, 50, 20)
    points = Points(np.array([[40.5, 50.5], [70.5, 50.5], [5, 5]]), ("", "", ""))
    labels = labels_from_points(foreground, points, 40.0)
    assert sorted(np.unique(labels)) == [0, 1, 2, IGNORED]  # the third point meets no cell
    assert (labels[45:55, 25:54] == 1).all()
    assert (labels[45:55, 57:85] == 2).all()
    assert (labels[:, 105:][foreground[:, 105:]] == IGNORED).all()


def test_a_point_reaches_no_further_than_a_cell():
    foreground = empty()
    foreground[40:60] = True
    labels = labels_from_points(foreground, Points(np.array([[80.0, 50.0]]), ("",)), 40.0)
    columns = np.flatnonzero((labels == 1).any(axis=0))
    assert (columns.min(), columns.max()) == (50, 109)
    assert labels[50, 5] == IGNORED


def run(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two synthetic smears with the box and the middle of each cell."""
    folder = tmp_path_factory.mktemp("marked")
    write_samples(folder, 2, 5, (300, 400))
    box_rows, point_rows = ["image,class,x0,y0,x1,y1"], ["image,class,x,y"]
    for mask in sorted((folder / "masks").iterdir()):
        labels = read_labels(mask)
        for number in range(1, labels.max() + 1):
            x, y, w, h = cv2.boundingRect((labels == number).astype(np.uint8))
            box_rows.append(f"{mask.stem},RBC,{x},{y},{x + w},{y + h}")
            point_rows.append(f"{mask.stem},RBC,{x + w / 2},{y + h / 2}")
    (folder / "boxes.csv").write_text("\n".join(box_rows) + "\n")
    (folder / "points.csv").write_text("\n".join(point_rows) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_the_command_makes_labels_and_pictures_and_stops(marked, tmp_path, kind, capsys):
    out = tmp_path / "run"
    assert run("--images", marked / "images", f"--{kind}", marked / f"{kind}.csv", "-o", out, "--truth-only") == 0
    assert str(out / "truth" / "pictures") in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["truth"]
    for mask in sorted((marked / "masks").iterdir()):
        made = read_labels(out / "truth" / "labels" / f"{mask.stem}.png")
        assert made.max() == pytest.approx(read_labels(mask).max(), abs=2)
        assert cv2.imread(str(out / "truth" / "pictures" / f"{mask.stem}.jpg")).shape[:2] == made.shape


def test_it_trains_on_what_it_made_and_can_be_resumed(marked, tmp_path):
    out = tmp_path / "run"
    marks = ["--images", marked / "images", "--boxes", marked / "boxes.csv"]
    assert run(*marks, "-o", out, *FAST, "--no-calibrate", "--quiet") == 0
    assert (out / "model.safetensors").is_file()
    assert run("--resume", out, "--quiet") == 0


def test_validation_images_have_boxes_or_points_too(marked, tmp_path, capsys):
    out = tmp_path / "run"
    drawn = ["--images", marked / "images", "--masks", marked / "masks"]
    for kind in ("boxes", "points"):
        val = ["--val-images", marked / "images", f"--val-{kind}", marked / f"{kind}.csv"]
        assert run(*drawn, *val, "-o", out / kind, "--truth-only") == 0
        made = out / kind / "truth"
        assert sorted(path.name for path in made.iterdir()) == ["val-classes.csv", "val-labels", "val-pictures"]
        for mask in (marked / "masks").iterdir():
            labels = read_labels(made / "val-labels" / f"{mask.stem}.png")
            assert labels.max() == pytest.approx(read_labels(mask).max(), abs=2)
    capsys.readouterr()
    for more in (
        ["--val-images", marked / "images"],
        ["--val-boxes", marked / "boxes.csv"],
        [*val, *val[2:], *val[2:]],
    ):
        assert run(*drawn, *more, "-o", tmp_path / "other") == 2
    assert "give --val-images DIR with one of --val-masks DIR, --val-boxes FILE" in capsys.readouterr().err


def test_the_network_is_validated_on_boxes(marked, tmp_path):
    val, out = tmp_path / "val", tmp_path / "run"
    write_samples(val, 1, 6, (300, 400))
    (mask,) = (val / "masks").iterdir()
    labels = read_labels(mask)
    rows = ["image,class,x0,y0,x1,y1"]
    for number in range(1, labels.max() + 1):
        x, y, w, h = cv2.boundingRect((labels == number).astype(np.uint8))
        rows.append(f"{mask.stem},RBC,{x},{y},{x + w},{y + h}")
    (val / "boxes.csv").write_text("\n".join(rows) + "\n")
    both = ["--images", marked / "images", "--boxes", marked / "boxes.csv", "--teacher", "none"]
    both += ["--val-images", val / "images", "--val-boxes", val / "boxes.csv"]
    assert run(*both, "-o", out, *FAST, "--no-calibrate", "--quiet") == 0
    record = load_record(out)
    assert record.inputs.val_masks == (str(out / "truth" / "val-labels"),)
    assert (out / "log.csv").read_text().count("\n") == 2
    assert run("--resume", out, "--quiet") == 0


def test_without_a_teacher_a_box_is_its_ellipse_and_the_rest_background(marked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Segmenter, "load", None)  # no model is read
    common = ["--images", marked / "images", "--teacher", "none", "--truth-only"]
    assert run(*common, "--boxes", marked / "boxes.csv", "-o", tmp_path / "run") == 0
    assert "no teacher: each box is its ellipse" in capsys.readouterr().err
    for mask in (marked / "masks").iterdir():
        true, made = read_labels(mask), read_labels(tmp_path / "run" / "truth" / "labels" / f"{mask.stem}.png")
        stored = cv2.imread(str(tmp_path / "run" / "truth" / "labels" / f"{mask.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert stored.max() < IGNORED
        assert 2 * np.count_nonzero((true > 0) & (made > 0)) > 0.9 * (np.count_nonzero(true) + np.count_nonzero(made))
    assert run(*common, "--points", marked / "points.csv", "-o", tmp_path / "other") == 2
    assert "points need a teacher" in capsys.readouterr().err
    assert run(*common[:2], "--boxes", marked / "boxes.csv", "--teacher", "nowhere", "-o", tmp_path / "other") == 2
    assert "--teacher nowhere: no such file" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(marked, tmp_path, capsys):
    images, boxes_file = ["--images", marked / "images"], ["--boxes", marked / "boxes.csv"]
    out = ["-o", tmp_path / "run"]
    assert run(*images, *boxes_file, "--masks", marked / "masks", *out) == 2
    assert run(*images, "--masks", marked / "masks", "--truth-only", *out) == 2
    assert run(*images, *boxes_file, *boxes_file, *out) == 2
    one = tmp_path / "one.csv"
    lines = (marked / "boxes.csv").read_text().splitlines()
    first = lines[1].partition(",")[0]
    one.write_text("\n".join([lines[0], *(line for line in lines[1:] if line.startswith(first))]) + "\n")
    assert run(*images, "--boxes", one, *out) == 3
    assert "does not name 1 image " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
