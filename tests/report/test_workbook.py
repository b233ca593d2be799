"""results.xlsx: the tables of a run as a workbook, read back with openpyxl."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from conftest import DarknessBackend
from running import results

from cellseg_deploy.images.find import find_images
from cellseg_deploy.outputs import workbook
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter

openpyxl = pytest.importorskip("openpyxl")
pytest.importorskip("xlsxwriter")
pytestmark = pytest.mark.usefixtures("quick_disk")


def run(images: Path, out: Path, first: int | None = None) -> None:
    found = find_images([images])[:first]
    run_folder(Segmenter(DarknessBackend()), found, out, options=RunOptions(save=("xlsx",)))


def sheet(out: Path, name: str) -> list[tuple[Any, ...]]:
    book = openpyxl.load_workbook(out / "results.xlsx", read_only=True)
    found = list(book[name].iter_rows(values_only=True))
    book.close()
    return found


def test_numbers_are_numbers_and_names_are_text(folder: Path, tmp_path: Path) -> None:
    (folder / "a.png").rename(folder / "=1+1.png")
    out = tmp_path / "out"
    run(folder, out)
    for name in ("summary", "images", "cells"):
        with (out / f"{name}.csv").open(encoding="utf-8-sig", newline="") as file:
            expected = list(csv.reader(file))
        found = sheet(out, name)
        assert found[0] == tuple(expected[0])
        assert len(found) == len(expected)
        for row, texts in zip(found[1:], expected[1:], strict=True):
            for column, value, text in zip(expected[0], row, texts, strict=True):
                if text == "":
                    assert value is None
                elif isinstance(value, bool):
                    assert str(value).lower() == text
                elif isinstance(value, (int, float)):
                    assert value == float(text)
                else:
                    assert value == text.removeprefix("'"), column
                    assert column in ("group", "image", "status", "warning", "error")
    names = [row[0] for row in sheet(out, "images")]
    assert "=1+1.png" in names
    about = dict(sheet(out, "about"))
    assert about["model name"] == "stub"
    assert about["settings count rule"] == "half"


def test_a_resumed_run_gives_the_same_bytes(four: Path, tmp_path: Path) -> None:
    run(four, tmp_path / "whole")
    run(four, tmp_path / "parts", first=2)
    run(four, tmp_path / "parts")
    assert results(tmp_path / "parts")["results.xlsx"] == results(tmp_path / "whole")["results.xlsx"]


def test_cells_beyond_the_last_row_are_left_out_and_it_is_said(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workbook, "MAX_ROWS", 5)
    run(four, tmp_path / "out")
    assert len(sheet(tmp_path / "out", "cells")) == 5
    assert "3 rows do not fit in a sheet" in caplog.text
    assert ("rows left out", "3 of cells.csv, beyond the last row of a sheet") in sheet(tmp_path / "out", "about")
