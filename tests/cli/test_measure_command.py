"""``cellseg-measure`` and ``cellseg-convert``: cells that were drawn or edited, measured as those that were found."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import annotation_files as kinds
import numpy as np
import pytest
import tifffile
from conftest import draw_discs
from segmented_images import odd_labels, smear

from cellseg_deploy.annotations.labels import find_labels
from cellseg_deploy.cli import convert, infer, measure
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.read import read_labels

TABLES = ("cells.csv", "images.csv")


def measured(*arguments: object) -> int:
    return run(measure.command, [str(argument) for argument in arguments])


def converted(*arguments: object) -> int:
    return run(convert.command, [str(argument) for argument in arguments])


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of a smear, and its label image."""
    folder = tmp_path_factory.mktemp("measured")
    made = smear(n_cells=15)
    kinds.png(folder / "images" / "a.png", made.pixels_hwc)
    kinds.suffixed("")({"a.png": made.labels}, folder / "masks")
    assert measured(folder / "masks", "--images", folder / "images", "-o", folder / "of masks", "-q") == 0
    return folder, {"a.png": made.labels}


@pytest.mark.parametrize("kind", kinds.ALL)
def test_every_kind_measures_to_the_same_numbers(
    kind: str, truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, labels = truth
    kinds.ALL[kind](labels, tmp_path / "given")
    assert measured(tmp_path / "given", "--images", folder / "images", "-o", tmp_path / "out", "-q") == 0
    expected, found = (rows(place / "cells.csv") for place in (folder / "of masks", tmp_path / "out"))
    assert len(found) == len(expected) == labels["a.png"].max()
    if kind in kinds.ROUGH:
        assert min(kinds.iou_per_cell(labels["a.png"], read_labels(tmp_path / "out" / "labels/a.png.tif"))) >= 0.95
        return
    for column in expected[0]:
        assert [row[column] for row in found] == [row[column] for row in expected], column
    for name in ("labels/a.png.tif",):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "of masks" / name).read_bytes()


