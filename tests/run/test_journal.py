"""The journal: cut at every byte, damaged, interrupted; and the tables that are made of it."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
from run_records import BAD, NAMES, all_files, as_plain, identity, make_images, run
from segmented_images import odd_labels, segmented

from cellseg_deploy.cells.measure import UM_COLUMNS
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.checked_lines import line_of
from cellseg_deploy.files.fingerprint import Fingerprint
from cellseg_deploy.outputs import tables
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.journal import JOURNAL, ImageRecord, Journal, OutputFile, UnreadableJournalError


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[ImageRecord]:
    """Short ones: a done image with a cell, a failed one, one without a cell, and one whose pixel size is known."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them are written; order has its own test
    source, file = Fingerprint(3, 1, "ab" * 32), OutputFile.of("labels/a.png.tif", b"x")
    one, none = segmented(np.ones((2, 3)), name="a.png"), segmented(np.zeros((2, 3)), name=NAMES[1])
    known = segmented(np.ones((2, 3)), name="z.png", pixel_size_um=0.3)
    return [
        replace(run_tables.done(one, source=source, output_name="x", outputs=[file]), seconds={"read": 0.1 + 0.2}),
        run_tables.failed(BAD, "no"),
        run_tables.done(none, source=source, output_name="x", outputs=[]),
        run_tables.done(known, source=source, output_name="x", outputs=[file, file]),
    ]


@pytest.fixture
def whole(tmp_path: Path, records: list[ImageRecord]) -> bytes:
    """The bytes of a journal of ``records``."""
    (tmp_path / "whole").mkdir()
    with Journal.create(tmp_path / "whole", identity()) as journal:
        for record in records:
            journal.append(record)
    return (tmp_path / "whole" / JOURNAL).read_bytes()


def read_back(path: Path) -> list[ImageRecord]:
    content = journals.read(path)
    return list(journals.whole_records(path, content.entries.values()))


# --- reading and writing


def test_what_is_written_is_read(tmp_path: Path, whole: bytes, records: list[ImageRecord]) -> None:
    path = tmp_path / "whole" / JOURNAL
    content = journals.read(path)
    assert content.identity == RunIdentity.from_json(identity().to_json())
    assert content.started[:2] == "20"
    assert (content.damaged, content.whole_bytes) == ((), len(whole))
    assert [as_plain(record) for record in read_back(path)] == [as_plain(record) for record in records]
    assert list(content.entries) == [record.image for record in records]
    assert not any(entry.record.cells for entry in content.entries.values())  # ten thousand images fit in memory
    for line in whole.decode("ascii").splitlines():  # plain JSON lines for every other program
        assert json.loads(line)["kind"] in ("run", "image")


def test_cut_at_every_byte_it_holds_the_whole_lines(whole: bytes, records: list[ImageRecord]) -> None:
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        n_lines = sum(end <= length for end in ends)
        if n_lines == 0:
            with pytest.raises(UnreadableJournalError):
                journals.parse(Path("j"), io.BytesIO(whole[:length]))
            continue
        content = journals.parse(Path("j"), io.BytesIO(whole[:length]))
        assert (content.damaged, content.whole_bytes) == ((), ends[n_lines - 1])
        assert list(content.entries) == [record.image for record in records[: n_lines - 1]]


