"""Runs of ``cellseg-infer`` that are killed, starved or cut off from their disk, hundreds of them, and what they leave.

A run is a process of its own that ``fault_runner`` forks: the command as it is, with the stub of the other tests for
a network. What may differ between two runs of the same images is said here, once (``results``), and so is what must
hold of an output folder at any moment, whatever happened to the run that wrote it (``check_nothing_is_torn``).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, draw_discs
from PIL import Image

from cellseg_deploy.files.lock import LOCK_NAME
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.journal import JOURNAL
from cellseg_deploy.run.output_folder import ALWAYS, RUN_JSON, is_temporary

TABLES = ("cells.csv", "images.csv")
BAD = "bad.png"
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes and disks as Linux has them")
PATIENCE = 300.0
"""Seconds a run may take before it counts as hanging; they take tenths of one."""
_TIMES = ("started", "wall_seconds", "engine_busy", "stage_seconds")


# --- runs


@dataclass(frozen=True)
class Ended:
    """``code``: exit code, or minus the signal that ended it. ``said``: its output. ``peak_bytes``: most memory."""

    code: int
    said: str
    peak_bytes: int

    @property
    def error_lines(self) -> list[str]:
        """What it said of itself ending: lines that begin with ``error:``."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


class Process:
    """A run that was started."""

    def __init__(self, server: ForkServer, pid: int, said: Path) -> None:
        self._server = server
        self.pid = pid
        self._said = said
        self._handle = os.pidfd_open(pid)

    def ended_within(self, seconds: float) -> bool:
        """Whether it has ended, after waiting for that at most ``seconds``."""
        return bool(select.select([self._handle], [], [], seconds)[0])

    def signal(self, number: int) -> None:
        """Send it a signal; nobody else can have its number before ``wait``."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end. A run that takes longer than ``PATIENCE`` is killed, and an error."""
        is_late = not self.ended_within(PATIENCE)
        if is_late:
            self.signal(signal.SIGKILL)
        os.close(self._handle)
        answer = self._server.ask({"wait": self.pid})
        self._server.forget(self)
        said = self._said.read_text(encoding="utf-8", errors="replace") if self._said.exists() else ""
        self._said.unlink(missing_ok=True)
        assert not is_late, f"still running after {PATIENCE} s; it said: {said}"
        return Ended(answer["code"], said, answer["peak_bytes"])


class ForkServer:
    """``with ForkServer(scratch) as server``: runs of the command at the cost of a fork each."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._started = 0
        self._running: dict[int, Process] = {}  # those that nobody waited for yet

    def __enter__(self) -> ForkServer:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "fault_runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | one_thread
            | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT / "tests" / "helpers"), str(ROOT)))},
            start_new_session=True,
        )
        assert self._answer() == {"threads": 1}  # a fork with more of them could hang
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for run in list(self._running.values()):  # of a test that failed: one that is stopped would stay for ever
                run.signal(signal.SIGKILL)
                run.wait()
        finally:
            self._process.communicate(timeout=PATIENCE)

    def forget(self, run: Process) -> None:
        """It has ended."""
        del self._running[run.pid]

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send ``request`` and give the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server of runs ended with code {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self,
        images: Path,
        out: Path,
        *options: object,
        fault: Mapping[str, Any] | None = None,
        trace: Path | None = None,
        file_bytes: int | None = None,
        more_memory: int | None = None,
    ) -> Process:
        """Start ``cellseg-infer images -o out OPTIONS``.

        ``fault``: see ``fault_runner.Fault``. ``trace``: where to write the calls that changed ``out``. For limits see
        ``fault_runner.limit``.
        """
        self._started += 1
        said = self._scratch / f"said-{self._started}.txt"
        request = {
            "arguments": [str(images), "-o", str(out), "--quiet", *map(str, options)],
            "out": str(out.resolve()),
            "fault": dict(fault or {}),
            "said": str(said),
            "trace": None if trace is None else str(trace),
            "file_bytes": file_bytes,
            "more_memory": more_memory,
        }
        run = Process(self, self.ask(request)["pid"], said)
        self._running[run.pid] = run
        return run

    def stopped(self, images: Path, out: Path, at: int) -> Process:
        """A run that was halted (SIGSTOP) before the ``at``-th file of it got its name."""
        run = self.start(images, out, fault={"action": "stop", "calls": ["rename"], "at": at})
        deadline = time.monotonic() + PATIENCE
        while "State:\tT" not in Path(f"/proc/{run.pid}/status").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline
            assert not run.ended_within(0.01)
        return run

    def run(self, images: Path, out: Path, *options: object, **settings: Any) -> Ended:
        """``start`` and ``wait``."""
        return self.start(images, out, *options, **settings).wait()

    def trace(self, images: Path, out: Path, *options: object, code: int = 0) -> list[tuple[str, str]]:
        """The calls of a run that changed ``out``, with paths relative to it."""
        place = self._scratch / "trace.json"
        ended = self.run(images, out, *options, trace=place)
        assert ended.code == code, ended.said
        calls = json.loads(place.read_text(encoding="utf-8"))
        return [(call, os.path.relpath(path, out.resolve())) for call, path in calls]


# --- images


def make_images(folder: Path, count: int, *, bad: bool = False) -> Path:
    """``count`` small pictures with up to five discs each on a grainy ground, some in a folder within."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("sub" if number % 5 == 2 else "") / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        centres = [(20 + 30 * column, 22 + int(random.integers(0, 20))) for column in range(number % 6)]
        pixels = draw_discs((70, 180), [(x, y) for x, y in centres])
        grain = random.integers(-8, 9, pixels.shape)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(place)
    if bad:
        (folder / BAD).write_bytes(b"no image")
    return folder


