"""Disks that are full, broken or read-only: the run stops with one sentence, and goes on when the disk is well."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_obeying_permissions
from fault_runner import CALLS
from faults import (
    Ended,
    ForkServer,
    check_nothing_is_torn,
    done_lines,
    files,
    finished_files,
    left_overs,
    linux,
    make_images,
    remount,
    results,
    say,
    small_disk,
)

from cellseg_deploy.files.lock import LOCK_NAME

pytestmark = [pytest.mark.reliability, linux]
COUNT = 16
SEED = 28


class Whole:
    """An undisturbed run: its folder, its files, and what a run after a fault must end with."""

    def __init__(self, server: ForkServer, images: Path, out: Path, *options: str) -> None:
        self.calls = server.trace(images, out, *options)
        self.files, self.results = files(out), results(out)


@pytest.fixture(scope="module")
def whole(server: ForkServer, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(server, images, tmp_path_factory.mktemp("whole") / "out")


def check_stopped(ended: Ended, out: Path, whole: Whole, words: str = "", *, is_clean: bool = True) -> None:
    """Exit code 6, one sentence why, what is there is whole, and nothing else is there if it could be removed."""
    assert ended.code == 6, ended.said
    assert len(ended.error_lines) == 1, ended.said
    assert words in ended.error_lines[0]
    assert all(line.startswith(("error: ", "WARNING: ")) for line in ended.said.splitlines()), ended.said
    check_nothing_is_torn(out, whole.files)
    if out.exists() and is_clean:
        assert left_overs(out) == []
        named = {name.partition("/")[2].removesuffix(".tif") for name in files(out) if name.startswith("labels/")}
        assert named == set(done_lines(out))


def check_goes_on(server: ForkServer, images: Path, out: Path, whole: Whole, *options: str) -> None:
    """The same command again ends well, with the files of an undisturbed run, and leaves finished ones alone."""
    before = finished_files(out)
    ended = server.run(images, out, *options)
    assert ended.code == 0, ended.said
    assert results(out) == whole.results
    assert before.items() <= finished_files(out).items()
    assert set(done_lines(out).values()) == {1}


# --- real disks


def test_a_disk_of_one_megabyte(server: ForkServer, images: Path, whole: Whole, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=1m"):
        ended = server.run(images, disk / "out")
        check_stopped(ended, disk / "out", whole, "No space left on device")
        assert 3 < len(done_lines(disk / "out")) < COUNT
        ended = server.run(images, disk / "out")  # still full
        check_stopped(ended, disk / "out", whole, "No space left on device")
        remount(disk, "size=64m")
        check_goes_on(server, images, disk / "out", whole)


@pytest.mark.parametrize("inodes", [2, 3, 4, 7, 20])
def test_a_disk_without_inodes(server: ForkServer, images: Path, whole: Whole, tmp_path: Path, inodes: int) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, f"size=64m,nr_inodes={inodes}"):
        check_stopped(server.run(images, disk / "out"), disk / "out", whole, "No space left on device")
        remount(disk, "nr_inodes=1000")
        check_goes_on(server, images, disk / "out", whole)


def test_a_disk_that_becomes_read_only(server: ForkServer, images: Path, whole: Whole, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=64m"):
        (disk / "out").mkdir()
        remount(disk, "ro")
        check_stopped(server.run(images, disk / "out"), disk / "out", whole, "Read-only file system")
        check_stopped(server.run(images, disk / "new"), disk / "new", whole, "Read-only file system")
        remount(disk, "rw")
        server.run(images, disk / "out", fault={"action": "kill", "calls": ["rename"], "at": 8})
        remount(disk, "ro")
        before = files(disk / "out")
        ended = server.run(images, disk / "out")
        assert (ended.code, len(ended.error_lines)) == (6, 1), ended.said
        assert files(disk / "out") == before
        remount(disk, "rw")
        check_goes_on(server, images, disk / "out", whole)


def test_a_folder_without_permission_to_write(
    images: Path, onnx_file: Callable[..., Path], tmp_path: Path, whole: Whole
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "out").mkdir(mode=0o555)
    done = run_obeying_permissions("infer", images, "-o", tmp_path / "out", "--model", onnx_file(), "-q")
    check_stopped(Ended(done.returncode, done.stderr, 0), tmp_path / "out", whole, "Permission denied")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("options", "file_bytes"), [((), 50_000), (("--save", "labels"), 6_000)])
def test_a_limit_of_the_file_size(
    server: ForkServer, images: Path, tmp_path: Path, options: tuple[str, ...], file_bytes: int
) -> None:
    """Met by the first overlay, and by the journal or a table after some images."""
    whole = Whole(server, images, tmp_path / "whole", *options)
    out = tmp_path / "out"
    check_stopped(server.run(images, out, *options, file_bytes=file_bytes), out, whole, "File too large")
    assert bool(done_lines(out)) == (file_bytes == 6_000)
    check_goes_on(server, images, out, whole, *options)


# --- injected, at several moments of a run


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("few") / "in", 6)


@pytest.fixture(scope="module")
def few_whole(server: ForkServer, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(server, few, tmp_path_factory.mktemp("few whole") / "out")


FAULTS: dict[str, dict[str, Any]] = {
    "full disk": {"action": "ENOSPC", "calls": ["write"], "lasting": True},
    "full for a moment": {"action": "ENOSPC", "calls": ["write"]},
    "no inodes": {"action": "ENOSPC", "calls": ["open", "mkdir"], "lasting": True},
    "cannot be written": {"action": "EIO", "calls": ["write"], "lasting": True},
    "cannot be synced": {"action": "EIO", "calls": ["fsync"]},
    "nothing can be synced": {"action": "EIO", "calls": ["fsync"], "lasting": True},
    "cannot be renamed": {"action": "EIO", "calls": ["rename"]},
    "became read-only": {"action": "EROFS", "calls": ["open", "mkdir", "rename", "remove"], "lasting": True},
    "died": {"action": "EIO", "lasting": True},
    "quota": {"action": "EDQUOT", "calls": ["open", "write", "mkdir"], "lasting": True},
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault(
    server: ForkServer, few: Path, few_whole: Whole, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    calls = fault.get("calls", CALLS)
    assert few_whole.calls[-1] == ("remove", LOCK_NAME)  # that it stays takes nothing from a run that was finished
    total = sum(call in calls for call, _ in few_whole.calls[:-1])
    moments = [1, 2, *sorted(random.Random(f"{SEED} {name}").sample(range(3, total - 2), 3)), total - 1, total]
    for at in moments:
        out = tmp_path / f"out{at}"
        ended = server.run(few, out, fault=fault | {"at": at})
        check_stopped(ended, out, few_whole, is_clean="remove" not in calls)
        check_goes_on(server, few, out, few_whole)
    say(capsys, f"{name}, at {len(moments)} moments, all resumed: same files")