def test_cut_anywhere_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, whole: bytes, records: list[ImageRecord]
) -> None:
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for number, end in enumerate(ends):
        for length in {end, end + 1, (end + next(iter(ends[number + 1 :]), end)) // 2}:
            path = tmp_path / f"{length}.jsonl"
            path.write_bytes(whole[:length])
            with Journal.resume(journals.read(path)) as journal:
                for record in records[number:]:
                    journal.append(record)
            assert path.read_bytes() == whole


def test_a_flipped_bit_never_gives_another_result(whole: bytes, records: list[ImageRecord]) -> None:
    """An image is lost, or two where the line end between them is hit; none is another than it was."""
    first_line = whole.index(b"\n")
    intact = {name: entry.record for name, entry in journals.parse(Path("j"), io.BytesIO(whole)).entries.items()}
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 7
        try:
            content = journals.parse(Path("j"), io.BytesIO(bytes(damaged)))
        except UnreadableJournalError:
            assert position <= first_line
            continue
        assert position > first_line
        assert len(records) - 2 <= len(content.entries) < len(records)
        for name, entry in content.entries.items():
            assert entry.record == intact[name]
            line = bytes(damaged[entry.at : entry.at + entry.size])
            assert line in whole  # cells too


def test_a_damaged_line_is_told_and_the_others_hold(tmp_path: Path, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    lines[2] = lines[2].replace(b"no", b"NO", 1)
    lines.insert(3, b"not json at all\n")
    path = tmp_path / JOURNAL
    path.write_bytes(b"".join(lines) + b"\0" * 100)  # what a power cut leaves of a growing file
    content = journals.read(path)
    assert content.damaged == (3, 4)
    assert list(content.entries) == [json.loads(lines[number])["image"] for number in (1, 4, 5)]
    assert content.whole_bytes == path.stat().st_size - 100


def test_a_line_that_is_none_of_ours_in_spite_of_its_check(tmp_path: Path) -> None:
    with Journal.create(tmp_path, identity()):
        pass
    path = tmp_path / JOURNAL
    with path.open("ab") as file:
        file.write(line_of({"kind": "image", "image": "a.png"}))
        file.write(line_of({"kind": "other"}))
        file.write(path.read_bytes().splitlines(keepends=True)[0])
    assert journals.read(path).damaged == (2, 3, 4)


def first_line(**changes: Any) -> bytes:
    content = identity().to_json() | changes
    return line_of({"kind": "run", "version": 1, "identity": content, "started": ""})


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"", "no complete line"),
        (b'{"kind":"run"', "no complete line"),
        (b"{}\n", "damaged"),
        (line_of({"kind": "image"}), "damaged"),
        (line_of({"kind": "run", "version": 2}), "version 2"),
        (line_of({"kind": "run", "version": 1, "identity": {}, "started": ""}), "its first line is invalid"),
        (first_line(saved=1), "saved"),
        (first_line(model=1), "model"),
    ],
)
def test_a_first_line_that_says_nothing(tmp_path: Path, first: bytes, words: str) -> None:
    (tmp_path / JOURNAL).write_bytes(first)
    with pytest.raises(UnreadableJournalError, match=words):
        journals.read(tmp_path / JOURNAL)


def test_the_last_line_of_an_image_holds(tmp_path: Path) -> None:
    with Journal.create(tmp_path, identity()) as journal:
        journal.append(run_tables.failed("a.png", "first"))
        journal.append(run_tables.failed("b.png", "only"))
        journal.append(run_tables.failed("a.png", "second"))
    entries = journals.read(tmp_path / JOURNAL).entries
    assert [(name, entry.record.result["error"]) for name, entry in entries.items()] == [
        ("b.png", "only"),
        ("a.png", "second"),
    ]


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.png")
    with Journal.create(tmp_path, identity(inputs=(f"/{name}",))) as journal:
        journal.append(run_tables.failed(name, "no"))
    content = journals.read(tmp_path / JOURNAL)
    assert list(content.entries) == [name]
    assert content.identity.inputs == (f"/{name}",)


@pytest.mark.parametrize("stage", ["write", "fsync"])
def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    real_write, calls = os.write, []

    def write(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if stage == "write" and len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, bytes(data[:20]) if stage == "write" else data)

    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal.create(tmp_path, identity()) as journal:
        journal.append(run_tables.failed("a.png", "no"))
        before = (tmp_path / JOURNAL).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            if stage == "fsync":
                patch.setattr(os, "fsync", fsync)
            with pytest.raises(OutputError, match=r"No space left|Input/output"):
                journal.append(run_tables.failed("b.png", "no"))
        assert (tmp_path / JOURNAL).read_bytes() == before
        journal.append(run_tables.failed("c.png", "no"))
    assert list(journals.read(tmp_path / JOURNAL).entries) == ["a.png", "c.png"]


def test_a_write_in_parts_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with Journal.create(tmp_path, identity()) as journal:
        monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:7])))
        journal.append(run_tables.failed("a.png", "no"))
    assert list(journals.read(tmp_path / JOURNAL).entries) == ["a.png"]


def test_each_line_is_synced_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_write, real_fsync = os.write, os.fsync
    with Journal.create(tmp_path, identity()) as journal:
        monkeypatch.setattr(os, "write", lambda *a: events.append("write") or real_write(*a))
        monkeypatch.setattr(os, "fsync", lambda d: events.append("fsync") or real_fsync(d))
        journal.append(run_tables.failed("a.png", "no"))
        assert events == ["write", "fsync"]


def test_a_journal_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_bytes(b"old\n")
    (tmp_path / "out" / JOURNAL).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError):
        Journal(tmp_path / "out" / JOURNAL)
    with Journal.create(tmp_path / "out", identity()):
        pass
    assert (tmp_path / "precious").read_bytes() == b"old\n"


def test_a_record_that_was_changed_under_our_hands(tmp_path: Path) -> None:
    with Journal.create(tmp_path, identity()) as journal:
        journal.append(run_tables.failed("a.png", "no"))
    path = tmp_path / JOURNAL
    entries = journals.read(path).entries.values()
    path.write_bytes(path.read_bytes().replace(b"a.png", b"b.png"))
    with pytest.raises(OutputError, match="changed by another program"):
        list(journals.whole_records(path, entries))


