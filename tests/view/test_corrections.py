"""The state behind the page: edits are journalled, survive a kill, and never touch the run."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from view_stub import StubWorkspace

from cellseg_deploy.errors import DataError, ModelError, OutputInUseError, UsageError
from cellseg_deploy.files.checked_lines import line_of
from cellseg_deploy.images.read import read_labels
from cellseg_deploy.view.corrections import JOURNAL, read_corrections
from cellseg_deploy.view.source import open_source
from cellseg_deploy.view.workspace import Workspace


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state(workspace, key):
    cells = workspace.cells(key)
    return {row["n"]: (row["area_px"], row["class"], row["counted"]) for row in cells["cells"]}, cells["edits"]


def make_edits(workspace, key):
    """Delete, split, merge, draw, class, undo, redo, confirm: numbers 1 (two touching discs) and 2 to begin with."""
    first = workspace.cells(key)["cells"]
    large = max(first, key=lambda row: row["area_px"])
    x, (_, top, _, height) = large["at"][0], large["box"]
    split = workspace.edit(key, {"op": "split", "cell": large["n"], "line": [[x, top - 3], [x, top + height + 3]]})
    assert len(split["cells"]) == 2
    assert split["found"] == 3
    workspace.edit(key, {"op": "merge", "cells": [row["n"] for row in split["cells"]]})
    workspace.undo(key)
    workspace.edit(key, {"op": "draw", "outline": [[5, 80], [25, 80], [25, 95], [5, 95]]})
    workspace.edit(key, {"op": "class", "cells": [split["cells"][0]["n"]], "class": "platelet"})
    other = next(row["n"] for row in first if row["n"] != large["n"])
    workspace.edit(key, {"op": "delete", "cells": [other]})
    workspace.undo(key)
    workspace.redo(key)
    return workspace.confirm(key, value=True)


def test_edits_change_cells_counts_and_classes(workspace, ids) -> None:
    last = make_edits(workspace, ids.a)
    assert (last["found"], last["counted"], last["confirmed"]) == (3, 2, True)  # a platelet does not count
    assert last["by_class"]["platelet"] == 1
    rows, edits = state(workspace, ids.a)
    assert edits == 4
    assert sorted(rows) == [1, 3, 4]
    assert rows[4][:2] == (300, "red")


def test_rows_of_changed_cells_are_those_of_a_fresh_look(workspace, ids) -> None:
    make_edits(workspace, ids.a)
    shown = workspace.cells(ids.a)["cells"]
    workspace.cells(ids.b)  # another image is opened: rows are made anew afterwards
    assert sorted(workspace.cells(ids.a)["cells"], key=lambda row: row["n"]) == sorted(shown, key=lambda row: row["n"])


def test_a_viewer_that_died_has_lost_nothing(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    before = state(workspace, ids.a)
    workspace._locked.__exit__(None, None, None)  # the lock of a process that was killed is gone
    workspace._locked = None
    again = StubWorkspace(open_source(out))  # nothing was closed or saved
    assert state(again, ids.a) == before
    assert again.cells(ids.a)["confirmed"]


def test_a_torn_last_line_is_dropped_with_a_notice(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    workspace.__exit__()
    whole = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(whole + b'{"kind":"edit","image":"a.png","edit":{"op":"dele')
    with StubWorkspace(open_source(out)) as again:
        assert any("not finished" in notice for notice in again.corrections.notices)
        assert again.cells(ids.a)["edits"] == 4
        again.undo(ids.a)
        assert again.cells(ids.a)["edits"] == 3
    lines = (out / JOURNAL).read_bytes()
    assert lines.startswith(whole)
    assert read_corrections(out)[2] == []  # the torn line is gone, the next one whole


def test_a_damaged_line_is_left_out_and_said(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    workspace.__exit__()
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[-2] = lines[-2].replace(b"redo", b"rado")
    (out / JOURNAL).write_bytes(b"".join(lines))
    assert any("damaged" in notice for notice in read_corrections(out)[2])


def test_the_run_is_never_changed(workspace, ids, out) -> None:
    before = hashes(out)
    make_edits(workspace, ids.a)
    workspace.export(["labels", "geojson", "overlays"], everything=True)
    workspace.__exit__()
    after = hashes(out)
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before)
    assert {name.partition("/")[0] for name in new} == {"corrections", "corrected"}


def test_corrected_labels_are_written_and_exported(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    assert workspace.save() == ["corrections/a.png.tif"]
    assert workspace.save() == []
    labels = tifffile.imread(out / "corrections" / "a.png.tif")
    assert (read_labels(out / "corrections" / "a.png.tif") == labels).all()
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    done = workspace.export(["labels", "geojson", "overlays"], everything=False)
    assert done["images"] == 1
    assert (tifffile.imread(out / "corrected" / "labels" / "a.png.tif") == labels).all()
    with (out / "corrected" / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["area_px"]) for row in rows] == np.bincount(labels.ravel())[1:].tolist()
    assert [row["class"] for row in rows].count("platelet") == 1
    with (out / "corrected" / "images.csv").open() as file:
        (image,) = csv.DictReader(file)
    assert (image["cells"], image["counted"]) == ("3", "2")
    features = json.loads((out / "corrected" / "geojson" / "a.png.geojson").read_text())["features"]
    assert len(features) == 3


def test_label_images_are_written_again_only_after_a_kill(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    workspace.confirm(ids.b, value=True)
    workspace.__exit__()
    assert {path.name for path in (out / "corrections").rglob("*.tif")} == {"a.png.tif", "b<i>.png.tif"}
    with StubWorkspace(open_source(out)) as again:
        assert again.save() == []
        again.undo(ids.a)
        again._locked.__exit__(None, None, None)  # killed
        again._locked = None
        with StubWorkspace(open_source(out)) as last:
            assert "corrections/a.png.tif" in last.save()


@pytest.mark.parametrize("field", ["labels", "output_name"])
@pytest.mark.parametrize("place", ["../../elsewhere", "/etc/passwd"])
def test_a_journal_that_leads_out_of_the_folder_is_not_followed(out, field, place) -> None:
    content = {
        "kind": "image",
        "image": "a.png",
        "photograph": "",
        "labels": "labels/a.png.tif",
        "sha256": "",
        "output_name": "a",
    }
    (out / "corrections").mkdir()
    (out / JOURNAL).write_bytes(line_of(content | {field: place}))
    assert read_corrections(out)[0] == {}


def test_the_export_of_an_untouched_run_equals_the_run(workspace, out) -> None:
    workspace.export(["labels", "geojson"], everything=True)
    names = [path.name for path in (out / "labels").glob("*.tif")]
    assert names
    for name in names:
        assert (out / "corrected" / "labels" / name).read_bytes() == (out / "labels" / name).read_bytes()
    assert (out / "corrected" / "cells.csv").read_bytes() == (out / "cells.csv").read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"op": "delete", "cells": []},
        {"op": "delete", "cells": ["1"]},
        {"op": "delete", "cells": [99]},
        {"op": "merge", "cells": [1, 2]},
        {"op": "class", "cells": [1], "class": "elephant"},
        {"op": "split", "cell": 1, "line": [[0, 0]]},
        {"op": "relabel", "labels": "labels/a.png.tif", "sha256": "0"},
    ],
)
def test_an_edit_that_cannot_be_made_leaves_no_trace(workspace, ids, out, edit) -> None:
    before = state(workspace, ids.a)
    with pytest.raises(UsageError):
        workspace.edit(ids.a, edit)
    assert state(workspace, ids.a) == before
    assert not (out / JOURNAL).exists() or read_corrections(out)[0] == {}


def test_labels_of_another_run_are_refused(workspace, ids, out) -> None:
    make_edits(workspace, ids.a)
    workspace.__exit__()
    tifffile.imwrite(out / "labels" / "a.png.tif", np.zeros((100, 130), np.uint16))
    again = StubWorkspace(open_source(out))
    with pytest.raises(DataError, match="not the label image that the corrections"):
        again.cells(ids.a)


def test_one_viewer_corrects_a_folder_at_a_time(workspace, ids, out) -> None:
    other = StubWorkspace(open_source(out))  # opened before there was a correction
    make_edits(workspace, ids.a)
    with pytest.raises(OutputInUseError):
        other.undo(ids.a)
    before = state(workspace, ids.a)
    workspace.__exit__()
    assert state(other, ids.a)[1] in (0, 4)
    other.confirm(ids.a, value=False)  # reads what the first one did
    assert state(other, ids.a) == before
    other.__exit__()


def test_a_failed_image_and_a_missing_photograph_say_why(workspace, ids, finished_run) -> None:
    listed = {image["id"]: image for image in workspace.overview()["images"]}
    assert "cut short" in listed[ids.bad]["error"]
    assert listed[ids.a]["cells"] == 2


def test_labelling_anew_equals_the_segmenter_and_is_an_edit_only_if_kept(workspace, ids, out, finished_run) -> None:
    tiles = 0
    for threshold in (0.2, 0.9):
        shown = workspace.label(ids.a, {"task": "counting", "threshold": threshold})
        ran = sum(workspace.labeller.open().backend.batches)
        assert tiles in (0, ran)  # the network ran once
        tiles = ran
    assert not (out / JOURNAL).exists()
    kept = workspace.label(ids.a, {"threshold": 0.9, "keep": True})
    assert kept["found"] == shown["found"]
    assert workspace.undo(ids.a)["found"] == 2
    assert workspace.redo(ids.a)["found"] == shown["found"]
    for wrong in ({"threshold": 2}, {"threshold": "x"}, {"task": "all"}, {"cell_diameter_px": 0}):
        with pytest.raises(UsageError):
            workspace.label(ids.a, wrong)


def test_no_other_model_takes_the_place_of_the_runs(out) -> None:
    opened = open_source(out)
    assert opened.recorded is None  # the stub has no file
    workspace = Workspace(opened)
    key = next(iter(opened.images))
    with pytest.raises(ModelError, match=r"run\.json does not tell"):
        workspace.label(key, {"threshold": 0.4})
    assert workspace.cells(key)["found"] == 2  # all else works


def test_images_without_a_run_are_counted_when_opened(finished_run, tmp_path) -> None:
    with StubWorkspace(open_source(finished_run / "smears" / "a.png", tmp_path / "mine")) as workspace:
        (key,) = workspace.source.images
        assert not (tmp_path / "mine").exists()
        assert workspace.cells(key)["found"] == 2
        workspace.edit(key, {"op": "delete", "cells": [1]})
    again = StubWorkspace(open_source(tmp_path / "mine"))
    assert again.cells(key)["found"] == 1
    again.__exit__()
