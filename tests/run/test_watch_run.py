"""Following a folder that fills: each file once, when it is complete; the same end as a run over all of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DarknessBackend, draw_discs
from running import results, rows, save

from cellseg_deploy.errors import NothingToDoError, OutputError, UsageError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run import watch as watch_run
from cellseg_deploy.run.folder import ImageResult, RunOptions, RunSummary, run_folder
from cellseg_deploy.run.watch import CompleteFiles, watch_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")


class Microscope:
    """Time for a watched folder: at each wait the next thing happens, and seconds pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *events: Callable[[], object]) -> None:
        self.now = 1000.0
        self._events = list(events)
        monkeypatch.setattr(time, "sleep", self._wait)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def _wait(self, seconds: float) -> None:
        self.now += seconds
        if self._events:
            self._events.pop(0)()
        assert self.now < 2000, "never ended"


def nothing() -> None: ...


def watch(folder: Path, out: Path, microscope: Microscope, **settings: Any) -> tuple[RunSummary, list[ImageResult]]:
    seen: list[ImageResult] = []
    complete = CompleteFiles(2.0, clock=lambda: microscope.now)
    settings = {"idle_seconds": 10.0, **settings}
    summary = watch_folder(
        Segmenter(DarknessBackend()), folder, out, complete=complete, on_result=seen.append, **settings
    )
    return summary, seen


