"""``cellseg-train --masks`` with the files of other programs: it is taught the same labels and classes."""

from __future__ import annotations

from pathlib import Path

import annotation_files as kinds
import numpy as np
import pytest
from segmented_images import smear

from cellseg_deploy.cli.console import run
from cellseg_train import run as training
from cellseg_train.cell_classes import CellClasses
from cellseg_train.checkpoint import RunRecord
from cellseg_train.cli import command
from cellseg_train.data import Pair, Truth, read_pair


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("taught")
    made = [smear(seed, n_cells=12) for seed in (1, 2)]
    for name, image in zip(("a.png", "b.png"), made, strict=True):
        kinds.png(folder / name, image.pixels_hwc)
    return folder, {name: image.labels for name, image in zip(("a.png", "b.png"), made, strict=True)}


@pytest.fixture
def begun(monkeypatch) -> list[RunRecord]:
    """Records of the runs that would have been trained."""
    records: list[RunRecord] = []
    monkeypatch.setattr(training, "begin", lambda out, record, **_: records.append(record))
    return records


def train(*arguments: object) -> int:
    return run(command, [str(argument) for argument in arguments])


def taught(record: RunRecord) -> dict[str, tuple[Pair, Truth, CellClasses | None]]:
    split = training.make_split(record.inputs, record.config)
    classes = training.find_classes(record.inputs, split)
    pairs = (*split.train, *split.val)
    return {pair.stem: (pair, read_pair(pair, 1, "auto", classes)[1], classes) for pair in pairs}


@pytest.mark.parametrize("kind", kinds.ALL)
def test_every_kind_teaches_the_same_labels(kind, truth, begun, tmp_path) -> None:
    images, labels = truth
    kinds.suffixed("")(labels, tmp_path / "plain")
    kinds.ALL[kind](labels, tmp_path / "given")
    for number, masks in enumerate(("plain", "given")):
        out = tmp_path / f"run {number}"
        assert train("--images", images, "--masks", tmp_path / masks, "-o", out, "--quiet") == 0
    expected, found = (taught(record) for record in begun)
    assert sorted(found) == sorted(expected) == ["a", "b"]
    for stem in found:
        true, read = (each[stem][1].labels_hw for each in (expected, found))
        assert read.max() == true.max() > 10
        if kind in kinds.ROUGH:
            assert min(kinds.iou_per_cell(true, read)) >= 0.95
        else:
            assert np.array_equal(read, true)
    is_made = not kinds.ALL[kind].__qualname__.startswith(("suffixed", "like_ours", "colours"))
    assert (tmp_path / "run 1" / "truth" / "masks").is_dir() == is_made


def test_classes_of_the_files_are_taught(truth, begun, tmp_path, capsys) -> None:
    images, labels = truth
    kinds.yolo(labels, tmp_path / "given")
    arguments = ["--images", images, "--masks", tmp_path / "given", "--classes", "marks"]
    assert train(*arguments, "-o", tmp_path / "run") == 0
    assert "from YOLO polygons (" in capsys.readouterr().err
    _, found, classes = taught(begun[0])["a"]
    assert classes is not None
    assert sorted(classes.names) == ["red", "white"]
    there = {classes.names[number] for number in found.class_of[1:].tolist()}
    assert there == {"red", "white"}
    for label in range(1, int(labels["a.png"].max()) + 1):
        here = found.labels_hw[labels["a.png"] == label][0]
        assert classes.names[found.class_of[here]] == ("white" if label % 2 else "red")


def test_an_image_without_a_file_is_refused(truth, begun, tmp_path, capsys) -> None:
    images, labels = truth
    kinds.rois({"a.png": labels["a.png"]}, tmp_path / "given")
    assert train("--images", images, "--masks", tmp_path / "given", "-o", tmp_path / "run") == 3
    assert "does not name 1 images" in capsys.readouterr().err
    assert not begun
    assert not (tmp_path / "run").exists()
