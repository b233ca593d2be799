"""Every image of the corpus: read within bounds of time and memory, and in a run that goes on whatever comes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import running
import tifffile
from conftest import ROOT, DarknessBackend
from corpus import CASES, Case

from cellseg_deploy.images.read import find_images
from cellseg_deploy.run.folder import ImageResult, RunSummary, run_folder
from cellseg_deploy.segmenter import Segmenter

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
from cellseg_deploy.images.read import ReadOptions, read_image
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
    program = READER.replace("read_image(path)", "read_image(path, ReadOptions(10**9))")
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
    check(replace(case, words=case.seen or case.words), result.status, result.error or result.warning)
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
    rows = running.rows(out / "images.csv")
    assert [row["image"] for row in rows] == sorted(f"{case.name}.png" for case in CASES)
    assert not list(out.rglob(".cellseg*"))