def test_files_are_taken_when_they_are_complete(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is there, one is written in two halves, one is renamed into place, one comes broken and is written anew."""
    folder, out = tmp_path / "camera", tmp_path / "out"
    folder.mkdir()
    data = {path.name: path.read_bytes() for path in four.iterdir()}
    (folder / "a.png").write_bytes(data["a.png"])
    middle = len(data["b.png"]) // 2

    def rename() -> None:
        (tmp_path / "hidden").write_bytes(data["c.png"])
        (tmp_path / "hidden").rename(folder / "c.png")

    microscope = Microscope(
        monkeypatch,
        lambda: (folder / "b.png").write_bytes(data["b.png"][:middle]),
        lambda: (folder / "b.png").write_bytes(data["b.png"][: middle + 5]),
        lambda: (folder / "b.png").write_bytes(data["b.png"]),
        nothing,
        rename,
        lambda: (folder / "d.png").write_bytes(data["d.png"][:-12]),
        *[nothing] * 6,
        lambda: (folder / "d.png").write_bytes(data["d.png"]),
    )
    summary, seen = watch(folder, out, microscope)
    assert [(result.image, result.status) for result in seen] == [
        *(("a.png", "done"), ("b.png", "done"), ("c.png", "done")),
        *(("d.png", "failed"), ("d.png", "done")),
    ]
    assert (summary.found, summary.done, summary.failed, summary.cells) == (4, 4, 0, 7)
    run_folder(Segmenter(DarknessBackend()), find_images([folder]), tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


def test_what_is_done_already_is_skipped_and_a_run_may_go_on_either_way(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), find_images([four]), out)
    new = four / "e.png"
    microscope = Microscope(monkeypatch, lambda: save(new, draw_discs((40, 40), [(20, 20)])))
    summary, seen = watch(four, out, microscope)
    assert [result.image for result in seen] == ["e.png"]
    assert (summary.found, summary.skipped, summary.done, summary.others) == (5, 4, 1, 0)
    again = run_folder(Segmenter(DarknessBackend()), find_images([four]), out)
    assert (again.skipped, again.done) == (5, 0)


def test_a_name_that_needs_the_name_of_a_folder_comes_later(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = four / "s.png.tif"
    inside.mkdir()
    (four / "a.png").rename(inside / "x.png")
    microscope = Microscope(monkeypatch, *[nothing] * 4, lambda: shutil.copy(four / "b.png", four / "s.png"))
    summary, _ = watch(four, tmp_path / "out", microscope)
    assert (summary.done, summary.failed) == (5, 0)
    assert (tmp_path / "out/labels/s.png~2.tif").exists()


def test_images_that_are_moved_away_keep_their_results(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    watch(four, out, Microscope(monkeypatch))
    for path in four.iterdir():
        path.unlink()
    save(four / "z.png", draw_discs((40, 40), [(20, 20)]))
    summary, _ = watch(four, out, Microscope(monkeypatch))
    assert (summary.found, summary.done, summary.others) == (1, 1, 4)
    assert len(rows(out / "images.csv")) == 5


def test_tables_are_written_now_and_then_and_ctrl_c_ends_it(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    seen: list[int] = []

    def look() -> None:
        seen.append(len(rows(out / "images.csv")) if (out / "images.csv").exists() else -1)

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    late = [lambda: save(four / "e.png", draw_discs((40, 40), [(20, 20)])), *[nothing] * 4, ctrl_c]
    microscope = Microscope(monkeypatch, *[look] * 40, *late)
    with pytest.raises(KeyboardInterrupt):
        watch(four, out, microscope, idle_seconds=None)
    first = seen.index(4)
    assert set(seen) == {-1, 4}
    assert watch_run.TABLES_SECONDS - 2 <= first <= watch_run.TABLES_SECONDS + 2
    assert len(rows(out / "images.csv")) == 5
    assert not list(out.glob(".cellseg*"))


def test_what_cannot_be_watched(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    microscope = Microscope(monkeypatch)
    with pytest.raises(UsageError, match="not a folder"):
        watch(four / "a.png", tmp_path / "out", microscope)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="idle"):
            watch(four, tmp_path / "out", microscope, idle_seconds=seconds)
    with pytest.raises(UsageError, match="contain each other"):
        watch(four, four / "out", microscope)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToDoError):
        watch(tmp_path / "empty", tmp_path / "nothing", microscope)
    os.mkdir(tmp_path / "theirs")  # noqa: PTH102
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="not empty"):
        watch(four, tmp_path / "theirs", microscope)


def test_a_folder_in_which_something_is_being_written_is_not_idle(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "camera"
    folder.mkdir()
    data = (four / "a.png").read_bytes()
    more = [lambda size=size: (folder / "a.png").write_bytes(data[:size]) for size in range(1, len(data), 40)]
    microscope = Microscope(monkeypatch, *more, lambda: (folder / "a.png").write_bytes(data))
    summary, _ = watch(folder, tmp_path / "out", microscope, idle_seconds=1.0)
    assert (summary.done, summary.failed) == (1, 0)


# --- a folder that is away for a while


def test_a_folder_that_is_away_for_a_while_is_waited_for(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Away twice, which is two warnings; what was done stays done, and what comes later is taken."""
    moved, out = tmp_path / "moved", tmp_path / "out"
    microscope = Microscope(
        monkeypatch,
        *[nothing] * 3,
        *(lambda: four.rename(moved), *[nothing] * 4, lambda: moved.rename(four), nothing),
        *(lambda: four.rename(moved), nothing, lambda: moved.rename(four)),
        lambda: save(four / "e.png", draw_discs((40, 40), [(20, 20)])),
    )
    summary, seen = watch(four, out, microscope, idle_seconds=20.0)
    assert [result.image for result in seen] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert (summary.done, summary.failed) == (5, 0)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all(str(four) in warning and "waiting" in warning for warning in warnings)


def test_a_link_to_nothing_is_tried_once(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (four / "link.png").symlink_to(tmp_path / "nothing.png")
    summary, seen = watch(four, tmp_path / "out", Microscope(monkeypatch), idle_seconds=30.0)
    assert [result.image for result in seen].count("link.png") == 1
    assert (summary.done, summary.failed) == (4, 1)


def test_a_folder_inside_that_goes_between_listing_and_entering_is_waited_for(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scandir, inside = os.scandir, four / "inside"

    def going(path: Any) -> Any:
        if not isinstance(path, int) and Path(path) == inside and inside.exists():
            inside.rmdir()
        return scandir(path)

    def make() -> None:
        inside.mkdir()
        monkeypatch.setattr(os, "scandir", going)

    late = [nothing, lambda: save(four / "e.png", draw_discs((40, 40), [(20, 20)]))]
    summary, _ = watch(four, tmp_path / "out", Microscope(monkeypatch, make, *late))
    assert (summary.done, summary.failed) == (5, 0)
    assert [str(inside) in message for message in caplog.messages if "waiting" in message] == [True]


def test_a_linked_folder_whose_target_is_away_is_no_image(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link, moved = tmp_path / "link", tmp_path / "moved"
    link.symlink_to(four)
    away = [lambda: four.rename(moved), *[nothing] * 60, lambda: moved.rename(four)]
    microscope = Microscope(monkeypatch, *[nothing] * 3, *away)
    summary, seen = watch(link, tmp_path / "out", microscope, idle_seconds=100.0)
    assert [result.image for result in seen] == ["a.png", "b.png", "c.png", "d.png"]
    assert (summary.found, summary.failed) == (4, 0)


def test_a_folder_that_does_not_come_back_is_idle(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if a file in it was being written when it went: nobody can say that it still is."""
    data = (four / "a.png").read_bytes()
    writing = [lambda size=size: (four / "e.png").write_bytes(data[:size]) for size in range(1, 21)]
    microscope = Microscope(monkeypatch, *writing, lambda: four.rename(tmp_path / "moved"))
    summary, _ = watch(four, tmp_path / "out", microscope, idle_seconds=10.0)
    assert (summary.done, summary.failed) == (4, 0)
    assert microscope.now == pytest.approx(1000 + 21 + 10, abs=2)  # counted from when it was last seen to be written


def test_a_folder_that_is_away_at_the_first_look_is_an_error(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unlistable(*_: object, **__: object) -> None:
        raise UsageError("inside: the folder cannot be listed")

    monkeypatch.setattr(watch_run, "find_images", unlistable)
    with pytest.raises(UsageError, match="cannot be listed"):
        watch(four, tmp_path / "out", Microscope(monkeypatch))


# --- long groups


def test_tables_are_written_during_a_long_group(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four images of one group at 20 s each: after the second, and after the fourth."""
    out = tmp_path / "out"
    microscope = Microscope(monkeypatch)
    lengths: list[int] = []

    def slow(_: ImageResult) -> None:
        lengths.append(len(rows(out / "images.csv")) if (out / "images.csv").exists() else 0)
        microscope.now += 20.0

    watch_folder(
        Segmenter(DarknessBackend()),
        four,
        out,
        complete=CompleteFiles(2.0, clock=lambda: microscope.now),
        on_result=slow,
        idle_seconds=10.0,
    )
    assert lengths == [0, 0, 2, 2]
    assert len(rows(out / "images.csv")) == 4


@pytest.mark.reliability
def test_a_table_that_is_edited_while_the_run_goes_on_is_kept(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, aside = tmp_path / "out", tmp_path / "out/cells.edited-1.csv"

    def edit() -> None:
        (out / "cells.csv").write_text("mine\n")
        save(four / "e.png", draw_discs((40, 40), [(20, 20)]))

    microscope = Microscope(monkeypatch, *[nothing] * 40, edit, *[nothing] * 40)
    watch(four, out, microscope, idle_seconds=60.0)
    assert aside.read_text() == "mine\n"
    assert len(rows(out / "images.csv")) == 5
    assert {row["image"] for row in rows(out / "cells.csv")} == {"a.png", "b.png", "d.png", "e.png"}
    assert caplog.text.count("cells.csv: was edited since the run; kept as cells.edited-1.csv") == 1
    assert not list(out.glob("images.edited*"))


# --- images that come again


def test_an_image_of_this_session_that_is_touched_is_not_done_again(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Touched, and taken away and brought back; in a new folder and in one that is gone on with."""
    out, away = tmp_path / "out", tmp_path / "away"

    def come_again() -> None:
        os.utime(four / "a.png", (1, 1))
        shutil.copy(away, four / "b.png")

    def events() -> list[Callable[[], object]]:
        return [*[nothing] * 4, lambda: (four / "b.png").rename(away), *[nothing] * 2, come_again]

    summary, seen = watch(four, out, Microscope(monkeypatch, *events()))
    assert [result.image for result in seen] == ["a.png", "b.png", "c.png", "d.png"]
    assert (summary.found, summary.done, summary.skipped, summary.cells) == (4, 4, 0, 7)
    summary, seen = watch(four, out, Microscope(monkeypatch, *events()))
    assert not seen
    assert (summary.found, summary.done, summary.skipped, summary.cells) == (4, 0, 4, 7)


@pytest.mark.parametrize("save_kinds", [RunOptions().save, ()])
def test_an_image_that_has_its_former_bytes_again_has_its_former_results(
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_kinds: tuple[str, ...],
) -> None:
    """Without files of its own too, where only the journal tells whose the results are."""
    out, path = tmp_path / "out", four / "b.png"
    options = RunOptions(save=save_kinds)
    run_folder(Segmenter(DarknessBackend()), find_images([four]), out, options=options)
    expected, former = results(out), path.read_bytes()
    microscope = Microscope(
        monkeypatch,
        *[nothing] * 4,
        lambda: save(path, draw_discs((40, 40), [(20, 20)])),
        *[nothing] * 4,
        lambda: path.write_bytes(former),
    )
    summary, seen = watch(four, out, microscope, options=options)
    assert [(result.image, result.cells) for result in seen] == [("b.png", 1), ("b.png", 3)]
    assert (summary.found, summary.done, summary.skipped, summary.cells) == (4, 1, 3, 7)
    assert results(out) == expected
