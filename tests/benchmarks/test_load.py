"""The load test of the service, short, on a tiny model: what it sends is answered, and its report says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_benchmarks.folder.load import LoadReport, Phase, Settings, measure_load
from cellseg_benchmarks.harness.machine import Conditions, Load, look
from cellseg_benchmarks.options import Scale
from cellseg_deploy.errors import BackendUnavailableError

for package in ("httpx", "starlette", "prometheus_client"):
    pytest.importorskip(package, reason="pip install -e '.[serve]'")


def test_both_loops_are_answered(model: Path) -> None:
    asked = Settings(model, seconds=0.2, clients=2, rate=20, megapixels=0.02, n_images=1, scale=Scale(scale=1))
    (closed, opened), service = measure_load(asked, say=lambda _: None)
    assert service["name"] == "stub"
    assert closed.codes.keys() == {"200"}
    assert sum(opened.codes.values()) == 4
    for phase in (closed, opened):
        assert phase.lost == 0
        assert phase.p50 is not None
        assert phase.p99 is not None
        assert 0 < phase.p50 <= phase.p99
        assert phase.images_per_second > 0
    report = LoadReport(Conditions(look(), Load((3.0,))), 1, "Images", service, (closed, opened))
    text = report.to_markdown()
    assert "| closed, 2 clients |" in text
    assert "| open, 20 images/s |" in text


def test_refusals_and_losses_are_counted() -> None:
    phase = Phase("open", None, 2.0, 10.0, {"200": 10, "429": 5}, 1, 0.1, 0.2, 1.0, None, None, None)
    assert phase.images_per_second == 1
    service = {"name": "m", "engine": {"backend": "b", "precision": "p", "device": "d"}}
    text = LoadReport(Conditions(look(), Load()), None, "Images", service, (phase,)).to_markdown()
    assert "| 200: 10, 429: 5 | 1 |" in text


def test_a_service_that_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="did not start"):
        measure_load(Settings(tmp_path / "gone.onnx", megapixels=0.02, n_images=1), say=lambda _: None)
