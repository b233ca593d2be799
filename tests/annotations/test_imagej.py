"""ImageJ itself (Debian's package) opens our files, edits and saves them, and they are read back as it fills them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import annotation_files as kinds
import numpy as np
import pytest
import tifffile
from running import rows
from segmented_images import segmented, smear

from cellseg_deploy.annotations.labels import find_labels
from cellseg_deploy.cli import console, measure
from cellseg_deploy.outputs import label_tiff

JAR = Path("/usr/share/java/ij.jar")
PROGRAM = Path(__file__).resolve().parent.parent / "helpers" / "data" / "ImageJCheck.java"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not JAR.is_file() or shutil.which("javac") is None,
        reason="ImageJ is not installed; apt-get install imagej default-jdk-headless",
    ),
]


def test_imagej_reads_and_edits_our_files_and_we_read_its(tmp_path: Path) -> None:
    made = smear(n_cells=15)
    labels = made.labels
    kinds.png(tmp_path / "images" / "a.png", made.pixels_hwc)
    kinds.png(tmp_path / "blank" / "a.png", np.zeros((200, 300, 3), np.uint8))
    kinds.write(tmp_path / "a.tif", label_tiff.encode(labels))
    kinds.rois({"a.png": segmented(labels).labels}, tmp_path)
    for name in ("erased labels", "erased rois", "types"):
        (tmp_path / name).mkdir()
    places = ("a.tif", "a.zip", "erased labels/a.png.tif", "erased rois/a.zip", "types/a.zip", "types.tif")
    said = subprocess.run(
        ["java", "-Djava.awt.headless=true", "-cp", JAR, PROGRAM, *(tmp_path / place for place in places)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["pixels", str(np.count_nonzero(labels))]
    n = int(labels.max())
    for name in ("erased labels", "erased rois"):
        found = find_labels(tmp_path / "images", tmp_path / name).read("a", labels.shape).labels
        assert found.max() == n - 3
        gone = [label for label in range(1, n + 1) if not found[labels == label].any()]
        assert len(gone) == 3
        assert np.array_equal(found > 0, (labels > 0) & ~np.isin(labels, gone))
        out = tmp_path / f"measured {name}"
        measured = [tmp_path / name, "--images", tmp_path / "images", "-o", out, "-q"]
        assert console.run(measure.command, [str(word) for word in measured]) == 0
        assert [row["cells"] for row in rows(out / "images.csv")] == [str(n - 3)]
        assert len(rows(out / "cells.csv")) == n - 3
    drawn = tifffile.imread(tmp_path / "types.tif")
    found = find_labels(tmp_path / "blank", tmp_path / "types").read("a", (200, 300)).labels
    assert found.max() == drawn.max() == 7
    assert np.array_equal(found, drawn)
