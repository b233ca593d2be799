"""``cellseg-measure`` on the label images of a run: its classes come along, and its report."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cell_classes import class_onnx, save_field
from PIL import Image
from running import infer

from cellseg_deploy.cells.measure import measure as measure_cells
from cellseg_deploy.cli import measure
from cellseg_deploy.cli.console import run as run_command
from cellseg_deploy.run.known_classes import RecordedCells, known_classes
from cellseg_deploy.samples import SmearParams, make_smear

N_CELLS, N_PLATELETS = 7, 2  # of ``cell_classes.FIELD``


def measured(*arguments: object) -> int:
    return run_command(measure.command, [str(argument) for argument in arguments])


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two fields, by a model with classes."""
    pytest.importorskip("onnxruntime")
    import onnx

    folder = tmp_path_factory.mktemp("classes")
    save_field(folder / "fields" / "a.png")
    save_field(folder / "fields" / "sub" / "b.png", (("white", 50, 50, 14), ("platelet", 20, 20, 5)))
    (folder / "model.onnx").write_bytes(onnx.ModelProto.SerializeToString(class_onnx()))
    arguments = (folder / "fields", "-o", folder / "out", "--model", folder / "model.onnx", "--scale", 1, "-q")
    assert infer(*arguments) == 0
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def edit(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Save ``file`` as Fiji would, without our marks."""
    tifffile.imwrite(file, change(tifffile.imread(file)).astype(np.uint16))


def by_place(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of a.png by their centroids."""
    cells = rows(out / "cells.csv")
    return {(row["centroid_x_px"], row["centroid_y_px"]): row for row in cells if row["image"] == "a.png"}


def test_label_images_of_a_run_have_its_classes(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(out / "labels", "-o", tmp_path / "again") == 0
    said = capsys.readouterr()
    assert f"classes of the cells: the run in {out}" in said.err
    assert "platelet 3" in said.out
    for name in ("cells.csv", "summary.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    counts = [[row[name] for name in ("cells", "counted", "count_platelet")] for row in rows(out / "images.csv")]
    assert counts == [
        [row[name] for name in ("cells", "counted", "count_platelet")]
        for row in rows(tmp_path / "again" / "images.csv")
    ]
    assert counts[0][0] != counts[0][1]
    assert json.loads((tmp_path / "again" / "run.json").read_text())["labels"]["classes"] == f"the run in {out}"


def test_label_images_of_the_shipped_model_have_its_classes(tmp_path: Path) -> None:
    smear = make_smear(SmearParams(size_hw=(300, 360), cell_diameter_px=60, n_cells=14), 0)
    (tmp_path / "in").mkdir()
    Image.fromarray(smear.image_hwc).save(tmp_path / "in" / "a.png")
    assert infer(tmp_path / "in", "-o", tmp_path / "out", "-q", "--count-rule", "all") == 0
    assert measured(tmp_path / "out" / "labels", "-o", tmp_path / "again", "-q", "--count-rule", "all") == 0
    (before,), (after,) = (rows(tmp_path / name / "images.csv") for name in ("out", "again"))
    classes = [name for name in before if name.startswith("count_")]
    assert "count_platelet" in classes
    assert [after[name] for name in ("cells", *classes)] == [before[name] for name in ("cells", *classes)]
    found = [[row["class"] for row in rows(tmp_path / name / "cells.csv")] for name in ("out", "again")]
    assert found[0] == found[1] != []


@pytest.mark.parametrize("beside", ["journal", "table"])
def test_classes_survive_other_numbers_and_a_drawn_cell_has_none(out: Path, tmp_path: Path, beside: str) -> None:
    """Numbers reversed, one cell erased, one drawn; from the journal, or from cells.csv alone."""

    def change(labels: np.ndarray) -> np.ndarray:
        changed = np.where(labels > 0, 100 - labels.astype(int), 0)
        changed[changed == 99] = 0
        changed[70:78, 40:46] = 7
        return changed

    edit(out / "labels" / "a.png.tif", change)
    if beside == "table":
        (out / "journal.jsonl").unlink()
    assert measured(out / "labels", "-o", tmp_path / "again", "-q") == 0
    before = {place: row["class"] for place, row in by_place(out).items()}
    after = by_place(tmp_path / "again")
    drawn = after.pop(("42.5000", "73.5000"))
    assert (drawn["class"], drawn["counted"]) == ("unknown", "true")
    assert len(after) == N_CELLS - 1 == len(before) - 1
    assert {place: row["class"] for place, row in after.items()} == {place: before[place] for place in after}
    (image, other) = rows(tmp_path / "again" / "images.csv")
    assert (image["count_platelet"], image["count_unknown"], other["count_unknown"]) == (str(N_PLATELETS), "1", "0")


def test_classes_of_corrections_come_along(out: Path, tmp_path: Path) -> None:
    from cellseg_deploy.view.source import image_id, open_source
    from cellseg_deploy.view.workspace import Workspace

    platelet = next(row for row in rows(out / "cells.csv") if row["image"] == "a.png" and row["class"] == "platelet")
    with Workspace(open_source(out)) as workspace:
        workspace.edit(image_id("a.png"), {"op": "class", "cells": [int(platelet["label"])], "class": "white"})
    assert measured(out / "corrections", "-o", tmp_path / "again", "-q") == 0
    cells = rows(tmp_path / "again" / "cells.csv")
    assert len(cells) == N_CELLS
    assert sum(row["class"] == "platelet" for row in cells) == N_PLATELETS - 1
    assert next(row for row in cells if row["label"] == platelet["label"])["class"] == "white"


def test_unknown_classes_are_said_and_everything_counts(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out / "labels", tmp_path / "elsewhere")
    arguments = (tmp_path / "elsewhere", "--images", _images(out), "-o", tmp_path / "again", "--count-rule", "all")
    assert measured(*arguments) == 0
    said = capsys.readouterr()
    assert "classes of the cells: not known: every object is counted, platelets too" in said.err
    assert [row["counted"] for row in rows(tmp_path / "again" / "images.csv")] == ["7", "2"]
    assert "not known: every object is counted" in (tmp_path / "again" / "report.html").read_text()
    assert measured(*arguments, "--json", "-q") == 0
    assert "not known" in json.loads(capsys.readouterr().out)["classes_from"]


def test_classes_csv_beside_the_labels_comes_first(out: Path, tmp_path: Path) -> None:
    lines = [f"{name},{label},red" for name, n in (("a.png", 7), ("sub/b.png", 2)) for label in range(1, n + 1)]
    (out / "labels" / "classes.csv").write_text("\n".join(["image,label,class", *lines]))
    assert measured(out / "labels", "-o", tmp_path / "again", "-q") == 0
    assert {row["class"] for row in rows(tmp_path / "again" / "cells.csv")} == {"red"}


def test_a_run_that_counted_some_classes_is_measured_so(finished: Path, tmp_path: Path) -> None:
    model = finished.parent / "model.onnx"
    arguments = ("-o", tmp_path / "out", "--model", model, "--scale", 1, "-q", "--classes", "platelet")
    assert infer(finished.parent / "fields", *arguments) == 0
    assert measured(tmp_path / "out" / "labels", "-o", tmp_path / "again", "-q") == 0
    assert (tmp_path / "again" / "cells.csv").read_bytes() == (tmp_path / "out" / "cells.csv").read_bytes()
    assert measured(tmp_path / "out" / "labels", "-o", tmp_path / "white", "-q", "--classes", "white") == 0
    assert sum(row["counted"] == "true" for row in rows(tmp_path / "white" / "cells.csv")) == 2


def test_a_damaged_table_of_cells_is_named(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "journal.jsonl").unlink()
    text = (out / "cells.csv").read_text()
    (out / "cells.csv").write_text(text.replace("bbox_left_px", "links"))
    assert measured(out / "labels", "-o", tmp_path / "again", "-q") == 3
    assert "cells.csv: no column bbox_left_px; expected a cells.csv as a run writes it" in capsys.readouterr().err


def test_report_and_groups_are_those_of_a_run(out: Path, tmp_path: Path) -> None:
    common = (out / "labels", "-o", tmp_path / "again", "-q")
    assert measured(*common, "--group-by", "([ab])[.]png") == 0
    assert [row["group"] for row in rows(tmp_path / "again" / "summary.csv")] == ["a", "b"]
    page = (tmp_path / "again" / "report.html").read_text()
    assert "<title>cellseg-measure:" in page
    assert "<button>platelet</button>" in page.partition('id="images"')[0]
    assert "<td>red, white</td>" in page
    for name in ("images_mqc.json", "groups_mqc.json"):
        section = json.loads((tmp_path / "again" / name).read_bytes())
        assert section["parent_name"] == "cellseg-measure"
        assert section["pconfig"]["title"].startswith("cellseg-measure: ")
        assert section["id"] != json.loads((out / name).read_bytes())["id"]  # MultiQC merges sections of one id
    assert measured(*common, "--no-report") == 0
    assert not (tmp_path / "again" / "report.html").exists()
    assert [row["group"] for row in rows(tmp_path / "again" / "summary.csv")] == [".", "sub"]
    assert measured(*common, "--group-by", "(") == 2


def test_images_that_the_run_does_not_have_are_said(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(_images(out), tmp_path / "images")
    save_field(tmp_path / "images" / "new.png", (("white", 50, 50, 14),))
    with Image.open(tmp_path / "images" / "new.png") as image:
        labels = np.zeros((image.height, image.width), np.uint16)
    labels[40:60, 40:60] = 1
    tifffile.imwrite(out / "labels" / "new.png.tif", labels)
    arguments = (out / "labels", "--images", tmp_path / "images", "-o", tmp_path / "again")
    assert measured(*arguments) == 0
    said = f"no image of this name in the run in {out}: its cells are of the class unknown, platelets too"
    assert f"warning: annotations, 1 image: new.png: {said}" in capsys.readouterr().err
    assert [row["warning"] for row in rows(tmp_path / "again" / "images.csv")] == ["", said, ""]
    assert said in (tmp_path / "again" / "report.html").read_text()


@pytest.mark.parametrize(
    ("table", "labels", "is_taken"),
    [
        ("out/cells.csv", "out/labels/a", True),
        ("out/cells.csv", "out/labels", True),
        ("out/cells.csv", "out", True),
        ("out/cells.csv", "out/masks", False),
        ("cells.csv", "out/labels", False),
    ],
)
def test_tables_of_cells_further_up_are_of_something_else(
    table: str, labels: str, is_taken: bool, tmp_path: Path
) -> None:
    (tmp_path / labels).mkdir(parents=True)
    columns = ("image", "area_px", *(f"bbox_{side}_px" for side in ("left", "top", "width", "height")), "class")
    (tmp_path / table).write_text(",".join(columns) + "\na.png,9,1,1,3,3,white\n")
    found = known_classes(tmp_path / labels)
    assert (None if found is None else found.names) == (("white",) if is_taken else None)


def test_two_cells_do_not_share_a_recorded_one() -> None:
    """Two halves of a cell whose boxes are both like its own; and the better of two pairs comes first."""
    boxes = np.array([[10, 10, 20, 20], [40, 10, 15, 15]])
    recorded = RecordedCells(boxes, np.array([400, 200]), ("white", "red"), np.array([0.9, 0.8]))
    labels = np.zeros((60, 60), np.int32)
    labels[10:30:2, 10:30], labels[11:30:2, 10:30] = 1, 2
    assert recorded.match(measure_cells(labels)) == [("white", 0.9), ("", 1.0)]
    labels[:] = 0
    labels[10:25:2, 36:55], labels[11:25:2, 40:55] = 1, 2
    assert recorded.match(measure_cells(labels)) == [("", 1.0), ("red", 0.8)]
    both = RecordedCells(np.array([[40, 40, 10, 10]] * 2), np.array([100] * 2), ("red", "white"), np.ones(2))
    labels[:] = 0
    labels[40:50, 40:50] = 1
    assert both.match(measure_cells(labels)) == [("red", 1.0)]


def _images(out: Path) -> Path:
    (folder,) = json.loads((out / "run.json").read_text())["identity"]["inputs"]
    return Path(folder)