# --- identities


def test_differences_are_said_in_words() -> None:
    assert differences(identity(), identity()) == []
    other = identity(
        model={"name": "stub", "sha256": "cd" * 32},
        task="confluence",
        saved=("labels",),
        settings={
            **{"scale": 0.5, "halo": 8, "bit_depth": None, "count_rule": "all", "new": True},
            **{"border_cells": "visible", "field_of_view": "auto"},
        },
        versions={"numpy": "2.5.0"},
        inputs=(),
    )
    assert differences(identity(), other) == [
        "model sha256 (`model`): abababababab... there, cdcdcdcdcdcd... now",
        "task (`task`): counting there, confluence now",
        "scale (`scale` or `cell_diameter_px`): none there, 0.5 now",
        "pixel size um (`pixel_size_um`): none there, nothing now",
        "saved (`save`): labels, overlays there, labels now",
        "versions numpy: 2.4.0 there, 2.5.0 now",
        "inputs (input folders): /smears there, none now",
        "new: nothing there, True now",
    ]


def test_an_identity_that_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match="JSON"):
        identity(operating_point={"threshold": float("nan")}).to_json()


# --- tables


def test_tables_are_those_of_a_run_that_writes_them_directly(tmp_path: Path) -> None:
    names = ["a.png", '=q"u\r,\n.png', os.fsdecode(b"\xff.png")]
    several = [segmented(odd_labels()[: 12 - 3 * number], name=name) for number, name in enumerate(names)]
    with Journal.create(tmp_path, identity()) as journal:
        for image in reversed(several):
            journal.append(run_tables.done(image, source=None, output_name="x", outputs=()))
    content = journals.read(tmp_path / JOURNAL)
    for name in ("cells.csv", "images.csv"):
        run_tables.write(tmp_path / name, name, content.path, [content.entries[image.name] for image in several])
    direct = tables.csv_rows([["image", *several[0].columns]])
    for image in several:
        cells = zip(*(column.tolist() for column in image.columns.values()), strict=True)
        direct += tables.csv_rows([image.name, *cell] for cell in cells)
    assert (tmp_path / "cells.csv").read_bytes() == direct
    rows = running.rows(tmp_path / "images.csv")
    assert list(rows[0]) == list(run_tables.IMAGE_COLUMNS)
    assert [int(row["cells"]) for row in rows] == [len(image.table) for image in several]
    assert rows[0]["confluence"] == f"{(several[0].labels > 0).mean():.4f}"
    assert rows[0]["median_cell_area_px"] == f"{sorted(several[0].table.columns['area_px'].tolist())[2]}.0000"
    assert rows[0]["counted"] == str(several[0].counted.sum())


def test_micrometres_are_columns_if_one_image_has_them(tmp_path: Path) -> None:
    images = make_images(tmp_path / "in")
    run(images, tmp_path / "out")
    rows = running.rows(tmp_path / "out" / "images.csv")
    assert list(rows[0]) == [
        *("image", "status", "cells", "counted", "confluence", "field_of_view_share", "median_cell_area_px", "scale"),
        *("pixel_size_um", "pixel_size_source", "median_cell_area_um2", "counted_per_mm2", "warning", "error"),
    ]
    by_name = {row["image"]: row for row in rows}
    assert [row["image"] for row in rows] == [image.name for image in images]
    assert (by_name["a.png"]["pixel_size_um"], by_name["a.png"]["counted_per_mm2"]) == ("", "")
    known = by_name["z.png"]
    assert known["pixel_size_um"] == "0.25"
    assert float(known["median_cell_area_um2"]) == pytest.approx(float(known["median_cell_area_px"]) / 16, abs=1e-4)
    cells = running.rows(tmp_path / "out" / "cells.csv")
    density = int(known["counted"]) / (8 * 20 * 0.25**2) * 1e6  # of 8 x 20 px
    assert float(known["counted_per_mm2"]) == pytest.approx(density, abs=1e-4)
    assert list(cells[0])[-len(UM_COLUMNS) :] == list(UM_COLUMNS)
    for row in cells:
        if row["image"] == "z.png":
            assert float(row["area_um2"]) == pytest.approx(int(row["area_px"]) / 16, abs=1e-4)
            assert float(row["perimeter_um"]) == pytest.approx(float(row["perimeter_px"]) / 4, abs=1e-4)
        else:
            assert {row[name] for name in UM_COLUMNS} == {""}
    assert by_name[BAD]["error"] == "the file is damaged"
    assert by_name[BAD]["warning"] == ""
    assert by_name[BAD]["cells"] == ""
    assert by_name["a.png"]["warning"] == "a note, of two lines"