# --- what lies in an output folder


def files(out: Path) -> dict[str, bytes]:
    """All files but the journal, which is a history, and the lock; paths relative to ``out``."""
    found = (path for path in out.rglob("*") if path.is_file() and path.name not in (JOURNAL, LOCK_NAME))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def results(out: Path) -> dict[str, Any]:
    """What must be equal after any history: all files, of run.json what is no time."""
    found: dict[str, Any] = files(out)
    record = json.loads(found[RUN_JSON])
    for key in _TIMES:
        record.pop(key)
    record["settings"].pop("overwrite")  # how it began, which changes no result
    return found | {RUN_JSON: record}


def done_lines(out: Path) -> Counter[str]:
    """How often the journal says of each image that it is done; empty if it has no first line yet."""
    path = out / JOURNAL
    if not path.exists():
        return Counter()
    lines = path.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return Counter(record["image"] for record in records if record.get("status") == "done")


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Of each file that the journal names: inode and time of change, which a file that is made again does not keep."""
    if not (out / JOURNAL).exists():
        return {}
    entries = journals.read(out / JOURNAL).entries.values()
    named = [out / file.path for entry in entries if entry.record.status == "done" for file in entry.record.outputs]
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in named}


def check_nothing_is_torn(out: Path, whole: Mapping[str, bytes]) -> None:
    """Under each final name in ``out`` lies what ``whole``, the files of an undisturbed run, has there.

    Tables of a run that was stopped hold some of the rows. A journal may end in the middle of a line.
    """
    for name, content in (files(out) if out.exists() else {}).items():
        if is_temporary(Path(name).name):
            continue
        if name == RUN_JSON:
            assert json.loads(content)["status"] in ("running", "stopped", "finished")
        elif name in TABLES:
            rows = iter(whole[name].splitlines(keepends=True))
            assert all(row in rows for row in content.splitlines(keepends=True)), f"{name} is torn"
        elif name in ALWAYS:  # sums over the rows of a run that was stopped
            assert content[-1:] == b"\n", f"{name} is torn"
        else:
            assert content == whole[name], f"{name} is torn"
    if (out / JOURNAL).exists():
        journal = journals.read(out / JOURNAL)
        assert not journal.damaged
        for entry in journal.entries.values():
            for file in entry.record.outputs:
                assert len(whole[file.path]) == file.size == (out / file.path).stat().st_size


def left_overs(out: Path) -> list[str]:
    """Temporary files and the lock."""
    return sorted(str(path) for path in out.rglob("*") if is_temporary(path.name) or path.name == LOCK_NAME)


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """A file system in memory at ``place``, with the mount options ``options``; skips where mounting is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here ({done.stderr.decode().strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left of a ``small_disk``; gives the file that does."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return path


def remount(place: Path, options: str) -> None:
    """Change the options of a ``small_disk``."""
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True, capture_output=True)


def processes_of_session(session: int) -> list[int]:
    """Processes that a session leader (and what it started) left or has, zombies not."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(place.name))
    return found


def say(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """A line of what was counted, on the terminal though pytest captures the rest."""
    with capsys.disabled():
        print(f"\nreliability: {line}")
