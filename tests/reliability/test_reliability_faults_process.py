"""Memory that runs out, two runs in one folder, signals, and what a killed run leaves running: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import running
from conftest import ROOT, draw_discs
from corpus import wide_png
from faults import (
    ForkServer,
    check_nothing_is_torn,
    done_lines,
    files,
    finished_files,
    left_overs,
    linux,
    make_images,
    processes_of_session,
    results,
    say,
)
from PIL import Image

pytestmark = [pytest.mark.reliability, linux]
COUNT = 8
MIB = 1 << 20


def table(out: Path) -> dict[str, dict[str, str]]:
    return {row["image"]: row for row in running.rows(out / "images.csv")}


# --- memory


def test_an_image_for_which_memory_is_short_fails_alone(server: ForkServer, tmp_path: Path) -> None:
    """The address space is limited for real, to less than one array of the large image takes.

    With one thread: of images that are worked on at the same moment, any may be the one that finds no memory.
    """
    images = make_images(tmp_path / "in", 4)
    assert server.run(images, tmp_path / "whole").code == 0
    Image.new("1", (12_000, 12_000), 1).save(images / "large.png")  # 412 MiB as RGB
    out, before = tmp_path / "out", dict[str, tuple[int, int]]()
    for _ in range(2):  # what failed is tried again, and nothing else
        ended = server.run(images, out, "--threads", "1", more_memory=400 * MIB)
        assert ended.code == 3, ended.said
        rows = table(out)
        assert [name for name, row in rows.items() if row["status"] != "done"] == ["large.png"]
        assert "not enough memory" in rows["large.png"]["error"]
        assert len(rows) == 5
        whole = files(tmp_path / "whole")
        assert {name: data for name, data in files(out).items() if "/" in name} == {
            name: data for name, data in whole.items() if "/" in name
        }
        assert before.items() <= finished_files(out).items()
        before = finished_files(out)
    (images / "large.png").unlink()
    assert server.run(images, out).code == 0
    rows = table(out)
    assert rows.pop("large.png")["status"] == "failed"  # its last line in the journal
    assert rows == table(tmp_path / "whole")
    assert (out / "cells.csv").read_bytes() == (tmp_path / "whole" / "cells.csv").read_bytes()


def test_a_huge_header_is_refused_in_bounded_memory(server: ForkServer, tmp_path: Path) -> None:
    """60,000 x 60,000 px would be 10 GB; the limit would turn an attempt into an error of memory."""
    images = make_images(tmp_path / "in", 3)
    usual = server.run(images, tmp_path / "usual")
    (images / "huge.png").write_bytes(wide_png((60_000, 60_000), bits=8))
    ended = server.run(images, tmp_path / "out", more_memory=1024 * MIB)
    assert ended.code == 3, ended.said
    rows = table(tmp_path / "out")
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["huge.png"]
    assert "`max_pixels`" in rows["huge.png"]["error"]
    assert ended.peak_bytes < usual.peak_bytes + 50 * MIB


# --- two runs in one folder


@pytest.mark.parametrize("at", [1, 5, 2 * COUNT + 2])
def test_a_second_run_in_the_folder_is_refused_and_disturbs_nothing(
    server: ForkServer, images: Path, whole: Path, tmp_path: Path, at: int
) -> None:
    out = tmp_path / "out"
    first = server.stopped(images, out, at)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for options in ((), ("--overwrite",)):
        second = server.run(images, out, *options)
        assert second.code == 7, second.said
        assert len(second.error_lines) == 1
        assert "another run" in second.said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    assert results(out) == results(whole)


def test_the_lock_and_everything_else_of_a_run_ends_with_its_process(
    server: ForkServer, images: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = server.stopped(images, out, 7)
    assert processes_of_session(first.pid) == [first.pid]  # it has no children, so none can be left
    assert server.run(images, out).code == 7
    first.signal(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    assert processes_of_session(first.pid) == []
    assert server.run(images, out).code == 0
    assert results(out) == results(whole)


def test_a_stopped_run_ends_with_its_server(images: Path, tmp_path: Path) -> None:
    """As after a test that failed before it let the run go on."""
    with ForkServer(tmp_path) as server:
        run = server.stopped(images, tmp_path / "out", 1)
        assert processes_of_session(run.pid) == [run.pid]
    left = processes_of_session(run.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_what_is_left_running_would_be_seen() -> None:
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']).wait()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(processes_of_session(parent.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    left = processes_of_session(parent.pid)
    assert len(left) == 1
    assert parent.stdin is not None
    parent.stdin.close()  # which ends the child
    while processes_of_session(parent.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("at", [1, 2, 6, 9, 2 * COUNT + 2])
def test_a_signal_ends_the_run_with_what_is_done(
    server: ForkServer, images: Path, whole: Path, tmp_path: Path, number: int, code: int, at: int
) -> None:
    out = tmp_path / "out"
    run = server.stopped(images, out, at)
    run.signal(number)
    run.signal(signal.SIGCONT)
    ended = run.wait()
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    assert left_overs(out) == []
    check_nothing_is_torn(out, files(whole))
    done = set(done_lines(out))
    assert {name.partition("/")[2].removesuffix(".tif") for name in files(out) if name.startswith("labels")} == done
    assert (out / "images.csv").exists() == (at > 1)  # the journal is the first file
    if at > 1:
        assert set(table(out)) == done
        assert json.loads((out / "run.json").read_bytes())["status"] == "stopped"
    before = finished_files(out)
    assert server.run(images, out).code == 0
    assert before.items() <= finished_files(out).items()
    assert results(out) == results(whole)


# --- the real command with the model of the package


PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from cellseg_deploy.cli.infer import main; main()"
)


class Real:
    """``cellseg-infer`` as it is installed, with the model that ships; ``start`` it, or ``run`` it to its end."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "in"
        self.images.mkdir()
        for number in range(30):  # several may be done between two looks, and five kills are to meet a run
            centres = [(60.0 + 90 * i, 70.0 + 13 * (number % 8)) for i in range(number % 4 + 1)]
            pixels = draw_discs((300, 420), centres, radius=30)
            Image.fromarray(pixels).save(self.images / f"{number}.png")

    def start(self, out: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PROGRAM, str(self.images), "-o", str(out), "--quiet", "--threads", "1"]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)

    def run(self, out: Path) -> None:
        process = self.start(out)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said

    def start_and_signal(self, out: Path, number: int, more: int) -> int:
        """Send the signal once ``more`` more images are done; gives the exit code."""
        enough = len(done_lines(out)) + more
        process = self.start(out)
        deadline = time.monotonic() + 300
        while len(done_lines(out)) < enough:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        assert "Traceback" not in said
        assert processes_of_session(process.pid) == []
        return process.returncode


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    pytest.importorskip("onnxruntime")
    return Real(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def real_whole(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its undisturbed run, in which cells were found."""
    out = tmp_path_factory.mktemp("real whole") / "out"
    real.run(out)
    assert sum(int(row["cells"]) for row in table(out).values()) > 0
    return out


@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL] * 5, [signal.SIGINT, signal.SIGTERM]], ids=["killed", "interrupted"]
)
def test_the_real_command_with_the_shipped_model(
    real: Real, real_whole: Path, tmp_path: Path, signals: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", files(real_whole)
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    for number in signals:
        before = finished_files(out)
        assert real.start_and_signal(out, number, more=1) == codes[signal.Signals(number)]
        check_nothing_is_torn(out, whole)
        assert before.items() <= finished_files(out).items()
    real.run(out)
    assert results(out) == results(real_whole)
    assert set(done_lines(out).values()) == {1}
    say(capsys, f"{len(signals)} signals {[int(n) for n in signals]} to cellseg-infer: survived {len(signals)}")
