"""``python -m cellseg_benchmarks correct``: the truth as the corrector, and a table of recorded scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from conftest import ROOT
from view_stub import make_viewed_run

from cellseg_benchmarks.quality.correct import correct_command, play, read_loop
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images.read import read_labels
from cellseg_deploy.view.corrections import read_corrections

RECORDS = ROOT / "docs" / "study-results" / "correct"


def write(folder: Path, name: str, **changes: Any) -> None:
    scores = {"f1": 0.9, "precision": 0.8, "recall": 1.0, "recall_overlapping": 0.5, "merges": 2, "count_mae": 0.25}
    scores |= {"n_images": 3, "n_true": 30, "by_class": {"WBC": {"n": 4, "found": 3, "pieces": 1}}}
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.json").write_text(json.dumps({**scores, **changes}))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    for when, f1 in (("before", 0.9), ("after", 0.95)):
        write(tmp_path, f"{when}/here", f1=f1)
    (tmp_path / "fields.csv").write_text("image,cells\na.png,5\nb.png,7\n")
    config = {"config": {"data": {"patches_per_image": 4}, "optim": {"epochs": 3}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_table_has_both_networks_on_each_set_of_fields(recorded: Path) -> None:
    done = CliRunner().invoke(correct_command, ["table", str(recorded)])
    assert done.exit_code == 0, done.output
    first, _, title, _, *lines = done.output.splitlines()
    assert first == "2 corrected fields with 12 cells, 24 tiles of training"
    assert title == "**here**: 3 other fields, 30 cells"
    assert lines[2:4] == [
        "| before | 0.900 | 0.800 | 1.000 | 0.50 | 2 | 3 of 4 | 1 | 0.25 |",
        "| after | 0.950 | 0.800 | 1.000 | 0.50 | 2 | 3 of 4 | 1 | 0.25 |",
    ]


def test_the_page_has_the_very_tables_of_the_records() -> None:
    page = (ROOT / "docs" / "correct.md").read_text(encoding="utf-8")
    first, *lines = read_loop(RECORDS).to_markdown().splitlines()
    assert first in " ".join(page.split())
    assert "\n".join(lines).strip() in page


def test_records_that_do_not_compare_are_refused(recorded: Path) -> None:
    write(recorded, "before/there")
    with pytest.raises(UsageError, match=r"after/there/metrics\.json is missing; expected fields\.csv"):
        read_loop(recorded)
    write(recorded, "after/there", n_true=31)
    with pytest.raises(DataError, match="there before and after are not of the same fields"):
        read_loop(recorded)
    (recorded / "after/there/metrics.json").write_text(json.dumps({"f1": 1, "recall_overlapping": 1}))
    with pytest.raises(DataError, match=r"after/there/metrics\.json: expected an evaluation with --boxes"):
        read_loop(recorded)
    with pytest.raises(UsageError, match=r"before/FIELDS/metrics\.json is missing"):
        read_loop(recorded / "before" / "here")


def test_the_truth_plays_the_corrector(tmp_path: Path) -> None:
    out = make_viewed_run(tmp_path)
    true = {"a": np.zeros((100, 130), np.uint16), "sub/b<i>": np.zeros((100, 130), np.uint16)}
    true["a"][10:20, 10:20], true["a"][10:20, 20:30], true["a"][50:60, 50:60] = 7, 3, 65535
    for stem, labels in true.items():
        (tmp_path / "masks" / stem).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "masks" / f"{stem}.tif", labels)
    done = CliRunner().invoke(correct_command, ["play", str(out), "--masks", str(tmp_path / "masks")])
    assert done.output.splitlines() == ["image,cells", "a.png,2", "sub/b<i>.png,0"]  # not the one that failed
    corrected = read_labels(out / "corrections" / "a.png.tif")
    assert np.array_equal(corrected > 0, (true["a"] > 0) & (true["a"] < 65535))
    assert corrected.max() == 2
    assert [said.confirmed for said in read_corrections(out)[0].values()] == [True, True]
    with pytest.raises(UsageError, match="has corrections already"):
        play(out, tmp_path / "masks")
    (tmp_path / "masks" / "a.tif").unlink()
    with pytest.raises(DataError, match=r"a\.png: no label image of the same name"):
        play(out, tmp_path / "masks")
