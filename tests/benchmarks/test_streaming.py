"""``python -m cellseg_benchmarks streaming``: both ways give the same, and other labels are an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import streaming
from cellseg_benchmarks.harness import images
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError


def test_the_command_compares_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ["--megapixels", "0.4", "--rounds", "1", "--settle", "0", "--networks", "stub"]
    assert run(cli.command, ["streaming", *size, "-q", "-o", str(out)]) == 0
    found = json.loads((out / "streaming.json").read_text())
    assert [way["way"] for way in found["ways"]] == ["whole", "streamed"]
    assert all(len(way["cpu_seconds"]) == len(way["seconds"]) == 1 for way in found["ways"])
    assert found["cells"]["stub"] > 5
    assert "labels and cells.csv are the same" in (out / "streaming.md").read_text()
    assert not list(out.glob("work-*"))


def test_other_labels_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    labels = np.ones((20, 20), np.uint16)
    tifffile.imwrite(tmp_path / "labels" / "a.tif.tif", labels)
    tifffile.imwrite(tmp_path / "labels.tif", 2 * labels)
    with pytest.raises(DataError, match="not those of the whole one"):
        streaming._checked(tmp_path, tmp_path, tmp_path / "a.tif")


def test_a_mosaic_repeats_the_photographs_cut_to_the_smallest(tmp_path: Path) -> None:
    photographs = [np.full((30 + k, 40 - k, 3), 50 * k, np.uint8) for k in range(3)]
    images.write_mosaic(tmp_path / "a.tif", photographs, (70, 90))
    found = tifffile.imread(tmp_path / "a.tif")[..., 0]
    assert found.shape == (70, 90)
    assert found[[0, 29, 30, 60]][:, [0, 38, 76, 89]].tolist() == [
        [0, 50, 100, 100],
        [0, 50, 100, 100],
        [0, 50, 100, 100],
        [0, 50, 100, 100],
    ]
