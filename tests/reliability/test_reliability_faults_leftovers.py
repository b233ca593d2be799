"""What a run finds in its folder, left by a killed one, by a bad disk or by somebody else; and the order of writing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import ForkServer, done_lines, files, finished_files, left_overs, linux, results

from cellseg_deploy.report.page import REPORT_HTML
from cellseg_deploy.run.journal import JOURNAL
from cellseg_deploy.run.output_folder import ALWAYS, RUN_JSON, is_temporary

pytestmark = [pytest.mark.reliability, linux]
COUNT = 6
LABELS, OVERLAY = "labels/001.png.tif", "overlays/001.png.jpg"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, with a folder beside it that is nobody's."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious.tif").write_bytes(b"precious")
    return Path(shutil.copytree(whole, tmp_path / "out"))


def change_journal(out: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = out / JOURNAL
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def drop(image: str) -> Callable[[list[bytes]], list[bytes]]:
    """Journal without the line of ``image``."""
    return lambda lines: [line for line in lines if f'"image":"{image}"'.encode() not in line]


def tear(image: str) -> Callable[[list[bytes]], list[bytes]]:
    """Journal that ends in the middle of the line of ``image``: with all of it but the line end."""

    def torn(lines: list[bytes]) -> list[bytes]:
        (line,) = (line for line in lines if f'"image":"{image}"'.encode() in line)
        return [*(other for other in lines if other is not line), line[:-1]]

    return torn


def damage(image: str) -> Callable[[list[bytes]], list[bytes]]:
    """Journal with a number changed in the line of ``image``."""
    return lambda lines: [
        line.replace(b'"cells":', b'"cells":1', 1) if f'"image":"{image}"'.encode() in line else line for line in lines
    ]


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def garbage_without_a_line(out: Path) -> None:
    change_journal(out, drop("001.png"))
    garbage(out / LABELS)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, share: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)


def link_out(path: Path, name: str = "precious.tif") -> None:
    """Put a link to somebody's file in its place."""
    path.unlink()
    path.symlink_to(path.parents[2] / "theirs" / name)


REDONE: dict[str, Callable[[Path], object]] = {
    "labels without a line": garbage_without_a_line,
    "good files without a line": lambda out: change_journal(out, drop("001.png")),
    "a line without its end": lambda out: change_journal(out, tear("001.png")),
    "a damaged line": lambda out: change_journal(out, damage("001.png")),
    "labels cut in half": lambda out: cut(out / LABELS),
    "labels of no byte": lambda out: os.truncate(out / LABELS, 0),
    "one bit of the labels": lambda out: flip(out / LABELS, 0.9),  # of the pixels
    "overlay gone": lambda out: (out / OVERLAY).unlink(),
    "labels are a link out": lambda out: link_out(out / LABELS),
    "overlay is a link out to nothing": lambda out: link_out(out / OVERLAY, "nothing"),
}


@pytest.mark.parametrize("case", REDONE)
def test_what_cannot_be_trusted_is_done_again_and_nothing_else(
    server: ForkServer, images: Path, whole: Path, out: Path, case: str
) -> None:
    before = finished_files(out)
    REDONE[case](out)
    ended = server.run(images, out)
    assert ended.code == 0, ended.said
    assert results(out) == results(whole)
    after = finished_files(out)
    assert {name for name in after if after[name] != before[name]} == {LABELS, OVERLAY}
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out.parent / "theirs" / "precious.tif").read_bytes() == b"precious"
    assert left_overs(out) == []


def test_a_readable_file_that_is_another_one_is_kept_and_named(
    server: ForkServer, images: Path, whole: Path, out: Path
) -> None:
    """Also one bit of a JPEG that a disk flipped: nothing tells it from an edit. The row stays as it was."""
    flip(out / OVERLAY)
    before = files(out)
    for _ in range(2):
        ended = server.run(images, out)
        assert ended.code == 0, ended.said
        assert ended.said.count(OVERLAY) == 1
        assert json.loads(files(out)[RUN_JSON])["edited"] == [OVERLAY]
        told = {RUN_JSON: b"", REPORT_HTML: b""}  # its picture in the report is that of the file as it is now
        assert files(out) | told == before | told
    assert server.run(images, out, "--overwrite").code == 0
    assert results(out) == results(whole)


def test_an_edited_table_is_kept_under_another_name(server: ForkServer, images: Path, whole: Path, out: Path) -> None:
    path, aside = out / "cells.csv", out / "cells.edited-1.csv"
    path.write_bytes(path.read_bytes().replace(b"001.png,1,", b"001.png,9,"))
    edited = path.read_bytes()
    for _ in range(2):
        ended = server.run(images, out)
        assert ended.code == 0, ended.said
        assert aside.read_bytes() == edited
        assert files(out) == files(whole) | {aside.name: edited, RUN_JSON: files(out)[RUN_JSON]}


