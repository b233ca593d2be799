"""cellseg-train --classes from its command line: the network learns to tell cells apart, and says so."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from cellseg_deploy.cli import console
from cellseg_deploy.images.read import read_numbered_labels
from cellseg_deploy.samples import write_samples
from cellseg_train import run as train_run
from cellseg_train.checkpoint import load_network, load_record
from cellseg_train.cli import command

FAST = [
    "--tile-size", 112, "--tiny-width", 48, "--tiny-depth", 1, "--decoder-channels", "24,16,16", "--image-skip",
    "16,16,16", "--batch-size", 8, "--image-scale", 0.4, "--lr", "3e-3", "--device", "cpu", "--threads", 1,
    "--ema-decay", 0.9,
]  # fmt: skip


def train(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four synthetic smears in which every other cell is green; classes.csv and boxes.csv say which."""
    folder = tmp_path_factory.mktemp("smears")
    write_samples(folder, 4, 5, (300, 400))
    rows, boxes = [("image", "label", "class")], [("image", "class", "x0", "y0", "x1", "y1")]
    for mask in sorted((folder / "masks").iterdir()):
        labels, numbers = read_numbered_labels(mask)
        picture = folder / "images" / mask.name
        image = cv2.imread(str(picture))
        for label in range(1, labels.max() + 1):
            name = "green" if label % 2 else "red"
            rows.append((mask.name, str(numbers[label]), name))
            x, y, w, h = cv2.boundingRect((labels == label).astype(np.uint8))
            boxes.append((mask.name, name, *map(str, (x, y, x + w, y + h))))
            if name == "green":
                image[labels == label] = image[labels == label][:, [0, 2, 1]] // (2, 1, 2)
        cv2.imwrite(str(picture), image)
    for file, table in (("classes.csv", rows), ("boxes.csv", boxes)):
        with (folder / file).open("w", newline="") as out:
            csv.writer(out).writerows(table)
    return folder


def folders(smears: Path) -> list[object]:
    return ["--images", smears / "images", "--masks", smears / "masks"]


def test_it_learns_to_tell_cells_apart(smears, tmp_path, capsys):
    run, classes = tmp_path / "run", tmp_path / "classes.csv"
    classes.write_text((smears / "classes.csv").read_text())
    settings = ["--epochs", 10, "--patches-per-image", 8, "--validate-every", 10, "--no-calibrate", *FAST]
    assert train(*folders(smears), "--classes", classes, "-o", run, *settings) == 0
    said = capsys.readouterr().err
    assert "classes: green " in said
    assert "F1 by class: green " in said
    with (run / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert float(log[-1]["classes"]) < 0.5 * float(log[0]["classes"])
    assert float(log[-1]["val_f1_green"]) > 0.5
    assert float(log[-1]["val_f1_red"]) > 0.5
    spec = load_network(run).spec
    assert spec.channels == ("foreground", "boundary", "green", "red")
    assert spec.classes == ("green", "red")
    assert train("--resume", run) == 0
    classes.write_text(classes.read_text().replace("1,green", "1,red"))
    assert train("--resume", run) == 5
    assert "images, masks or classes" in capsys.readouterr().err


def test_boxes_give_their_classes(smears, tmp_path):
    run = tmp_path / "run"
    marks = ["--images", smears / "images", "--boxes", smears / "boxes.csv", "--classes", "marks"]
    assert train(*marks, "-o", run, "--epochs", 1, "--no-calibrate", "--quiet", *FAST) == 0
    assert load_network(run).spec.classes == ("green", "red")
    with (run / "truth" / "classes.csv").open() as file:
        made = list(csv.DictReader(file))
    with (smears / "boxes.csv").open() as file:
        boxes = [(row["image"], row["class"]) for row in csv.DictReader(file)]
    assert len(made) > 0.9 * len(boxes)
    names = [row["image"] for row in made]
    for row in made:  # label i is the i-th box of its image
        of_image = [name for image, name in boxes if image == row["image"]]
        assert row["class"] == of_image[int(row["label"]) - 1]
    assert set(names) == {image for image, _ in boxes}
    assert train("--resume", run, "--quiet") == 0


def test_cells_of_the_class_ignore_have_no_part_in_the_limit_for_specks(smears, tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "_train", lambda *_: None)
    with (smears / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    area = {}
    for mask in (smears / "masks").iterdir():
        labels, numbers = read_numbered_labels(mask)
        sizes = np.bincount(labels.ravel())
        area |= {(mask.name, str(number)): sizes[label] for label, number in enumerate(numbers)}
    large = np.quantile([area[row["image"], row["label"]] for row in rows], 0.7)
    limits = []
    for ignored in (False, True):
        classes, out = tmp_path / f"{ignored}.csv", tmp_path / f"run-{ignored}"
        with classes.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("image", "label", "class"))
            for row in rows:
                is_small = area[row["image"], row["label"]] < large
                table.writerow((row["image"], row["label"], "ignore" if ignored and is_small else row["class"]))
        assert train(*folders(smears), "--classes", classes, "-o", out, *FAST) == 0
        limits.append(load_record(out).config.data.min_object_px)
    assert limits[1] > 1.05 * limits[0]


def test_what_does_not_fit_is_refused(smears, tmp_path, capsys):
    out = ["-o", tmp_path / "run", *FAST]
    assert train(*folders(smears), "--classes", "marks", *out) == 2
    assert "--classes marks: the masks have no classes; give a CSV file" in capsys.readouterr().err
    assert train(*folders(smears), "--classes", tmp_path / "none.csv", *out) == 2
    assert "none.csv: no such file; give a CSV file with image,label,class, or marks" in capsys.readouterr().err
    absent = tmp_path / "absent.csv"
    absent.write_text((smears / "classes.csv").read_text() + "elsewhere.png,1,platelet\n")
    assert train(*folders(smears), "--classes", absent, *out) == 3
    assert "no training image holds a cell of class platelet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
