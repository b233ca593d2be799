"""Output files: their contents, and that they appear whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from run_records import identity

from cellseg_deploy.cells import label_runs
from cellseg_deploy.errors import OutputError, OutputInUseError
from cellseg_deploy.files import atomic
from cellseg_deploy.files.lock import LOCK_NAME, exclusive
from cellseg_deploy.outputs import label_tiff, overlay, tables
from cellseg_deploy.outputs.names import output_names
from cellseg_deploy.run.journal import ImageRecord, Journal
from cellseg_deploy.run.output_folder import held_folder
from cellseg_deploy.run.resume import begin


def two_cells(hw: tuple[int, int] = (400, 500)) -> np.ndarray:
    """Two rectangles that touch along column 200."""
    labels = np.zeros(hw, np.int32)
    labels[100:300, 100:200] = 1
    labels[100:300, 200:300] = 2
    return labels


# --- label TIFF


@pytest.mark.parametrize(("largest", "dtype"), [(0, "uint16"), (200, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_label_tiff_keeps_every_label(largest: int, dtype: str) -> None:
    labels = np.zeros((300, 70), np.int32)
    labels[5, 5] = largest
    data = label_tiff.encode(labels)
    read = tifffile.imread(io.BytesIO(data))
    assert read.dtype == dtype
    assert np.array_equal(read, labels)


def test_label_tiff_is_what_imagej_reads_and_holds_no_date() -> None:
    labels = np.arange(300 * 70, dtype=np.int32).reshape(300, 70)
    data = label_tiff.encode(labels)
    assert data == label_tiff.encode(labels.copy())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        assert not page.is_tiled
        assert page.compression in (8, 32946)
        assert page.predictor == 1
        assert "DateTime" not in page.tags
        assert page.tags["Software"].value == "cellseg-deploy"


def test_label_tiff_refuses_what_is_no_label_image() -> None:
    for labels in (np.zeros((2, 2), np.float32), np.zeros((2, 2, 1), np.int32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(ValueError, match="labels must be"):
            label_tiff.encode(labels)


# --- tables


def test_cells_of_a_table() -> None:
    assert [tables.format_cell(value) for value in (None, True, np.False_, 3, np.int64(4), 0.5, np.float32(2))] == [
        "",
        "true",
        "false",
        "3",
        "4",
        "0.5000",
        "2.0000",
    ]


@pytest.mark.parametrize("name", ["=cmd.png", "+a.png", "-rf.png", "@x.png", "\ta.png", "\ra.png"])
def test_text_never_is_a_formula(name: str) -> None:
    assert next(csv.reader(io.StringIO(tables.csv_rows([[name]]).decode(), newline=""))) == ["'" + name]


@pytest.mark.parametrize("name", ["a.png", 'quo"te,comma.png', "new\nline.png", "Zürich-μ.png", "a=b.png"])
def test_names_survive_a_round_trip(name: str) -> None:
    assert list(csv.reader(io.StringIO(tables.csv_rows([[name, -3]]).decode(), newline=""))) == [[name, "-3"]]


def test_a_name_that_is_no_unicode_does_not_break_the_table() -> None:
    assert tables.csv_rows([[os.fsdecode(b"a\xff.png")]]) == b"a\\udcff.png\n"


def test_a_name_that_a_spreadsheet_would_run() -> None:
    assert tables.format_cell("'=a") == "''=a"  # or it would be the text that is made of =a
    assert tables.csv_rows([["=a", 1, 10, True], ["=a", 2, 20, False]]) == b"'=a,1,10,true\n'=a,2,20,false\n"


# --- overlay


def test_outlines_lie_on_the_cells_own_border_pixels() -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[2:7, 1:4] = 1
    labels[2:7, 4:8] = 2
    inside = np.zeros_like(labels, bool)
    inside[3:6, 2] = inside[3:6, 5:7] = True
    assert np.array_equal(overlay.outlines(labels, thickness=1), (labels > 0) & ~inside)
    thick = overlay.outlines(two_cells(), thickness=3)
    assert thick[200, 197:203].all()
    assert not thick[200, 196]
    assert not thick[200, 203]
    assert not (thick & (two_cells() == 0)).any()


def test_no_cell_no_outline_and_the_image_border_is_none() -> None:
    assert not overlay.outlines(np.zeros((5, 5), np.int32), thickness=2).any()
    assert not overlay.outlines(np.ones((5, 5), np.int32), thickness=2).any()


def test_overlay_shows_image_outline_and_count() -> None:
    image = np.full((400, 500, 3), (150, 60, 160), np.uint8)
    picture = overlay.draw(image, two_cells())
    assert picture.shape == image.shape
    assert tuple(picture[200, 199]) == tuple(picture[200, 200]) == overlay.OUTLINE_RGB
    assert tuple(picture[200, 150]) == (150, 60, 160)
    assert tuple(picture[350, 450]) == (150, 60, 160)
    assert (picture[:40, :80] == 255).all(axis=2).any()  # letters
    assert not np.array_equal(picture, overlay.draw(image, np.where(two_cells() == 2, 1, two_cells()).astype(np.int32)))
    decoded = cv2.imdecode(np.frombuffer(overlay.encode(image, two_cells()), np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(decoded[..., ::-1].astype(int) - picture).mean() < 3


@pytest.mark.parametrize("hw", [(1, 1), (13, 5000), (5000, 13), (40, 60), (30, 20_000)])
def test_overlay_of_any_size_can_be_read(hw: tuple[int, int]) -> None:
    labels = np.zeros(hw, np.int32)
    labels[0, 0] = 1
    picture = overlay.draw(np.full((*hw, 3), 200, np.uint8), labels)
    assert max(picture.shape) <= 16_384 + 200
    assert (picture > 225).all(axis=2).sum() > 50  # the letters are there
    assert overlay.encode(np.full((*hw, 3), 200, np.uint8), labels)[:2] == b"\xff\xd8"


def test_overlay_in_bands_is_that_of_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((1800, 1200), np.int32)  # outlines of 2 px
    for label, (top, left) in enumerate(rng.integers(0, (1750, 1150), (150, 2)), start=1):
        labels[top : top + 50, left : left + 50] = label
    labels[0, 0] = 150
    image = np.full((*labels.shape, 3), 200, np.uint8)
    heights = []
    real = overlay.outlines

    def seen(band: np.ndarray, *, thickness: int) -> np.ndarray:
        heights.append(len(band))
        return real(band, thickness=thickness)

    monkeypatch.setattr(overlay, "outlines", seen)
    monkeypatch.setattr(label_runs, "BAND_PIXELS", labels.size)
    whole = overlay.draw(image, labels)
    assert heights == [1800]
    heights.clear()
    monkeypatch.setattr(label_runs, "BAND_PIXELS", 1)
    assert np.array_equal(overlay.draw(image, labels), whole)
    assert len(heights) > 50
    assert sum(heights) <= 1.25 * len(labels)  # margins are computed twice


def test_overlay_wants_labels_of_the_images_size() -> None:
    with pytest.raises(ValueError, match="one size"):
        overlay.draw(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.int32))


# --- names


def test_output_names_never_meet() -> None:
    names = ["a.png", "a.jpg", "A.png", "sub/a.png", "e\u0301.png", "\u00e9.png", "x" * 255, "x" * 254 + "y"]
    result = output_names(names)
    assert result["a.png"] == "a.png~2"
    assert result["A.png"] == "A.png"
    assert result["sub/a.png"] == "sub/a.png"
    assert len({value.casefold() for value in result.values()}) == len(names)
    assert all(len(os.fsencode(value.rpartition("/")[2])) <= 251 for value in result.values())
    assert output_names(list(reversed(names))) == result


def test_no_output_needs_the_name_of_a_folder() -> None:
    names = ["s.png", "s.png.tif/b.png", "S.PNG.JPG/deep/c.png", "t.png", "t/u.png"]
    assert output_names(names) == {name: name for name in names} | {"s.png": "s.png~2"}


def test_output_names_that_are_in_use_stay() -> None:
    """a.png was done before A.png came, which would otherwise be the first of the two."""
    assert output_names(["a.png"]) == {"a.png": "a.png"}
    assert output_names(["A.png", "a.png"], {"a.png": "a.png"}) == {"a.png": "a.png", "A.png": "A.png~2"}
    assert output_names(["A.png", "b.png"], {"gone.png": "a.png"}) == {"A.png": "A.png~2", "b.png": "b.png"}
    names = ["a.png", "A.png", "x" * 255]
    assert output_names(names, output_names(names)) == output_names(names)


# --- atomic


def test_a_file_appears_whole_with_the_users_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        atomic.write_bytes(tmp_path / "a", b"new")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_fsync_rename_fsync_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename {self.stat().st_size} bytes")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    atomic.write_bytes(tmp_path / "a", b"12345")
    assert events == ["fsync file", "rename 5 bytes", "fsync folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_after_a_failure_the_old_file_stays_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)) as caught:
        atomic.write_bytes(tmp_path / "a", b"new")
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_an_os_error_of_the_block_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), atomic.atomic_file(tmp_path / "a"):
        raise BrokenPipeError(32, "Broken pipe")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="b: cannot be written"), atomic.writing(tmp_path / "b"):
        raise OSError(28, "No space left on device")


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "a").symlink_to(tmp_path / "precious")
    atomic.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert not (tmp_path / "a").is_symlink()


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / ("x" * 255), b"new")
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        atomic.write_bytes(tmp_path / "nothing" / "a", b"new")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        atomic.make_folder(tmp_path / "file" / "sub")


# --- folder


def test_lock_keeps_other_processes_out_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from cellseg_deploy.files.lock import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with exclusive(tmp_path):
        with pytest.raises(OutputInUseError, match="another run"), exclusive(tmp_path):
            pass
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "OutputInUseError" in other.stderr
    subprocess.run(command, check=True)
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from cellseg_deploy.files.lock import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / LOCK_NAME).exists()
    with held_folder(tmp_path):
        pass


def test_foreign_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "run.json").write_text('{"program": "something else"}')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            begin(tmp_path, identity(), overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "thesis.txt"]


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    ours = ["labels/a.png.tif", "labels/sub/b.png.tif", "overlays/a.png.jpg", "cells.csv", "images.csv"]
    ours += ["labels/.cellseg-0011.tmp", ".cellseg-0022.tmp"]
    theirs = ["notes.txt", "labels/mine.txt", "labels/a_corrected.tif", "figures/f.tif"]
    with Journal.create(tmp_path, identity(task="confluence")) as journal:
        for name in ("a.png", "sub/b.png"):
            journal.append(ImageRecord(name, "done", {}, output_name=name))
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "run.json").write_text(json.dumps({"program": "cellseg-infer"}))
    with pytest.raises(OutputError, match="`overwrite=True`"):
        begin(tmp_path, identity(), overwrite=False)
    assert begin(tmp_path, identity(), overwrite=True).kind == "fresh"
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(theirs)
    assert not (tmp_path / "overlays").exists()


def test_overwrite_does_not_follow_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.tif").touch()
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"program": "cellseg-infer"}))
    (out / "labels").symlink_to(outside)
    with pytest.raises(OutputError, match="link"):
        begin(out, identity(), overwrite=True)
    assert (outside / "precious.tif").exists()
