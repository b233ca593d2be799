"""When a file of a growing folder is complete; nothing here waits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from corpus import good_jpg, good_png, rgb_tiff
from made_images import write

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.images.header import has_header
from cellseg_deploy.run.watch import PATIENCE, CompleteFiles


@dataclass
class World:
    """A clock and a file system of our own."""

    now: float = 100.0
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watcher = CompleteFiles(5, clock=lambda: self.now, stat=self.stat, is_readable=self.is_readable)

    def stat(self, path: Path) -> os.stat_result:
        if path.name not in self.files:
            raise FileNotFoundError(path)
        size, mtime = self.files[path.name]
        fake = type("Status", (), {"st_size": size, "st_mtime_ns": mtime})
        return fake()  # type: ignore[return-value]

    def is_readable(self, path: Path) -> bool:
        return path.name not in self.unreadable

    def at(self, now: float, **files: tuple[int, int]) -> list[str]:
        """What is newly complete when it is ``now`` and the folder holds ``files``."""
        self.now, self.files = now, files
        found = [FoundImage(Path("/no/such") / name, name, self.problems.get(name, "")) for name in sorted(files)]
        return [image.name for image in self.watcher.newly_complete(found)]


def test_a_file_is_complete_when_it_was_quiet_for_a_while_and_only_once() -> None:
    world = World()
    assert world.at(100, a=(10, 1)) == []
    assert world.at(104.9, a=(10, 1)) == []
    assert [path.name for path in world.watcher.waiting] == ["a"]
    assert world.at(105, a=(10, 1)) == ["a"]
    assert world.watcher.waiting == []
    assert world.at(200, a=(10, 1)) == []


@pytest.mark.parametrize("later", [(11, 1), (10, 2), (9, 1)])
def test_a_change_of_size_or_time_begins_the_wait_anew(later: tuple[int, int]) -> None:
    world = World()
    assert world.at(100, a=(10, 1)) == []
    assert world.at(104, a=later) == []
    assert world.at(108, a=later) == []
    assert world.at(109, a=later) == ["a"]


def test_a_file_that_is_written_again_later_is_given_again() -> None:
    world = World()
    world.at(100, a=(10, 1))
    assert world.at(105, a=(10, 1)) == ["a"]
    assert world.at(110, a=(20, 2)) == []
    assert world.at(115, a=(20, 2)) == ["a"]


def test_an_empty_file_and_one_without_header_are_waited_for_and_then_handed_over() -> None:
    world = World(unreadable={"b"})
    world.at(100, a=(0, 1), b=(5, 1), c=(5, 1))
    assert world.at(105, a=(0, 1), b=(5, 1), c=(5, 1)) == ["c"]
    assert world.at(100 + 5 * PATIENCE - 1, a=(0, 1), b=(5, 1), c=(5, 1)) == []
    assert world.at(100 + 5 * PATIENCE, a=(0, 1), b=(5, 1), c=(5, 1)) == ["a", "b"]


def test_a_header_that_comes_late_is_enough() -> None:
    world = World(unreadable={"a"})
    world.at(100, a=(5, 1))
    assert world.at(106, a=(5, 1)) == []
    world.unreadable.clear()
    assert world.at(107, a=(5, 1)) == ["a"]


def test_files_that_vanish_are_forgotten() -> None:
    world = World()
    world.at(100, a=(10, 1))
    world.at(105, a=(10, 1))
    assert world.at(106) == []
    assert world.at(107, a=(10, 1)) == []
    assert world.at(112, a=(10, 1)) == ["a"]


def test_several_at_once_in_order() -> None:
    world = World()
    world.at(100, c=(1, 1), a=(1, 1))
    world.at(103, c=(1, 1), a=(1, 1), b=(1, 1))
    assert world.at(105, c=(1, 1), a=(1, 1), b=(1, 1)) == ["a", "c"]
    assert world.at(108, c=(1, 1), a=(1, 1), b=(1, 1)) == ["b"]


def test_what_may_not_be_read_is_told_at_once() -> None:
    world = World(problems={"a": "a link that leads outside the folder"})
    assert world.at(100, a=(1, 1)) == ["a"]
    assert world.at(101, a=(1, 1)) == []


def test_links_and_files_that_cannot_be_looked_at_are_handed_over_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    now = [0.0]
    watcher = CompleteFiles(1, clock=lambda: now[0])
    assert watcher.newly_complete(find_images([tmp_path])) == []
    now[0] = PATIENCE
    assert [image.name for image in watcher.newly_complete(find_images([tmp_path]))] == ["dangling.png", "loop.png"]
    assert watcher.newly_complete(find_images([tmp_path])) == []


def test_with_the_real_file_system(tmp_path: Path) -> None:
    now = [0.0]
    watcher = CompleteFiles(1, clock=lambda: now[0])
    write(tmp_path / "a.png", good_png()[:20])
    assert watcher.newly_complete(find_images([tmp_path])) == []
    now[0] = 2
    assert watcher.newly_complete(find_images([tmp_path])) == []  # quiet, but no header yet
    write(tmp_path / "a.png", good_png())
    assert watcher.newly_complete(find_images([tmp_path])) == []
    now[0] = 3
    assert [image.name for image in watcher.newly_complete(find_images([tmp_path]))] == ["a.png"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_seconds_that_nobody_means(seconds: float) -> None:
    with pytest.raises(UsageError, match="quiet"):
        CompleteFiles(seconds)


@pytest.mark.parametrize("make", [good_png, good_jpg, rgb_tiff, lambda: rgb_tiff(tile=(16, 16), compression="zlib")])
def test_headers(tmp_path: Path, make: object) -> None:
    data = make()  # type: ignore[operator]
    assert has_header(write(tmp_path / "a", data))
    for length in (0, 3, 8, 20):
        assert not has_header(write(tmp_path / "a", data[:length]))


def test_a_tiff_whose_pixels_are_still_to_come(tmp_path: Path) -> None:
    assert not has_header(write(tmp_path / "a.tif", rgb_tiff()[:-1]))


def test_what_has_no_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"text", b"II*\0\xff\xff\xff\x7f", b"\xff\xd8\xff\xd9", good_png()[:16] + bytes(8)):
        assert not has_header(write(tmp_path / "a", data))
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing", "."):
        assert not has_header(tmp_path / name)
    assert not caplog.records
