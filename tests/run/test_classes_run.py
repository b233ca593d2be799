"""``cellseg-infer`` with a model that tells classes apart: files read back, counts by class, which classes count."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from cell_classes import CLASSES, class_onnx, class_spec, field, save_field
from PIL import Image
from read_back import area_of, check_qupath, coco_of, quiet_decoding, regions
from running import infer, results, rows

from cellseg_deploy import Segmenter
from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs.palette import NOT_COUNTED_RGB, class_rgb

pytestmark = pytest.mark.usefixtures("quick_disk")

# The cells of ``FIELD`` in the order of their labels.
FOUND = ("red", "white", "platelet", "platelet", "red", "red", "white")
LEFT_OUT = ("", "", "class", "class", "", "", "border")


@pytest.fixture
def model(onnx_file: Callable[..., Path]) -> Path:
    pytest.importorskip("onnxruntime")
    return onnx_file(model=class_onnx())


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """a: ``FIELD``; b: nothing; c: a red cell; d: damaged."""
    folder = tmp_path / "fields"
    save_field(folder / "a.png")
    save_field(folder / "b.png", ())
    save_field(folder / "sub" / "c.png", (("red", 50, 50, 10),))
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    return folder


def run(fields: Path, out: Path, model: Path, *more: object, code: int = 3) -> Path:
    arguments = (fields, "-o", out, "--model", model, "--scale", 1, "-q", *more)
    assert infer(*arguments) == code
    return out


@pytest.fixture
def out(fields: Path, tmp_path: Path, model: Path) -> Path:
    for package in ("roifile", "pyarrow", "pycocotools"):
        pytest.importorskip(package)
    return run(fields, tmp_path / "out", model, "--save", "all")


def cells_of(out: Path, image: str = "a.png") -> list[dict[str, str]]:
    return [row for row in rows(out / "cells.csv") if row["image"] == image]


# --- tables


def test_cells_csv_says_class_and_why_a_cell_does_not_count(out: Path) -> None:
    cells = cells_of(out)
    assert list(cells[0])[-5:] == ["touches_border", "class", "class_probability", "counted", "left_out_by"]
    assert [row["class"] for row in cells] == list(FOUND)
    assert [row["left_out_by"] for row in cells] == list(LEFT_OUT)
    assert [row["counted"] for row in cells] == ["false" if reason else "true" for reason in LEFT_OUT]
    assert all(0.99 < float(row["class_probability"]) <= 1 for row in cells)


def test_images_csv_counts_by_class(out: Path) -> None:
    by_name = {row["image"]: row for row in rows(out / "images.csv")}
    columns = list(by_name["a.png"])
    assert columns[-6:] == ["scale", "count_red", "count_white", "count_platelet", "warning", "error"]
    counts = {name: [by_name[name][f"count_{kind}"] for kind in CLASSES] for name in by_name}
    assert counts == {
        "a.png": ["3", "1", "2"],
        "b.png": ["0", "0", "0"],
        "d.png": ["", "", ""],
        "sub/c.png": ["1", "0", "0"],
    }
    assert (by_name["a.png"]["cells"], by_name["a.png"]["counted"]) == ("7", "4")
    counting = [int(row["area_px"]) for row in cells_of(out) if row["class"] != "platelet"]
    assert float(by_name["a.png"]["median_cell_area_px"]) == np.median(counting)


def test_parquet_is_cells_csv(out: Path) -> None:
    from pyarrow import parquet

    table, cells = parquet.read_table(out / "cells.parquet"), rows(out / "cells.csv")
    assert table.column_names == list(cells[0])
    types = {name: str(table.schema.field(name).type) for name in ("class", "class_probability", "left_out_by")}
    assert types == {"class": "string", "class_probability": "double", "left_out_by": "string"}
    for name in ("class", "left_out_by"):
        assert table[name].to_pylist() == [row[name] for row in cells]


# --- formats, read back


def test_imagej_regions_have_the_colour_and_the_name_of_the_class(out: Path) -> None:
    found, cells = list(regions((out / "rois" / "a.png.zip").read_bytes())), cells_of(out)
    assert [int(roi.name) for roi in found] == [int(row["label"]) for row in cells]
    assert [area_of(roi) for roi in found] == [int(row["area_px"]) for row in cells]
    expected = [(name, class_rgb(CLASSES.index(name))) for name in FOUND[:-1]]
    expected.append(("white not counted", NOT_COUNTED_RGB))
    assert [(roi.properties["class"], tuple(roi.stroke_color[1:])) for roi in found] == expected


def test_qupath_has_the_classes(out: Path) -> None:
    content = json.loads((out / "geojson" / "a.png.geojson").read_bytes())
    check_qupath(content)
    properties = [feature["properties"] for feature in content["features"]]
    kinds = Counter(each["classification"]["name"] for each in properties)
    assert kinds == {"red": 3, "white": 1, "platelet": 2, "white not counted": 1}
    for each, row in zip(properties, cells_of(out), strict=True):
        measured = each["measurements"]
        assert set(measured) == set(row) - {"image", "class", "left_out_by"}
        assert measured["class_probability"] == pytest.approx(float(row["class_probability"]), abs=1e-4)
        assert measured["counted"] == (row["counted"] == "true")


@quiet_decoding
def test_coco_has_the_classes_as_categories(out: Path) -> None:
    for path in (out / "coco" / "a.png.json", out / "coco.json"):
        coco = coco_of(path)
        assert {number: category["name"] for number, category in coco.cats.items()} == dict(enumerate(CLASSES, start=1))
        (image_id,) = (number for number, image in coco.imgs.items() if image["file_name"] == "a.png")
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [coco.cats[each["category_id"]]["name"] for each in annotations] == list(FOUND)
        assert [each["left_out_by"] for each in annotations] == list(LEFT_OUT)
        assert [each["counted"] for each in annotations] == [not reason for reason in LEFT_OUT]
        assert all(0.99 < each["class_probability"] <= 1 for each in annotations)
        assert len(coco.getAnnIds(catIds=[3])) == 2


def test_labels_and_probabilities_hold_what_is_not_counted_too(out: Path) -> None:
    labels = tifffile.imread(out / "labels" / "a.png.tif")
    assert labels.max() == len(FOUND)
    with tifffile.TiffFile(out / "probabilities" / "a.png.tif") as file:
        planes, metadata = file.asarray(), file.imagej_metadata
    assert metadata is not None
    assert metadata["Labels"] == ["foreground", *CLASSES]
    for number, name in enumerate(FOUND, start=1):
        assert planes[1 + CLASSES.index(name)][labels == number].min() > 0.99 * 65535


@pytest.mark.parametrize("kind", ["overlays", "numbered"])
def test_pictures_show_the_classes(out: Path, kind: str) -> None:
    with Image.open(out / kind / "a.png.jpg") as picture:
        shown = np.asarray(picture).astype(int)
    for index in range(len(CLASSES)):  # JPEG blurs thin lines, but not the legend's
        assert (np.abs(shown - class_rgb(index)).max(axis=2) < 40).sum() > 20


# --- summary, and which classes count


def test_the_final_table_and_the_summary_for_machines(
    fields: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (fields, "-o", tmp_path / "out", "--model", model, "--scale", 1)
    assert infer(*arguments) == 3
    said = capsys.readouterr()
    assert "classes  red 4; white 1; platelet 2, not counted" in said.out
    assert "counts red and white" in said.err
    assert infer(*arguments, "--json", "-q") == 3  # done before: the same totals
    found = json.loads(capsys.readouterr().out)
    assert (found["cells"], found["counted"]) == (8, 5)
    assert found["by_class"] == {"red": 4, "white": 1, "platelet": 2}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["totals"]["by_class"] == found["by_class"]
    assert record["settings"]["classes"] == ["red", "white"]


@pytest.mark.parametrize(
    ("classes", "counted"), [("red", 3), ("platelet,red", 5), (" white ", 1), ("red,white,platelet", 6)]
)
def test_the_classes_that_count_can_be_chosen(
    fields: Path, tmp_path: Path, model: Path, classes: str, counted: int
) -> None:
    out = run(fields, tmp_path / "out", model, "--classes", classes)
    (row,) = (row for row in rows(out / "images.csv") if row["image"] == "a.png")
    assert (row["cells"], row["counted"]) == ("7", str(counted))
    assert (row["count_red"], row["count_white"], row["count_platelet"]) == ("3", "1", "2")
    chosen = [name.strip() for name in classes.split(",")]
    assert all((row["left_out_by"] == "class") == (row["class"] not in chosen) for row in cells_of(out))


def test_classes_that_cannot_be_chosen(
    fields: Path, tmp_path: Path, model: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(fields, tmp_path / "out", model, "--classes", "red,green", code=2)
    assert "has no class 'green'; it has red, white, platelet" in capsys.readouterr().err
    run(fields, tmp_path / "out", model, "--classes", ",", code=2)
    assert "no class to count" in capsys.readouterr().err
    run(fields, tmp_path / "out", onnx_file(name="plain.onnx"), "--classes", "red", code=2)
    assert "does not distinguish classes of cells" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_resumed_with_its_classes_only(
    fields: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(fields, tmp_path / "out", model, "--classes", "red")
    whole = results(out)
    run(fields, out, model, code=6)
    assert "classes (--classes): red there, red, white now" in capsys.readouterr().err
    save_field(fields / "d.png", (("platelet", 50, 50, 5),))  # failed before
    run(fields, out, model, "--classes", "red", code=0)
    assert results(out)["labels/a.png.tif"] == whole["labels/a.png.tif"]
    fresh = run(fields, tmp_path / "fresh", model, "--classes", "red", code=0)
    assert results(out) == results(fresh)


def test_the_same_run_again_has_its_classes(
    fields: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(fields, tmp_path / "out", model, "--classes", "platelet,red")
    assert infer(fields, "--like", out / "run.json", "-o", tmp_path / "again", "-q") == 3
    assert results(tmp_path / "again") == results(out)
    assert infer(fields, "--like", out / "run.json", "-o", tmp_path / "other", "-q", "--classes", "red") == 2
    assert "--classes and --like exclude each other" in capsys.readouterr().err


def test_edited_tables_with_classes_are_told_from_untouched_ones(
    fields: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(fields, tmp_path / "out", model)
    run(fields, out, model)
    assert "edited" not in capsys.readouterr().err
    table = (out / "cells.csv").read_text()
    (out / "cells.csv").write_text(table.replace(",white,", ",red,"))
    run(fields, out, model)
    assert (out / "cells.edited-1.csv").exists()
    assert (out / "cells.csv").read_text() == table


def test_tables_of_failed_images_alone(fields: Path, tmp_path: Path, model: Path) -> None:
    """Nothing says then that there are classes; with the first image that is done the columns appear."""
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(fields / "d.png", only / "d.png")
    out = run(only, tmp_path / "out", model)
    assert "count_red" not in rows(out / "images.csv")[0]
    shutil.copy(fields / "a.png", only / "a.png")
    run(only, out, model)
    assert [row["count_red"] for row in rows(out / "images.csv")] == ["3", ""]
    assert not list(out.glob("*edited*"))


def test_an_image_that_was_changed_is_counted_once(fields: Path, tmp_path: Path, model: Path) -> None:
    out = run(fields, tmp_path / "out", model)
    save_field(fields / "a.png", (("white", 50, 50, 14),))
    run(fields, out, model)
    totals = json.loads((out / "run.json").read_text())["totals"]
    assert totals["by_class"] == {"red": 1, "white": 1, "platelet": 0}


# --- Python


def test_python_knows_the_classes(model: Path) -> None:
    with Segmenter.load(model, scale=1) as segmenter:
        found = segmenter(field())
    assert found.classes is not None
    assert found.table.columns["class"].tolist() == list(FOUND)
    assert found.counted().tolist() == [not reason for reason in LEFT_OUT]
    assert found.counted("all").tolist() == [name != "platelet" for name in FOUND]
    assert found.by_rule("all").all()
    with Segmenter.load(model, scale=1, classes=["platelet"]) as segmenter:
        assert segmenter(field()).counted().tolist() == [name == "platelet" for name in FOUND]
    with pytest.raises(UsageError, match="has no class 'green'"):
        Segmenter.load(model, classes=["green"])


def test_a_small_platelet_is_found_and_a_small_piece_of_red_is_not(model: Path) -> None:
    cells = (("red", 50, 50, 10), ("platelet", 90, 50, 2.5), ("red", 20, 20, 2.5))
    with Segmenter.load(model, scale=1) as segmenter:
        found = segmenter(field(cells))
    assert found.table.columns["class"].tolist() == ["red", "platelet"]
    assert found.table.columns["area_px"].tolist() == [317, 21]


def test_a_name_of_a_class_is_text_in_a_table(tmp_path: Path, onnx_file: Callable[..., Path], fields: Path) -> None:
    pytest.importorskip("onnxruntime")
    names: Any = ('=1+1 "x"', "rød", "b;c")
    spec = class_spec(channels=("foreground", *names), classes=names)
    out = run(fields, tmp_path / "out", onnx_file(model=class_onnx(spec)))
    assert {row["class"] for row in cells_of(out)} == {"'" + names[0], *names[1:]}
    assert [row[f"count_{names[0]}"] for row in rows(out / "images.csv")] == ["3", "0", "", "1"]
    run(fields, out, onnx_file(model=class_onnx(spec)))
    assert not list(out.glob("*edited*"))