@pytest.mark.parametrize("size_um", [0.0645, 0.06457891, 12.5])
def test_a_pixel_size_keeps_its_digits(tmp_path: Path, size_um: float) -> None:
    with Journal.create(tmp_path, identity()) as journal:
        journal.append(
            run_tables.done(segmented(odd_labels(), pixel_size_um=size_um), source=None, output_name="x", outputs=())
        )
    content = journals.read(tmp_path / JOURNAL)
    run_tables.write(tmp_path / "images.csv", "images.csv", content.path, list(content.entries.values()))
    text = running.rows(tmp_path / "images.csv")[0]["pixel_size_um"]
    assert float(text) == pytest.approx(size_um, rel=1e-5)
    assert io.StringIO(text).read() == f"{size_um:.6g}"


OUTSIDE = ("../../escaped", "/tmp/escaped", "sub/../../../x", "..", "a\0b")


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("field", ["output_name", "outputs"])
def test_a_line_that_leads_out_of_the_folder_is_damaged(tmp_path: Path, place: str, field: str) -> None:
    """Its check fits: whoever makes such a line can make that too."""
    record = run_tables.done(segmented(odd_labels()), source=None, output_name="x", outputs=())
    changed = {"output_name": place} if field == "output_name" else {"outputs": (OutputFile.of(place, b"x"),)}
    with Journal.create(tmp_path, identity()) as journal:
        journal.append(replace(record, image="bad.png", **changed))
        journal.append(replace(record, image="good.png", output_name="sub/..a..png"))
    content = journals.read(tmp_path / JOURNAL)
    assert content.damaged == (2,)
    assert list(content.entries) == ["good.png"]


# --- interrupted


class Killed(BaseException):
    """Stands for a SIGKILL: nothing below it may tidy up after it."""


def test_killed_at_any_stage_and_resumed_it_gives_the_same_files_and_repeats_nothing_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    images = make_images(tmp_path / "in")
    stages: list[str] = []
    assert run(images, tmp_path / "whole", stages.append) == [image.name for image in images]
    expected = all_files(tmp_path / "whole")
    assert {"cells.csv", "images.csv", "labels/a.png.tif"} < set(expected)
    for fatal in range(len(stages)):
        out = tmp_path / f"killed {fatal}"
        seen: list[str] = []

        def step(stage: str, seen: list[str] = seen, fatal: int = fatal) -> None:
            seen.append(stage)
            if len(seen) > fatal:
                raise Killed

        with pytest.raises(Killed):
            run(images, out, step)
        (out / ".cellseg-0011.tmp").write_bytes(b"half")  # what a kill in the middle of a file leaves
        if (out / JOURNAL).exists():
            with (out / JOURNAL).open("ab") as file:
                file.write(b'{"kind":"ima')
            (out / "labels").mkdir(exist_ok=True)
            (out / "labels" / "gone.png.tif").write_bytes(b"an image that is no longer there")
        finished = seen.count("recorded")
        again = run(images, out)
        # a.png and bad.png come first; what failed is tried again, what is done is not
        assert set(again) == {image.name for image in images[finished:]} | ({BAD} if finished >= 2 else set())
        if (out / "labels" / "gone.png.tif").exists():  # nobody named it: it may be somebody's, and stays
            (out / "labels" / "gone.png.tif").unlink()
        assert all_files(out) == expected, f"killed at {stages[fatal]}"
        assert run(images, out) == [BAD]
        assert all_files(out) == expected


def test_measured_scales_are_kept_and_a_damaged_one_is_none(tmp_path: Path, records: list[ImageRecord]) -> None:
    with Journal.create(tmp_path, identity()) as journal:
        journal.append_scale("a: 40 x 30 px", 0.58)
        journal.append(records[0])
        journal.append_scale("b: 40 x 30 px", 1.25)
    content = journals.read(tmp_path / JOURNAL)
    assert content.scales == {"a: 40 x 30 px": 0.58, "b: 40 x 30 px": 1.25}
    assert (list(content.entries), content.damaged) == ([records[0].image], ())
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes().replace(b'"scale":1.25', b'"scale":1.75'))
    content = journals.read(path)
    assert (content.scales, content.damaged) == ({"a: 40 x 30 px": 0.58}, (4,))


def test_what_was_written_to_other_files_is_kept(tmp_path: Path) -> None:
    with Journal.create(tmp_path, identity()) as journal:
        journal.append_file("cells.csv", "ab")
        entry = journal.append(run_tables.failed("a.png", "no"))
        journal.append_file("cells.csv", "cd")
    content = journals.read(tmp_path / JOURNAL)
    assert content.files == {"cells.csv": {"ab", "cd"}}
    assert content.entries == {"a.png": entry}
    assert content.damaged == ()
