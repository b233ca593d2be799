"""Every image of the corpus: read within bounds of time and memory, and in a run that goes on whatever comes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tifffile
from conftest import ROOT, DarknessBackend, draw_discs, run_obeying_permissions
from corpus import CASES, Case
from PIL import Image

from cellseg_deploy.folder_run import ImageResult, RunSummary, run_folder
from cellseg_deploy.images import find_images
from cellseg_deploy.pipeline import Segmenter

pytestmark = pytest.mark.reliability

CPU_SECONDS, MEMORY_BYTES = 20, 1 << 30
# One process for all files, and a child of it for each: the libraries are loaded once, and nothing that one file breaks
# is there for the next.
READER = """
import json, os, resource, sys, traceback
from pathlib import Path
import cv2, imagecodecs, numpy, scipy.sparse, tifffile
import PIL.JpegImagePlugin, PIL.PngImagePlugin
from cellseg_deploy.errors import DataError
from cellseg_deploy.images import read_image
cpu, memory, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
for path in sorted(folder.iterdir()):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        try:
            loaded = read_image(path)
            said = ["done", " | ".join(loaded.notes), loaded.pixels_hwc.shape[:2]]
        except DataError as error:
            said = ["failed", str(error), None]
        except BaseException as error:
            said = [type(error).__name__, traceback.format_exc(), None]
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps([path.name, json.loads(said) if said else ["killed", f"status {status}", None]]), flush=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all cases; their names say nothing of what is in them."""
    folder = tmp_path_factory.mktemp("corpus")
    for case in CASES:
        (folder / f"{case.name}.png").write_bytes(case.make())
    return folder


@pytest.fixture(scope="module")
def answers(corpus: Path) -> dict[str, tuple[str, str, list[int] | None]]:
    """What reading each case gave, in a process with limits: outcome, words, size."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(CPU_SECONDS), str(MEMORY_BYTES), str(corpus)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=600,
        check=True,
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


def check(case: Case, outcome: str, words: str) -> None:
    assert outcome == case.expected, f"{outcome}: {words}"
    assert re.search(case.words, words) if case.words else not words, words


@pytest.mark.skipif(os.name != "posix", reason="limits of memory and CPU time are those of POSIX")
@pytest.mark.parametrize("case", CASES, ids=[f"{case.group}-{case.name}" for case in CASES])
def test_read_within_twenty_seconds_and_a_gigabyte(
    case: Case, answers: dict[str, tuple[str, str, list[int] | None]]
) -> None:
    outcome, words, size = answers[f"{case.name}.png"]
    check(case, outcome, words)
    assert (size is not None) == (case.expected == "done")


@pytest.mark.skipif(os.name != "posix", reason="limits of memory are those of POSIX")
def test_the_limits_limit(tmp_path: Path) -> None:
    """What the test above would say of a reader that unpacks without looking."""
    (tmp_path / "a.png").write_bytes(next(case for case in CASES if case.name == "png 30k blank").make())
    program = READER.replace("read_image(path)", "read_image(path, max_pixels=10**9)")
    done = subprocess.run(
        [sys.executable, "-c", program, str(CPU_SECONDS), str(MEMORY_BYTES), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(done.stdout)[1][0] in ("MemoryError", "killed")


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary, dict[str, ImageResult]]:
    """A run over all cases."""
    out = tmp_path_factory.mktemp("out")
    seen: list[ImageResult] = []
    summary = run_folder(Segmenter(DarknessBackend()), find_images([corpus]), out, on_result=seen.append)
    return out, summary, {result.image: result for result in seen}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.group}-{case.name}" for case in CASES])
def test_a_run_goes_on_whatever_comes(
    case: Case, results: tuple[Path, RunSummary, dict[str, ImageResult]], corpus: Path
) -> None:
    out, _, by_name = results
    result = by_name[f"{case.name}.png"]
    check(case, result.status, result.error or result.warning)
    label_file = out / "labels" / f"{case.name}.png.tif"
    if case.expected == "done":
        assert tifffile.imread(label_file).max(initial=0) == result.cells
    else:
        assert not label_file.exists()
        assert str(corpus) not in result.error