def test_a_finished_folder_is_left_as_it_is(server: ForkServer, images: Path, whole: Path, out: Path) -> None:
    before, lines = finished_files(out), (out / JOURNAL).read_bytes()
    for _ in range(2):
        ended = server.run(images, out)
        assert ended.code == 0, ended.said
    assert finished_files(out) == before
    assert (out / JOURNAL).read_bytes() == lines
    assert results(out) == results(whole)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_temporaries_are_cleaned_and_files_of_nobody_stay(
    server: ForkServer, images: Path, whole: Path, out: Path, options: tuple[str, ...]
) -> None:
    theirs = [out / "labels" / "notes.txt", out / "labels" / "ghost.png.tif"]
    for path in theirs:
        path.write_bytes(b"by hand")
    for name in (".cellseg-00.tmp", "labels/.cellseg-01.tmp", "overlays/sub/.cellseg-02.tmp"):
        (out / name).write_bytes(b"half")
    change_journal(out, drop("003.png"))
    assert server.run(images, out, *options).code == 0
    for path in theirs:
        assert path.read_bytes() == b"by hand"
        path.unlink()
    assert results(out) == results(whole)
    assert left_overs(out) == []


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("folder", ["labels", "overlays/sub"])
def test_a_folder_that_leads_out_is_refused(
    server: ForkServer, images: Path, out: Path, folder: str, options: tuple[str, ...]
) -> None:
    theirs = out.parent / "theirs"
    shutil.rmtree(out / folder)
    (out / folder).symlink_to(theirs)
    ended = server.run(images, out, *options)
    assert ended.code == 6, ended.said
    assert len(ended.error_lines) == 1
    assert "link" in ended.said
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {"precious.tif": b"precious"}


def test_a_link_that_is_made_while_the_run_is_under_way(server: ForkServer, images: Path, tmp_path: Path) -> None:
    """After it looked at the folder, before its first overlay: nothing is written where the link leads."""
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    run = server.stopped(images, out, at=3)
    assert not (out / "overlays").exists()
    (out / "overlays").symlink_to(theirs)
    run.signal(signal.SIGCONT)
    ended = run.wait()
    assert ended.code == 6, ended.said
    assert "link" in ended.said
    assert list(theirs.iterdir()) == []


# --- order


def test_order_of_writing(server: ForkServer, images: Path, tmp_path: Path) -> None:
    """Each file: write, fsync, rename, fsync of its folder. The journal's line of an image: after all that, and fsynced
    before the next image begins. That the disk keeps this order in a power cut is not tested here, and not claimed."""
    calls = server.trace(images, tmp_path / "out")
    assert "unwatched open" not in {call for call, _ in calls}
    renamed = [(at, path) for at, (call, path) in enumerate(calls) if call == "rename" and not is_temporary(path)]
    names = [path for _, path in renamed]
    assert len(names) == 2 * COUNT + names.count("run.json") + len((JOURNAL, *ALWAYS))
    for at, path in renamed:
        before = calls[:at]
        if path in ALWAYS:  # a line of the journal says first what will be there
            assert before[-2:] == [("write", JOURNAL), ("fsync", JOURNAL)]
            del before[-2:]
        temporary = before[-1][1]
        folder = os.path.dirname(path)  # noqa: PTH120
        assert os.path.dirname(temporary) == folder  # noqa: PTH120
        assert ("fsync", temporary) in before[-3:]
        assert calls[at + 1] == ("fsync", folder or ".")
        own = [call for call, name in calls[:at] if name == temporary]
        assert (own[0], own[-2:]) == ("open", ["write", "fsync"])
        assert set(own[1:-1]) == {"write"}
        assert path not in [name for call, name in calls[:at] if call in ("open", "write", "truncate")]
    lines = [at for at, call in enumerate(calls) if call == ("write", JOURNAL)]
    assert all(calls[at + 1] == ("fsync", JOURNAL) for at in lines)
    journal_is_there = calls.index(("rename", JOURNAL))
    outputs = [(at, path) for at, path in renamed if "/" in path]
    lines, tables = lines[: -len(ALWAYS)], lines[-len(ALWAYS) :]
    scales, lines = lines[:-COUNT], lines[-COUNT:]  # a line per group of images of one size, then one per image
    assert tables[0] > outputs[-1][0]
    assert 1 <= len(scales) < COUNT
    assert scales[-1] < outputs[0][0]
    assert all(journal_is_there < at for at, _ in outputs)
    for number, line in enumerate(lines):
        after = lines[number - 1] if number else 0
        between = [path for at, path in outputs if after < at < line - 1]
        assert len(between) == 2
        assert {path.rpartition(".")[0].partition("/")[2] for path in between} == {sorted_names(images)[number]}
    assert [path for at, path in renamed if at > lines[-1]][:2] == ["cells.csv", "images.csv"]
    assert done_lines(tmp_path / "out").total() == COUNT
    assert set(files(tmp_path / "out")) == set(names) - {JOURNAL}


def sorted_names(images: Path) -> list[str]:
    return sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
