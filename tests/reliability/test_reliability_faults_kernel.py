"""The real command and real system calls: strace shows them, and makes the kernel answer with faults.

What the other tests of faults do in the process itself is checked here from outside, at a few places.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_onnx
from faults import check_nothing_is_torn, done_lines, files, finished_files, left_overs, linux, make_images, results

from cellseg_deploy.run.output_folder import ALWAYS

pytestmark = [pytest.mark.reliability, linux]
RENAMES = "rename,renameat,renameat2"
PROGRAM = "from cellseg_deploy.cli.infer import main; main()"


class Traced:
    """``cellseg-infer`` with a tiny model, under strace. ``whole``: the folder of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.images = make_images(folder / "in", 4)
        self._model = folder / "stub.onnx"
        self._model.write_bytes(make_onnx().SerializeToString())
        self._trace = folder / "trace.txt"
        self.whole = folder / "whole"
        code, said, _ = self.run(self.whole)
        assert code == 0, said

    def run(self, out: Path, *strace: str) -> tuple[int, str, str]:
        """Exit code, what it said, and the trace; options for ``strace``, without any it runs alone."""
        command = [sys.executable, "-c", PROGRAM, str(self.images), "-o", str(out), "--model", str(self._model), "-q"]
        tracing = ["strace", "-f", "-qq", "-y", "-s", "0", "-o", str(self._trace), *strace] if strace else []
        done = subprocess.run(
            [*tracing, *command, "--threads", "1"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
        )
        return done.returncode, done.stderr, self._trace.read_text(encoding="utf-8") if strace else ""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    pytest.importorskip("onnxruntime")
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    return Traced(tmp_path_factory.mktemp("traced"))


def test_system_calls_are_in_order(traced: Traced, tmp_path: Path) -> None:
    """Before each rename an fsync of the file, after it one of its folder; a line of the journal after an image, and
    before a table takes its place."""
    code, said, trace = traced.run(tmp_path / "out", "-e", f"trace=fsync,{RENAMES}")
    assert code == 0, said
    calls = []
    for line in trace.splitlines():
        if match := re.search(r"fsync\(\d+<(.*)>\)\s+= 0", line):
            calls.append(("fsync", match[1]))
        elif match := re.search(r'rename\w*\(.*"(.*)", .*"(.*)".*\)\s+= 0', line):
            calls.append((match[1], match[2]))
    paths = {at: Path(call[1]) for at, call in enumerate(calls) if call[0] != "fsync"}
    assert sum(path.parent.name in ("labels", "overlays", "sub") for path in paths.values()) == 8
    line = ("fsync", str(tmp_path / "out" / "journal.jsonl"))
    for at, path in paths.items():
        is_table = path.name in ALWAYS  # renamed twice: it was complete before its line
        assert calls[at - 1] == (line if is_table else ("fsync", calls[at][0]))
        assert calls[at + 1] == ("fsync", str(path.parent))
    overlays = [at for at, path in paths.items() if "overlays" in path.parts]
    assert all(calls[at + 2] == line for at in overlays)


@pytest.mark.parametrize(
    ("calls", "fault", "code"),
    [
        (RENAMES, "signal=KILL:when=5", -9),
        (RENAMES, "error=EIO:when=5", 6),
        ("fsync", "signal=KILL:when=7", -9),
        ("fsync", "error=EIO:when=9", 6),  # of the journal
        ("fsync", "error=EIO:when=6+", 6),
        ("ftruncate,truncate,unlink,unlinkat,fsync", "error=EROFS:when=9+", 6),
    ],
)
def test_a_fault_of_the_kernel(traced: Traced, tmp_path: Path, calls: str, fault: str, code: int) -> None:
    out, whole = tmp_path / "out", files(traced.whole)
    ended, said, trace = traced.run(out, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}")
    assert ended == code, said
    assert "INJECTED" in trace or code < 0
    assert said.count("error: ") == (code == 6)
    assert "Traceback" not in said
    check_nothing_is_torn(out, whole)
    before = finished_files(out)
    assert traced.run(out)[0] == 0
    assert before.items() <= finished_files(out).items()
    assert results(out) == results(traced.whole)
    assert set(done_lines(out).values()) == {1}
    assert left_overs(out) == []