def test_nothing_of_the_corpus_is_missing_from_the_tables(
    results: tuple[Path, RunSummary, dict[str, ImageResult]],
) -> None:
    out, summary, _ = results
    n_good = sum(case.expected == "done" for case in CASES)
    assert (summary.found, summary.done, summary.failed) == (len(CASES), n_good, len(CASES) - n_good)
    rows = read_rows(out / "images.csv")
    assert [row["image"] for row in rows] == sorted(f"{case.name}.png" for case in CASES)
    assert not list(out.rglob(".cellseg*"))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- file system


def smear(path: Path) -> None:
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(path, "PNG")


NAMES = {
    "formula": "=cmd|calc.png",
    "tag": "<img src=x onerror=alert(1)>.png",
    "option": "-rf.png",
    "line end": "new\nline.png",
    "no unicode": os.fsdecode(b"a\xff.png"),
    "longest": "x" * 251 + ".png",
    "composed": unicodedata.normalize("NFC", "e\u0301.png"),
    "decomposed": "e\u0301.png",
    "upper": "CASE.PNG",
    "lower": "case.png",
    "spaces": ' a , "b" \'.png',
    "terminal": "\x1b[31mred.png",
}


def test_names_that_bite(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in NAMES.values():
        smear(tmp_path / "in" / name)
    summary = run_folder(Segmenter(DarknessBackend()), find_images([tmp_path / "in"]), tmp_path / "out")
    assert (summary.done, summary.failed) == (len(NAMES), 0)
    labels = list((tmp_path / "out" / "labels").iterdir())
    assert len({unicodedata.normalize("NFC", path.name).casefold() for path in labels}) == len(NAMES)
    for table in ("images.csv", "cells.csv"):
        rows = read_rows(tmp_path / "out" / table)
        assert len({row["image"] for row in rows}) == len(NAMES)
        for row in rows:
            assert not row["image"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert all(row["cells"] == "1" for row in read_rows(tmp_path / "out" / "images.csv"))


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo.png": (os.mkfifo, "not a regular file"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "link to a file that does not exist"),
    "loop.png": (lambda path: path.symlink_to(path.name), "link"),
    "out.png": (lambda path: path.symlink_to(path.parent.parent / "outside.png"), "--follow-links"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "--follow-links"),
}


@pytest.mark.skipif(os.name != "posix", reason="pipes and links as POSIX has them")
def test_what_is_no_file_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "folder.png").mkdir(parents=True)
    smear(tmp_path / "outside.png")
    smear(folder / "good.png")
    for name, (make, _) in STRANGE.items():
        make(folder / name)
    run_folder(Segmenter(DarknessBackend()), find_images([folder]), tmp_path / "out")
    rows = {row["image"]: row for row in read_rows(tmp_path / "out" / "images.csv")}
    assert set(rows) == {"good.png", *STRANGE}  # the folder is no image
    assert rows["good.png"]["cells"] == "1"
    for name, (_, words) in STRANGE.items():
        assert rows[name]["status"] == "failed"
        assert words in rows[name]["error"], rows[name]["error"]


def test_a_file_that_vanishes_fails(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        smear(tmp_path / name)
    images = find_images([tmp_path])

    def remove(result: ImageResult) -> None:
        if result.image == "a.png":
            (tmp_path / "b.png").unlink()

    out = tmp_path.parent / "out of vanished"
    summary = run_folder(Segmenter(DarknessBackend()), images, out, on_result=remove)
    assert (summary.done, summary.failed) == (2, 1)
    assert "No such file" in read_rows(out / "images.csv")[1]["error"]


def test_a_file_that_nobody_may_read_fails(onnx_file: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "in").mkdir()
    for name in ("a.png", "secret.png"):
        smear(tmp_path / "in" / name)
    (tmp_path / "in" / "secret.png").chmod(0)
    done = run_obeying_permissions("infer", tmp_path / "in", "-o", tmp_path / "out", "--model", onnx_file())
    assert done.returncode == 3, done.stderr
    assert "failed: secret.png: cannot be read: Permission denied" in done.stderr
    assert [row["status"] for row in read_rows(tmp_path / "out" / "images.csv")] == ["done", "failed"]
