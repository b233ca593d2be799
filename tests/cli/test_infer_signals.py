"""A run that is ended from outside, or whose terminal goes away."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import ROOT, draw_discs
from PIL import Image

from cellseg_deploy.cli import console
from cellseg_deploy.cli import progress as _progress
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.run.folder import ImageResult
from cellseg_deploy.run.plan import Planned, RunPlan


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_run_and_keep_what_is_done(
    onnx_file: Callable[..., Path], tmp_path: Path, number: int, code: int
) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "many"
    folder.mkdir()
    Image.fromarray(draw_discs((1200, 1600), [(20, 20), (60, 22), (100, 70)])).save(folder / "0000.png")
    for index in range(1, 200):
        os.link(folder / "0000.png", folder / f"{index:04}.png")
    out = tmp_path / "out"
    program = "from cellseg_deploy.cli.infer import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder, "-o", out, "--model", onnx_file(), "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("labels/*.tif"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    with (out / "images.csv").open(newline="", encoding="utf-8") as file:
        done = [row["image"] for row in csv.DictReader(file)]
    assert 1 <= len(done) < 200
    assert sorted(path.name for path in (out / "labels").iterdir()) == [f"{name}.tif" for name in done]
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    assert not list(out.rglob(".cellseg*"))


def test_nohup_is_respected_and_handlers_are_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen: list[Any] = []
        look = click.Command(
            "look", callback=lambda: seen.extend(map(signal.getsignal, (signal.SIGHUP, signal.SIGTERM)))
        )
        usual = signal.getsignal(signal.SIGTERM)
        assert console.run(look, []) == 0
        assert seen[0] is signal.SIG_IGN
        assert seen[1] is not usual
        assert signal.getsignal(signal.SIGTERM) is usual
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_keeps_its_exit_code_where_stderr_is_gone() -> None:
    """The terminal went away: click's own line about the interrupt cannot be written."""
    program = (
        "import os, signal, sys, time, click\n"
        "from cellseg_deploy.cli import console as _common\n"
        "def wait():\n    os.kill(os.getpid(), signal.SIGHUP)\n    time.sleep(5)\n"
        "sys.exit(_common.run(click.Command('wait', callback=wait), []))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stderr=writer, cwd=ROOT, check=False)
    os.close(writer)
    assert done.returncode == 129


def test_a_terminal_that_goes_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar breaks at its first call after the start; lines take over."""

    class Gone:
        def start(self) -> None: ...

        def add_task(self, *_: object, **__: object) -> int:
            return 0

        def fail(self, *_: object, **__: object) -> None:
            raise OSError(5, "Input/output error")

        update = stop = fail

    monkeypatch.setattr(_progress, "_rich_bar", Gone)
    monkeypatch.setattr(sys, "stderr", Terminal())
    images = [FoundImage(Path(name), name) for name in "ab"]
    with _progress.RunProgress() as progress:
        progress.planned(RunPlan("fresh", tuple(Planned(image, "work", "", "", ()) for image in images)))
        for name in ("a", "b"):
            progress.result(ImageResult(name, "done", cells=1))
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("2/2 images")
    assert said.endswith("2 cells\n")
    with _progress.Progress(5):
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_signal_between_the_files_and_the_record_of_an_image_waits() -> None:
    from cellseg_deploy.files.signals import deferred_signals

    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_signals():  # noqa: PT012  (that the block goes on is the point)
        signal.raise_signal(signal.SIGINT)
        reached.append("after the signal")
    assert reached == ["after the signal"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # and the former handler is back
