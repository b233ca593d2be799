"""cellseg-slide: from the command line to the files, and after kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tifffile
from conftest import draw_discs

from cellseg_deploy import Segmenter
from cellseg_deploy.cli import console, progress
from cellseg_deploy.cli.slide import command
from cellseg_deploy.slides import files
from cellseg_deploy.slides import run as slides

CENTRES: list[tuple[float, float]] = [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(14) for y in range(20)]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """280 discs in a tiled TIFF of 600 x 840 px."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, draw_discs((840, 600), CENTRES), photometric="rgb", tile=(128, 128), metadata=None)
    return path


def arguments(slide: Path, out: Path, model: Path, *more: str) -> list[str]:
    return [str(slide), "-o", str(out), "--model", str(model), "--scale", "1", "--backend", "onnxruntime", *more]


def test_counts_a_slide(
    slide: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    out = tmp_path / "out"
    assert console.run(command, arguments(slide, out, model, "--memory", "1GB")) == 0
    said = capsys.readouterr()
    assert "cells    280, 280 counted" in said.out
    assert "skipped  0.0% of the tiles are blank" in said.out
    assert "600 x 840 px of level 0, in blocks that take up to 1.0 GB" in said.err
    assert re.search(r"^15/315 tiles, \d+ s left$", said.err, re.MULTILINE)
    assert int(tifffile.imread(out / files.LABELS).max()) == 280
    assert len((out / slides.CELLS).read_text().splitlines()) == 281
    assert json.loads((out / slides.RECORD).read_text())["result"]["cells"] == 280


def test_a_region_as_json(slide: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--region", "0,0,200,100", "--json", "-q")
    assert console.run(command, arguments(slide, tmp_path / "out", model, *more)) == 0
    with Segmenter.load(model, scale=None) as segmenter:
        expected = segmenter(draw_discs((840, 600), CENTRES)[:100, :200], field="full").count
    assert json.loads(capsys.readouterr().out)["cells"] == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--memory", "much"), "not an amount of memory"),
        (("--memory", "0"), "not an amount of memory"),
        (("--region", "1,2,3"), "left,top,width,height"),
        (("--region", "0,0,9999,1"), "does not lie in the 600 x 840 px"),
        (("--level", "2"), "level 2 does not exist"),
        (("--memory", "1MB"), "give --memory"),
    ],
)
def test_bad_options_are_refused(
    slide: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert console.run(command, arguments(slide, tmp_path / "out", model, *more)) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


DIES = """
import os, signal, sys
from cellseg_deploy.cli.slide import main
from cellseg_deploy.slides import files, found_cells, network

def after(owner, name, calls):
    work, seen = getattr(owner, name), []
    def working(*arguments, **more):
        result = work(*arguments, **more)
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, working)

where = sys.argv.pop(1)
if where == "network":
    after(network.ProbabilityFile, "append", 9)
elif where == "labels":
    after(found_cells.FoundCells, "add", 1)
else:
    after(files, "move", 1)
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_ends_with_the_same_files(slide: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    more = ("-q", "--save", "labels,zarr,geojson")
    assert console.run(command, arguments(slide, tmp_path / "whole", model, *more)) == 0
    out = tmp_path / "out"
    for where in ("network", "labels", "files"):  # each time the run comes a little further
        process = subprocess.run([sys.executable, "-c", DIES, where, *arguments(slide, out, model, *more)], check=False)
        assert process.returncode == -signal.SIGKILL, where
        assert not (out / slides.RECORD).exists()
        with (out / slides.UNFINISHED / "probabilities.f32").open("ab") as file:
            if where == "network":
                assert 0 < file.tell() < 4 * 840 * 600
                file.write(b"half a row")
            else:
                assert file.tell() == 4 * 840 * 600
    (out / ".cellseg-0123456789abcdef.tmp").write_bytes(b"half a file")
    assert console.run(command, arguments(slide, out, model, *more)) == 0
    chunks = [path.relative_to(out).as_posix() for path in (out / files.ZARR).rglob("*") if path.is_file()]
    assert len(chunks) > 4
    for name in (*chunks, files.LABELS, files.GEOJSON, slides.CELLS, slides.IMAGES, slides.OVERVIEW):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
