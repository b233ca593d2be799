"""The load test of the service, short, on a tiny model: what it sends is answered, and its report says so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellseg_benchmarks.folder.load import Settings, _Tally, measure_load
from cellseg_benchmarks.folder.load_report import FolderRun, LoadReport, Phase
from cellseg_benchmarks.harness.machine import Conditions, Load, look
from cellseg_benchmarks.options import Scale
from cellseg_deploy.errors import BackendUnavailableError

for package in ("httpx", "starlette", "prometheus_client"):
    pytest.importorskip(package, reason="pip install -e '.[serve]'")


def test_both_loops_are_answered_and_the_folder_is_run_beside_them(model: Path, tmp_path: Path) -> None:
    asked = Settings(
        model,
        seconds=0.2,
        capacity_seconds=0.2,
        clients=2,
        rate=20,
        megapixels=0.02,
        n_images=1,
        scale=Scale(scale=1),
    )
    found = measure_load(asked, tmp_path, say=lambda _: None)
    closed, opened = found.phases
    assert found.service["name"] == "stub"
    assert closed.codes.keys() == {"200"}
    assert len(opened.rss) == 5  # start, quarters, end
    assert len(found.folder) == 2
    assert all(run.images > 0 and run.cpu > 0 for run in found.folder)
    assert sum(opened.codes.values()) == 4
    for phase in (closed, opened):
        assert phase.lost == 0
        assert phase.p50 is not None
        assert phase.p99 is not None
        assert 0 < phase.p50 <= phase.p99
        assert phase.images_per_second > 0
    report = LoadReport(Conditions(look(), Load((3.0,))), 1, "Images", found.service, found.phases, found.folder)
    text = report.to_markdown()
    assert "| closed, 2 clients |" in text
    assert "| open, 20 images/s |" in text


SERVICE = {"name": "m", "engine": {"backend": "b", "precision": "p", "device": "d"}}


def test_what_was_to_be_shown_is_told() -> None:
    closed = Phase("closed", 2, None, 10.0, {"200": 18}, 0, 0.1, 0.2, 2.0, None, ())
    rss = (400_000_000, 480_000_000, 480_000_000, 480_000_000, 483_000_000)
    opened = Phase("open", None, 2.0, 10.0, {"200": 10, "429": 5, "504": 2}, 1, 0.1, 0.2, 1.0, 9.0, rss)
    assert opened.images_per_second == 1
    folder = (FolderRun(10, 4.0, 8.0), FolderRun(10, 6.0, 8.0))
    report = LoadReport(Conditions(look(), Load()), None, "Images", SERVICE, (closed, opened), folder, shared_cores=2)
    text = report.to_markdown()
    assert "| 200: 10, 429: 5, 504: 2 | 1 | 0.9 |" in text
    assert "neither answered nor refused with 429: 3 of 36." in text
    assert "between the first quarter of the last loop and its end: +3 MB" in text
    # 18 images in 10 s, of which the client took 2 s of CPU time, 1 s on each core; 20 in 10 s by the folder run
    assert "2 to 2 images/s, 100%" in text
    alone = LoadReport(Conditions(look(), Load()), 1, "Images", SERVICE, (closed, opened), folder, shared_cores=0)
    assert "1.8 to 2 images/s, 90%" in alone.to_markdown()


def test_without_a_folder_run_or_known_memory_nothing_is_claimed() -> None:
    phase = Phase("open", None, 2.0, 10.0, {"200": 10}, 0, 0.1, 0.2, 1.0, None, ())
    text = LoadReport(Conditions(look(), Load()), None, "Images", SERVICE, (phase,)).to_markdown()
    assert "folder run" not in text
    assert "Memory of the service between" not in text


def test_a_service_that_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="did not start"):
        measure_load(Settings(tmp_path / "gone.onnx", megapixels=0.02, n_images=1), tmp_path, say=lambda _: None)


def test_a_client_of_the_closed_loop_waits_as_it_is_told() -> None:
    class Refusing:
        async def post(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(status_code=429, headers={"retry-after": "7"})

    async def send() -> float:
        return await _Tally(Refusing(), "", [b""], None).send(0.0)

    assert asyncio.run(send()) == 7
