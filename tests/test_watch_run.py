"""Following a folder that fills: each file once, when it is complete; the same end as a run over all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DarknessBackend, draw_discs
from test_folder_run import four, quick_disk, results, rows, save  # noqa: F401  (fixtures)

from cellseg_deploy import watch_run
from cellseg_deploy.errors import NothingToDoError, OutputError, UsageError
from cellseg_deploy.folder_run import ImageResult, RunSummary, run_folder
from cellseg_deploy.image_files import find_images
from cellseg_deploy.pipeline import Segmenter
from cellseg_deploy.watch_run import watch_folder
from cellseg_deploy.watching import CompleteFiles


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
    four: Path,  # noqa: F811
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
    four: Path,  # noqa: F811
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


def test_a_folder_that_is_away_for_a_moment_is_waited_for(
    four: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    away, out = tmp_path / "away", tmp_path / "out"
    names = sorted(path.name for path in four.iterdir())
    last = (four / names[-1]).read_bytes()
    (four / names[-1]).unlink()

    def back() -> None:
        away.rename(four)
        (four / names[-1]).write_bytes(last)

    microscope = Microscope(monkeypatch, nothing, lambda: four.rename(away), nothing, nothing, back)
    summary, _ = watch(four, out, microscope)
    assert (summary.found, summary.done) == (4, 4)
    assert caplog.text.count("waiting for it to come back") == 1


def test_images_that_are_moved_away_keep_their_results(
    four: Path,  # noqa: F811
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
    four: Path,  # noqa: F811
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


def test_what_cannot_be_watched(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    microscope = Microscope(monkeypatch)
    with pytest.raises(UsageError, match="not a folder"):
        watch(four / "a.png", tmp_path / "out", microscope)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="idle"):
            watch(four, tmp_path / "out", microscope, idle_seconds=seconds)
    with pytest.raises(UsageError, match="inside each other"):
        watch(four, four / "out", microscope)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToDoError):
        watch(tmp_path / "empty", tmp_path / "nothing", microscope)
    os.mkdir(tmp_path / "theirs")  # noqa: PTH102
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="not empty"):
        watch(four, tmp_path / "theirs", microscope)


def test_a_result_of_an_image_that_was_changed_is_none_until_it_is_done_again(
    four: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), find_images([four]), out)
    save(four / "b.png", draw_discs((40, 40), [(20, 20)]))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(four, out, Microscope(monkeypatch), on_plan=stop)
    assert [row["image"] for row in rows(out / "images.csv")] == ["a.png", "c.png", "d.png"]
    watch(four, out, Microscope(monkeypatch))
    assert [row["cells"] for row in rows(out / "images.csv")] == ["3", "1", "0", "1"]


def test_a_folder_in_which_something_is_being_written_is_not_idle(
    four: Path,  # noqa: F811
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
