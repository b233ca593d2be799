"""summary.csv: sums of groups, and who is in which group."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from PIL import Image
from running import infer, results, rows

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.report.groups import UNGROUPED, grouping
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("quick_disk")
CELLS = {"a/1.png": 1, "a/2.png": 4, "a/3.png": 2, "b/p7_x.png": 3, "p7_top.png": 0}


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """Images with as many cells as ``CELLS`` says, all whole, and a damaged one in the folder ``b``."""
    for name, cells in CELLS.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_discs((60, 200), [(30 + 40 * n, 30) for n in range(cells)])).save(path)
    (tmp_path / "in/b/bad.png").write_bytes(b"\x89PNG")
    return tmp_path / "in"


def summary(out: Path) -> dict[str, dict[str, str]]:
    """Rows of summary.csv by group."""
    text = (out / "summary.csv").read_bytes().decode("utf-8-sig")
    return {row["group"]: row for row in csv.DictReader(io.StringIO(text))}


def run(images: Path, out: Path, **options: object) -> dict[str, dict[str, str]]:
    run_folder(Segmenter(DarknessBackend()), find_images([images]), out, options=RunOptions(**options))
    return summary(out)


def test_each_folder_has_its_sums(wards: Path, tmp_path: Path) -> None:
    found = run(wards, tmp_path / "out", reading=ReadOptions(pixel_size_um=0.5))
    assert list(found) == [".", "a", "b"]
    counts = [1, 4, 2]
    a = found["a"]
    assert [a[name] for name in ("images", "failed", "warnings", "cells", "counted")] == ["3", "0", "0", "7", "7"]
    mean, sd = statistics.mean(counts), statistics.stdev(counts)
    half = 4.302653 * sd / 3**0.5  # Student's t(0.975) with two degrees of freedom
    expected = [mean, sd, max(0, mean - half), mean + half]
    columns = [f"counted_per_image{end}" for end in ("", "_sd", "_ci95_low", "_ci95_high")]
    assert [float(a[name]) for name in columns] == pytest.approx(expected, abs=1e-4)
    assert float(a["counted_per_megapixel"]) == pytest.approx(7 / (3 * 60 * 200) * 1e6, abs=1e-3)
    assert float(a["counted_per_mm2"]) == pytest.approx(7 / (3 * 60 * 200 * 0.25) * 1e6, abs=1e-3)
    disc = int((draw_discs((60, 200), [(30, 30)])[..., 0] < 200).sum())
    assert float(a["confluence"]) == pytest.approx(7 * disc / (3 * 60 * 200), abs=1e-4)
    cells = [row for row in rows(tmp_path / "out/cells.csv") if row["image"].startswith("a/")]
    assert float(a["median_cell_area_px"]) == np.median([int(row["area_px"]) for row in cells])
    assert float(a["median_cell_area_um2"]) == float(a["median_cell_area_px"]) / 4
    assert (found["b"]["images"], found["b"]["failed"], found["b"]["counted"]) == ("2", "1", "3")
    assert (found["b"]["counted_per_image_sd"], found["b"]["counted_per_image_ci95_low"]) == ("", "")
    assert (found["."]["counted"], found["."]["median_cell_area_px"]) == ("0", "")


def test_it_is_the_same_after_a_resume_and_begins_with_a_mark_for_excel(wards: Path, tmp_path: Path) -> None:
    run(wards, tmp_path / "whole")
    images = find_images([wards])
    segmenter = Segmenter(DarknessBackend())
    run_folder(segmenter, images[3:], tmp_path / "parts")
    run_folder(segmenter, images, tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    starts = {path.name: path.read_bytes()[:3] for path in (tmp_path / "whole").glob("*.csv")}
    assert starts == {"summary.csv": b"\xef\xbb\xbf", "images.csv": b"ima", "cells.csv": b"ima"}


def test_another_grouping_resumes_the_run(wards: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (wards, "-o", out, "--model", model, "--cell-diameter", 20, "-q")
    assert infer(*command) == 3
    before = (out / "cells.csv").stat().st_mtime_ns, (out / "labels/a/1.png.tif").stat().st_mtime_ns
    assert infer(*command, "--group-by", "(p[0-9])_") == 3
    assert {group: row["counted"] for group, row in summary(out).items()} == {"p7": "3", UNGROUPED: "7"}
    assert (out / "labels/a/1.png.tif").stat().st_mtime_ns == before[1]
    assert infer(*command, "--group-by", "(p[0-9") == 2


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_says_the_groups(tmp_path: Path, separator: str) -> None:
    table = tmp_path / "who.csv"
    lines = ["group,image", '"Åsa, left",a/1.png', "Bo,p7_x.png", "Bo,b/p7_x.png"]
    if separator == ";":
        lines = [
            line.replace(",", ";", 1 if number != 1 else 0).replace('left",', 'left";')
            for number, line in enumerate(lines)
        ]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    of = grouping(str(table))
    assert [of(name) for name in ("a/1.png", "b/p7_x.png", "c/p7_x.png", "a/2.png")] == [
        "Åsa, left",
        "Bo",
        "Bo",
        UNGROUPED,
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows"),
        (b"name,group\na,b\n", "has name, group; expected rows with the columns image and group"),
        (b"image,group\na.png,\n", "row 2 has no group"),
        (b"image,group\na,x\na,y\n", "a is in the groups x and y"),
        (b"image,group\n\xff,y\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_table_of_groups_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "who.csv").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        RunOptions(group_by=str(tmp_path / "who.csv"))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        grouping(str(tmp_path / "none.csv"))
