"""What an output folder holds, which images are done, and what is swept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from run_records import BAD, all_files, identity, make_images, run
from segmented_images import odd_labels, segmented

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.lock import LOCK_NAME, exclusive
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import FORMATS, NAMES
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import tables
from cellseg_deploy.run.journal import JOURNAL, Journal
from cellseg_deploy.run.output_folder import make_place, places, sweep
from cellseg_deploy.run.resume import Decision, begin, check_usable, classify, decide, look_at
from cellseg_deploy.run.state import RunState


@pytest.fixture
def images(tmp_path: Path) -> list[FoundImage]:
    return make_images(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path, images: list[FoundImage]) -> Path:
    """The folder of a finished run."""
    run(images, tmp_path / "out")
    return tmp_path / "out"


# --- kinds of folders


def test_fresh_folders(tmp_path: Path) -> None:
    assert classify(tmp_path / "new", identity()).kind == "fresh"
    with exclusive(tmp_path):
        (tmp_path / ".cellseg-00.tmp").write_bytes(b"of a killed start")
        state = classify(tmp_path, identity())
        assert state.kind == "fresh"
        check_usable(state, tmp_path)
        assert sweep(tmp_path, ()) == [".cellseg-00.tmp"]
    (tmp_path / LOCK_NAME).touch()  # of a killed process
    assert classify(tmp_path, identity()).kind == "fresh"


def test_a_start_that_was_killed_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).touch()
    (tmp_path / ".cellseg-00.tmp").touch()
    assert begin(tmp_path, identity(), overwrite=False).kind == "fresh"
    sweep(tmp_path, ())
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_a_run_of_ours_with_the_same_identity_goes_on(out: Path) -> None:
    state = classify(out, identity())
    assert state.kind == "resume"
    assert state.journal is not None
    assert len(state.journal.entries) == 4
    check_usable(state, out)


def test_a_run_of_ours_with_another_identity_says_which(out: Path) -> None:
    state = classify(out, identity(task="confluence"))
    assert state.kind == "different"
    assert look_at(out).kind == "resume"  # its backend can still be looked up
    with pytest.raises(OutputError, match=r"task \(`task`\): counting there, confluence now.*`overwrite=True`"):
        check_usable(state, out)
    assert OutputError.exit_code == 6


FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "thesis": (lambda out: (out / "thesis.txt").touch(), "foreign", "thesis.txt"),
    "another program": (lambda out: (out / "run.json").write_text('{"program": "x"}'), "foreign", "run.json"),
    "no journal": (
        lambda out: (out / "run.json").write_text('{"program": "cellseg-infer"}'),
        "different",
        "without a journal",
    ),
    "torn journal": (lambda out: (out / JOURNAL).write_bytes(b'{"kind'), "foreign", "no complete line"),
    "damaged journal of ours": (
        lambda out: (
            (out / JOURNAL).write_bytes(b"{}\n"),
            (out / "run.json").write_text('{"program": "cellseg-infer"}'),
        ),
        "different",
        "damaged",
    ),
    "journal of another program": (
        lambda out: Journal.create(out, identity(program="cellseg-other 1.0")).close(),
        "foreign",
        "cellseg-other",
    ),
    "journal is a folder": (lambda out: (out / JOURNAL).mkdir(), "foreign", "not a file"),
    "journal is a link": (lambda out: (out / JOURNAL).symlink_to(out / "x"), "foreign", "not a file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(tmp_path: Path, case: str) -> None:
    make, kind, words = FOLDERS[case]
    make(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    state = classify(tmp_path, identity())
    assert state.kind == kind
    with pytest.raises(OutputError, match=words):
        check_usable(state, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be listed"):
        look_at(tmp_path / "file")


# --- decisions


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "nothing": (lambda image, out: None, ""),
    "touched": (lambda image, out: os.utime(image, (1, 1)), ""),
    "image longer": (lambda image, out: image.write_bytes(b"another content"), "image was changed"),
    "image other": (lambda image, out: image.write_bytes(b"CONTENT 0"), "image was changed"),
    "image gone": (lambda image, out: image.unlink(), "cannot be read now"),
    "output gone": (lambda image, out: (out / "labels/a.png.tif").unlink(), "labels/a.png.tif is missing"),
    "output folder gone": (lambda image, out: (out / "labels").rename(out / "x"), "is missing"),
    "output shorter": (lambda image, out: (out / "overlays/a.png.jpg").write_bytes(b""), "jpg is damaged"),
    "output other": (
        lambda image, out: (out / "overlays/a.png.jpg").write_bytes(b"CONTENT 0" * 5),
        "overlays/a.png.jpg is damaged",
    ),
    "output edited": (lambda image, out: Image.new("RGB", (3, 3)).save(out / "overlays/a.png.jpg"), ""),
    "output edited in another format": (lambda image, out: Image.new("L", (3, 3)).save(out / TIFF, "PNG"), ""),
    "output edited and cut": (lambda image, out: cut_picture(out / "overlays/a.png.jpg"), "jpg is damaged"),
    "output is a link": (lambda image, out: relink(out / "labels/a.png.tif"), "link"),
    "folder is a link": (lambda image, out: relink(out / "labels"), "link"),
}


TIFF = "labels/a.png.tif"


def cut_picture(path: Path) -> None:
    Image.new("RGB", (300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:-300])


def relink(path: Path) -> None:
    """Move ``path`` aside and put a link to it in its place: the same bytes, but not where they seem to be."""
    aside = path.parent.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)


@pytest.mark.parametrize("case", CHANGES)
def test_an_image_is_done_if_it_and_its_files_are_as_they_were(images: list[FoundImage], out: Path, case: str) -> None:
    change, words = CHANGES[case]
    entry = journals.read(out / JOURNAL).entries["a.png"]
    assert images[0].name == "a.png"
    change(images[0].path, out)
    decision = decide(images[0], entry, out)
    assert decision.action == ("work" if words and case != "image gone" else "skip")
    assert words in decision.reason
    edited = (TIFF if "format" in case else "overlays/a.png.jpg",) if case.startswith("output edited") else ()
    assert decision.edited == (() if words else edited)
    assert bool(decision.reason) == bool(words)


def test_images_without_a_good_record(images: list[FoundImage], out: Path) -> None:
    entries = journals.read(out / JOURNAL).entries
    assert decide(images[0], None, out).reason == "not done yet"
    bad = next(image for image in images if image.name == BAD)
    assert decide(bad, entries[BAD], out).reason == "failed before"
    known = replace(entries[BAD], record=replace(entries[BAD].record, input=entries["a.png"].record.input))
    assert decide(images[0], known, out).reason == "failed before"
    linked = FoundImage(images[0].path, "a.png", problem="a link that leads outside the folder")
    assert decide(linked, entries["a.png"], out) == Decision("skip", "a link that leads outside the folder")
    (out / "labels/a.png.tif").unlink()
    Image.new("RGB", (3, 3)).save(out / "overlays/a.png.jpg")
    decision = decide(linked, entries["a.png"], out)
    assert (decision.action, decision.edited, decision.is_changed) == ("work", ("overlays/a.png.jpg",), False)
    images[0].path.write_bytes(b"another content")
    decision = decide(images[0], entries["a.png"], out)
    assert (decision.action, decision.edited, decision.is_changed) == ("work", ("overlays/a.png.jpg",), True)


def test_a_changed_output_is_made_again_and_nothing_else(images: list[FoundImage], out: Path) -> None:
    expected = all_files(out)
    (out / "labels" / "a.png.tif").write_bytes(b"painted by hand")
    assert run(images, out) == ["a.png", BAD]
    assert all_files(out) == expected


# --- sweeping


def test_sweeping_removes_what_it_is_told_is_ours_and_temporaries(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = ["labels/notes.txt", "figures/a.tif", "readme.txt", "labels/a_corrected.tif", "rois/mine.zip", "cells.csv"]
    ours = ["labels/sub/lost.png.tif", "overlays/.cellseg-12.tmp", ".cellseg-1.tmp"]
    for name in (*theirs, *ours):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    kept = RunState.of(journals.read(out / JOURNAL)).image_files
    assert len(kept) == 6
    before = all_files(out)
    with caplog.at_level(logging.INFO):
        assert sorted(sweep(out, kept, {*kept, "labels/sub/lost.png.tif", "labels/gone.png.tif"})) == sorted(ours)
    assert set(all_files(out)) == set(before) - set(ours)
    assert [str(out / name) in caplog.text for name in ours] == [True] * 3
    assert sweep(out, kept, kept) == []


@pytest.mark.parametrize("place", ["labels", "labels/sub"])
def test_links_in_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.tif").touch()
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(OutputError, match="link that leads outside the output folder"):
        sweep(tmp_path / "out", ())
    with pytest.raises(OutputError, match="link that leads outside the output folder"):
        make_place(tmp_path / "out", f"{place}/deeper/a.tif")
    assert [path.name for path in outside.iterdir()] == ["precious.tif"]


def test_places_are_made(tmp_path: Path) -> None:
    assert make_place(tmp_path, "labels/sub/a.png.tif") == tmp_path / "labels/sub/a.png.tif"
    assert (tmp_path / "labels/sub").is_dir()


@pytest.mark.parametrize("place", ["labels/../../escaped.tif", "/tmp/escaped.tif", "../x", "labels/a\0.tif"])
def test_places_outside_of_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(OutputError, match="outside the output folder"):
        make_place(tmp_path / "out", place)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_removes_every_kind_of_file_that_the_journal_names_and_the_journal_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tables.done(segmented(odd_labels(), name="x"), source=None, output_name="sub/x", outputs=())
    with Journal.create(tmp_path, identity(saved=NAMES)) as journal:
        journal.append(image)
    mine = {"mine.txt", *(f"{format.folder}/mine{format.suffix}" for format in FORMATS if format.folder == "rois")}
    run_files = {format.run_file for format in FORMATS if format.run_file}
    for name in {*mine, *run_files, *places(FORMATS, ["sub/x"]), "cells.csv", "images.csv"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run.json").write_text(json.dumps({"program": "cellseg-infer"}))
    removed: list[str] = []
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert begin(tmp_path, identity(), overwrite=True).kind == "fresh"
    assert set(all_files(tmp_path)) == mine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "rois"]  # no empty folders
    assert removed[-2:] == ["run.json", JOURNAL]


def test_overwriting_keeps_files_of_kinds_that_the_run_did_not_save(out: Path) -> None:
    theirs = ["labels/a_corrected.tif", "rois/a.png.zip", "coco.json", "cells.parquet"]
    for name in theirs:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    begin(out, identity(), overwrite=True)
    assert sorted(all_files(out)) == sorted(theirs)


def test_overwriting_without_a_journal_says_what_stays(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody knows then which files of its folders are the run's."""
    (out / JOURNAL).unlink()
    (out / "run.json").write_text(json.dumps({"program": "cellseg-infer"}))
    begin(out, identity(), overwrite=True)
    assert {name.partition("/")[0] for name in all_files(out)} == {"labels", "overlays"}
    assert "without a journal, so files of the earlier run cannot be identified" in caplog.text