def test_three_erased_cells_are_three_fewer(
    tmp_path: Path, model: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run over its photographs, the corrected label image, without saying where the photographs are."""
    out = tmp_path / "counts"
    kinds.png(four / "many.png", draw_discs((100, 250), [(30 * n, 20 + 40 * (n % 2)) for n in range(1, 8)]))
    assert run(infer.command, [str(four), "-o", str(out), "--model", str(model), "--scale", "1", "-q"]) == 0
    file = next(path for path in sorted((out / "labels").rglob("*.tif")) if read_labels(path).max() >= 7)
    labels = tifffile.imread(file)
    before = len(np.unique(labels)) - 1
    erased = np.unique(labels)[1:4]
    labels[np.isin(labels, erased)] = 0
    corrected = out / "corrections" / file.relative_to(out / "labels")
    corrected.parent.mkdir(parents=True)
    tifffile.imwrite(corrected, labels)  # as Fiji or napari would: without our mark
    capsys.readouterr()
    assert measured(out / "corrections", "-o", tmp_path / "again", "--json", "-q") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["found"], said["cells"]) == (1, before - 3)
    (row,) = rows(tmp_path / "again" / "images.csv")
    assert row["image"] == file.relative_to(out / "labels").as_posix().removesuffix(".tif")
    assert (int(row["cells"]), row["scale"]) == (before - 3, "")
    assert len(rows(tmp_path / "again" / "cells.csv")) == before - 3
    assert (tmp_path / "again" / "overlays" / f"{row['image']}.jpg").is_file()


def test_unedited_labels_of_a_run_measure_to_its_own_tables(tmp_path: Path, model: Path, four: Path) -> None:
    out = tmp_path / "counts"
    arguments = ["--model", model, "--scale", "1", "--save", "labels,overlays,rois,geojson,coco", "-q"]
    assert run(infer.command, [str(four), "-o", str(out), *map(str, arguments)]) == 0
    for kind in ("labels", "rois", "geojson", "coco"):
        again = tmp_path / kind
        assert measured(out / kind, "--save", "labels,overlays,rois,geojson", "-o", again, "-q") == 0
        assert (again / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()
        for name in ("labels", "overlays", "rois"):
            for file in (out / name).rglob("*.*"):
                assert (again / file.relative_to(out)).read_bytes() == file.read_bytes(), file


def test_an_earlier_measurement_is_replaced_but_not_what_was_edited(
    truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, labels = truth
    common = ["--images", folder / "images", "-o", tmp_path / "out", "-q"]
    assert measured(folder / "masks", *common) == 0
    before = (tmp_path / "out" / "cells.csv").read_bytes()
    fewer = np.where(labels["a.png"] == 1, 0, labels["a.png"])
    kinds.suffixed("")({"a.png": fewer}, tmp_path / "fewer")
    assert measured(tmp_path / "fewer", *common) == 0
    assert before.count(b"\n") - (tmp_path / "out" / "cells.csv").read_bytes().count(b"\n") == 1
    tifffile.imwrite(tmp_path / "out" / "labels" / "a.png.tif", labels["a.png"].astype(np.uint16))
    assert measured(folder / "masks", *common) == 6
    assert "labels/a.png.tif was edited since" in capsys.readouterr().err
    assert measured(folder / "masks", *common, "--overwrite") == 0
    assert (tmp_path / "out" / "cells.csv").read_bytes() == before


def test_a_run_and_a_measurement_do_not_take_over_each_other(
    tmp_path: Path, model: Path, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_arguments = [str(four), "--model", str(model), "--scale", "1", "-q", "-o"]
    assert run(infer.command, [*run_arguments, str(tmp_path / "counts")]) == 0
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "counts" / "labels").glob("*.tif"):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    before = (tmp_path / "counts" / "cells.csv").read_bytes()
    assert measured(tmp_path / "copy", "--images", four, "-o", tmp_path / "counts", "-q") == 6
    assert "contains a different run" in capsys.readouterr().err
    assert (tmp_path / "counts" / "cells.csv").read_bytes() == before
    assert measured(tmp_path / "copy", "--images", four, "-o", tmp_path / "measured", "-q") == 0
    assert run(infer.command, [*run_arguments, str(tmp_path / "measured")]) == 6
    assert "contains a different run" in capsys.readouterr().err
    like = ["--like", str(tmp_path / "measured" / "run.json")]
    assert run(infer.command, [str(four), "-o", str(tmp_path / "new"), *like]) == 2


@pytest.mark.reliability
def test_a_bad_file_fails_alone(
    truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, labels = truth
    photograph = (folder / "images" / "a.png").read_bytes()
    for name in ("a.png", "b.png", "c.png"):
        kinds.write(tmp_path / "images" / name, photograph)
    kinds.rois({"a.png": labels["a.png"], "b.png": labels["a.png"]}, tmp_path / "rois")
    (tmp_path / "rois" / "b.zip").write_bytes(b"PK")
    assert measured(tmp_path / "rois", "--images", tmp_path / "images", "-o", tmp_path / "out") == 3
    good, bad = rows(tmp_path / "out" / "images.csv")
    assert (good["status"], bad["status"], bad["image"]) == ("done", "failed", "b.png")
    assert "b.zip: damaged" in bad["error"]
    said = capsys.readouterr()
    assert "1 image, " in said.err
    assert "1 of 2, 1 more without labels" in said.out


def test_classes_come_along_and_platelets_do_not_count(
    truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, labels = truth
    kinds.yolo(labels, tmp_path / "yolo")
    (tmp_path / "yolo" / "classes.txt").write_text("red\nplatelet\n")
    arguments = ["--images", folder / "images", "-o", tmp_path / "out", "-q", "--count-rule", "all"]
    assert measured(tmp_path / "yolo", *arguments) == 0
    cells = rows(tmp_path / "out" / "cells.csv")
    (image,) = rows(tmp_path / "out" / "images.csv")
    n_red = int(labels["a.png"].max()) // 2
    assert [image["cells"], image["counted"], image["count_red"]] == [str(len(cells)), str(n_red), str(n_red)]
    assert sum(row["class"] == "red" for row in cells) == n_red
    centres = {label: np.argwhere(labels["a.png"] == label).mean(axis=0) for label in range(1, len(cells) + 1)}
    for row in cells:
        place = np.array([float(row["centroid_y_px"]), float(row["centroid_x_px"])])
        nearest = min(centres, key=lambda label: float(np.abs(centres[label] - place).sum()))
        assert row["class"] == ("platelet" if nearest % 2 else "red")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["masks", "-o", "out"], "give --images DIR"),
        (["masks", "--images", "images", "-o", "masks/out"], "must not contain each other"),
        (["masks", "--images", "images", "-o", "out", "--save", "probabilities"], "no network is run"),
        (["nowhere", "--images", "images", "-o", "out"], "no such file or folder"),
        (["masks", "--images", "images", "-o", "out", "--classes", "red"], "does not distinguish classes"),
    ],
)
def test_what_cannot_be_measured_is_said(
    truth: tuple[Path, dict[str, np.ndarray]],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(truth[0])
    assert measured(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["labels", "rois", "geojson", "coco"])
def test_converted_cells_are_the_same_cells(kind: str, tmp_path: Path) -> None:
    labels = {"sub/a.png": odd_labels(), "b.png": np.zeros((12, 20), np.int32)}
    for name, pixels in labels.items():
        kinds.png(tmp_path / "images" / name, np.zeros((*pixels.shape, 3), np.uint8))
        kinds.png(tmp_path / "masks" / name, pixels.astype(np.uint16))
    assert converted(tmp_path / "masks", "-o", tmp_path / "out", "--to", kind, "-q") == 0
    source = find_labels(tmp_path / "images", tmp_path / "out")
    found = {stem: source.read(stem, (12, 20)).labels for stem in source.images}
    assert sorted(found) == ["b", "sub/a"]
    assert np.array_equal(found["sub/a"], labels["sub/a.png"])
    assert not found["b"].any()
    again = ["--images", tmp_path / "images", "-o", tmp_path / "back", "--to", "labels", "-q"]
    assert converted(tmp_path / "out", *again) == 0
    assert np.array_equal(tifffile.imread(tmp_path / "back" / "sub" / "a.tif"), labels["sub/a.png"])
    assert converted(tmp_path / "out", *again) == 6  # not empty any more


def test_converting_keeps_classes_and_asks_for_sizes(
    truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, labels = truth
    kinds.yolo(labels, tmp_path / "yolo")
    assert converted(tmp_path / "yolo", "-o", tmp_path / "out", "--to", "rois") == 2
    assert "YOLO polygons do not say how large the images are; give them as --images DIR" in capsys.readouterr().err
    found = {}
    images = ["--images", folder / "images"]
    for kind in ("rois", "geojson", "coco"):
        assert converted(tmp_path / "yolo", *images, "-o", tmp_path / kind, "--to", kind, "-q") == 0
        source = find_labels(folder / "images", tmp_path / kind)
        found[kind] = source.read("a", labels["a.png"].shape).classes
    assert found["rois"] == found["geojson"] == found["coco"]
    assert set(found["rois"]) == {"red", "white"}
    assert converted(tmp_path / "yolo", *images, "-o", tmp_path / "labels", "--to", "labels", "-q") == 0
    listed = (tmp_path / "labels" / "classes.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in listed[1:]] == list(found["rois"])
    again = find_labels(folder / "images", tmp_path / "labels").read("a", labels["a.png"].shape)
    assert again.classes == found["rois"]
    (tmp_path / "labels" / "classes.csv").write_text("image,label,class\na,99,red\n")
    with pytest.raises(DataError, match=r"a\.tif: no cell 99, to which classes\.csv beside it gives a class"):
        find_labels(folder / "images", tmp_path / "labels").read("a", labels["a.png"].shape)


def test_what_every_kind_scores_is_what_the_label_image_scores(
    truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, onnx_file: Callable[..., Path]
) -> None:
    from cellseg_deploy.cli.evaluate import command as evaluate

    folder, labels = truth
    figures = {}
    for kind, write in kinds.ALL.items():
        write(labels, tmp_path / kind / "given")
        out = tmp_path / kind / "out"
        given = ["--labels", folder / "masks", "--masks", tmp_path / kind / "given", "-o", out, "-q"]
        assert run(evaluate, ["score", *map(str, given)]) == 0
        report = json.loads((out / "metrics.json").read_text())
        figures[kind] = {name: value for name, value in report.items() if isinstance(value, float | int)}
        if kind in kinds.ROUGH:
            assert figures[kind]["f1"] == 1
        else:
            assert figures[kind] == figures["masks"], kind
    assert figures["masks"]["map"] == 1
    given = ["--labels", tmp_path / "rois" / "given", "--masks", folder / "masks", "-o", tmp_path / "judged", "-q"]
    assert run(evaluate, ["score", *map(str, given)]) == 0
    assert json.loads((tmp_path / "judged" / "metrics.json").read_text())["map"] == 1
    assert "from COCO" in json.loads((tmp_path / "coco polygons" / "out" / "metrics.json").read_text())["read"][0]


@pytest.mark.parametrize("kind", ["csv", "yolo", "coco", "points"])
def test_boxes_and_points_of_the_truth_count_and_score_as_it(
    kind: str, truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    from cellseg_deploy.cli.evaluate import command as evaluate

    folder, labels = truth
    cells = rows(folder / "of masks" / "cells.csv")
    height, width = labels["a.png"].shape
    boxes = [[float(cell[f"bbox_{side}_px"]) for side in ("left", "top", "width", "height")] for cell in cells]
    if kind == "csv":
        lines = [f"a.png,{x},{y},{x + w},{y + h}" for x, y, w, h in boxes]
        file = tmp_path / "boxes.csv"
        file.write_text("\n".join(["image,x0,y0,x1,y1", *lines]))
    elif kind == "yolo":
        shares = [((x + w / 2) / width, (y + h / 2) / height, w / width, h / height) for x, y, w, h in boxes]
        file = tmp_path / "yolo"
        file.mkdir()
        (file / "a.txt").write_text("\n".join("0 " + " ".join(map(str, box)) for box in shares))
    elif kind == "coco":
        found = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)]
        content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cell"}]}
        file = tmp_path / "coco.json"
        file.write_text(json.dumps({**content, "annotations": found}))
    else:
        lines = [f"a.png,{cell['centroid_x_px']},{cell['centroid_y_px']}" for cell in cells]
        file = tmp_path / "points.csv"
        file.write_text("\n".join(["image,x,y", *lines]))
    marks = "--points" if kind == "points" else "--boxes"
    given = ["--labels", folder / "masks", marks, file, "-o", tmp_path / "out", "-q"]
    assert run(evaluate, ["score", *map(str, given)]) == 0
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert scores["n_true"] + scores["n_left_out_true"] == len(cells)
    assert scores["n_predicted"] + scores["n_left_out_predicted"] == len(cells)
    assert (scores["f1"], scores["count_mae"], scores["merges"]) == (1, 0, 0)
    assert scores["n_true"] > 5
