"""A real cluster of two worker processes on this machine: the results of one process, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_discs, make_onnx, make_spec
from run_records import journal_without_times
from running import infer, results, rows, save

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from worker_faults import POISON, Poison

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cluster.connection import TlsFiles, connected
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")
SAVE = ("labels", "overlays", "coco")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected("local", workers=2, threads_per_worker=2, tls=TlsFiles()) as client:
        yield client


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cluster"), 24)


def make(folder: Path, n_images: int) -> Path:
    """Photographs in ``in``, one of them damaged, and what one process makes of them in ``whole``."""
    for index in range(n_images):
        chance = random.Random(index)
        height, width = chance.randint(30, 150), chance.randint(30, 150)
        centres = [(chance.uniform(0, width), chance.uniform(0, height)) for _ in range(height * width // 1500)]
        save(folder / "in" / f"{index:02}.png", draw_discs((height, width), centres, radius=7))
    (folder / "in/bad.png").write_bytes((folder / "in/03.png").read_bytes()[:-30])
    (folder / "stub.onnx").write_bytes(make_onnx(make_spec(cell_diameter_px=14.0)).SerializeToString())
    assert run(folder / "in", folder / "whole").failed == 1
    return folder


def run(images: Path, out: Path, elsewhere: Any = None, **callbacks: Any) -> RunSummary:
    engine = EngineOptions(backend="onnxruntime", threads=1)
    model = images.parent / "stub.onnx"
    with Segmenter.load(model, engine=engine, scale=None, batch_size=4) as segmenter:
        options = RunOptions(save=SAVE, report_thresholds=2)
        return run_folder(segmenter, find_images([images]), out, options=options, elsewhere=elsewhere, **callbacks)


def expect_same(out: Path, made: Path) -> None:
    """Same files, same journal, each image once, and nothing that is not a result."""
    assert results(out) == results(made / "whole")
    assert journal_without_times(out) == journal_without_times(made / "whole")
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    images = [line["image"] for line in lines if line["kind"] == "image"]
    assert images == sorted(set(images))
    totals = [json.loads((folder / "run.json").read_text())["totals"] for folder in (out, made / "whole")]
    assert totals[0] == totals[1]


def pids(client: Any) -> list[int]:
    return sorted(client.run(os.getpid).values())


def killing(client: Any, at: Callable[[int], bool]) -> tuple[Callable[[Any], None], list[int]]:
    """What kills a worker process whenever ``at`` says so of the number of results, and whom it killed."""
    killed: list[int] = []
    seen: list[Any] = []

    def on_result(result: Any) -> None:
        seen.append(result)
        if at(len(seen)):
            killed.append(pids(client)[0])
            os.kill(killed[-1], signal.SIGKILL)

    return on_result, killed


def test_results_tables_and_journal_are_those_of_one_process(made: Path, client: Any, tmp_path: Path) -> None:
    before = pids(client)
    summary = run(made / "in", tmp_path / "out", ClusterEngine(client, "local", threads=2))
    expect_same(tmp_path / "out", made)
    assert (summary.done, summary.failed) == (24, 1)
    assert pids(client) == before
    again = run(made / "in", tmp_path / "out", ClusterEngine(client, "local", threads=2))
    assert (again.skipped, again.failed) == (24, 1)


def test_a_killed_worker_loses_nothing_and_nothing_counts_twice(made: Path, client: Any, tmp_path: Path) -> None:
    on_result, killed = killing(client, lambda number: number in (3, 12))
    run(made / "in", tmp_path / "out", ClusterEngine(client, "local", threads=2), on_result=on_result)
    assert len(set(killed)) == 2
    expect_same(tmp_path / "out", made)


@pytest.mark.night
def test_two_hundred_images_and_a_worker_killed_twice(client: Any, tmp_path: Path) -> None:
    made = make(tmp_path, 200)
    on_result, killed = killing(client, lambda number: number in (50, 130))
    summary = run(made / "in", tmp_path / "out", ClusterEngine(client, "local", threads=2), on_result=on_result)
    assert len(set(killed)) == 2
    assert (summary.done, summary.failed) == (200, 1)
    expect_same(tmp_path / "out", made)


def test_a_poisonous_image_is_given_up_and_no_other(made: Path, client: Any, tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    for number in range(6):
        os.link(made / f"in/{number:02}.png", images / f"{number:02}.png")
    os.link(made / "in/06.png", images / f"02-{POISON}.png")
    (tmp_path / "stub.onnx").write_bytes((made / "stub.onnx").read_bytes())
    client.register_plugin(Poison())
    try:
        summary = run(images, tmp_path / "out", ClusterEngine(client, "local", threads=2))
    finally:
        client.unregister_worker_plugin(POISON)
    assert (summary.done, summary.failed) == (6, 1)
    found = {row["image"]: row for row in rows(tmp_path / "out/images.csv")}
    assert "end, also when it is the only one" in found.pop(f"02-{POISON}.png")["error"]
    of_one_process = {row["image"]: row for row in rows(made / "whole/images.csv")}
    assert found == {name: of_one_process[name] for name in found}


@pytest.mark.night
def test_the_command_with_a_local_cluster(made: Path, tmp_path: Path) -> None:
    model = ("--model", made / "stub.onnx", "--threads", 2, "-q", "--cell-diameter", "auto")
    assert infer(made / "in", "-o", tmp_path / "one", *model) == 3
    assert infer(made / "in", "-o", tmp_path / "two", *model, "--scheduler", "local", "--workers", 2) == 3
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert journal_without_times(tmp_path / "two") == journal_without_times(tmp_path / "one")
