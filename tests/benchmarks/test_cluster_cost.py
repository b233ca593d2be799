"""The cost model: fitted lines, limits and bottlenecks by hand; the command, short, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_benchmarks.folder import cluster_model as model
from cellseg_benchmarks.folder.cluster_model import (
    Assumptions,
    Costs,
    Line,
    Sample,
    SlideCosts,
    SlideSample,
    Work,
    predict,
)

SLIDE_COSTS = SlideCosts(band_seconds=0.4, core_seconds=0.05, label_seconds=0.02, stored_bytes=100.0)
COSTS = Costs(Line(1.0, 0.5), Line(0.2, 0.1), SLIDE_COSTS, 0.5, 0.5, images_per_second=200.0, sync_seconds=0.005 / 3)
ASSUMED = Assumptions(gpu_tiles_per_second=10, cores_per_gpu=2, storage_bytes_per_second=1e6)
PHOTOGRAPHS = Work("photographs", 1000, pixels=1000, tiles=8)


def test_a_line_is_found_again_and_is_never_negative() -> None:
    line = model.line_through([(tiles, 0.3 + 0.2 * tiles) for tiles in (2, 6, 20)])
    assert (line.constant, line.per_tile) == pytest.approx((0.3, 0.2))
    steep = model.line_through([(2, 0.1), (4, 1.0)])  # through these: -0.8 + 0.45 x
    assert steep.constant == 0
    assert steep.per_tile > 0


def test_costs_are_per_pixel_of_all_samples() -> None:
    samples = [Sample(100, 1, 1.0, 0.5, 50, 10), Sample(300, 3, 2.0, 1.0, 150, 30)]
    slides = [SlideSample(100, 10, 4.0, 1.0, 0.5, 1000), SlideSample(300, 30, 6.0, 1.0, 0.3, 3000)]
    costs = Costs.fitted(samples, slides, 7.0, 0.0)
    assert costs.slide == SlideCosts(0.25, 0.05, 0.02, 100.0)
    assert (costs.read_bytes, costs.written_bytes, costs.recorded_per_second) == (0.5, 0.1, pytest.approx(7.0))
    assert (costs.node.constant, costs.node.per_tile) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("workers", "on", "limits"),
    [
        (1, model.NODES, {"CPU nodes": 5000, "scheduler and journal": 10, "storage": 1}),
        (1000, model.NODES, {"scheduler and journal": 10, "CPU nodes": 5, "storage": 1}),
        (1, model.GPUS, {"GPUs": 800, "CPU cores at the GPUs": 500, "scheduler and journal": 10, "storage": 1}),
    ],
)
def test_the_slowest_part_is_the_bottleneck(workers: int, on: str, limits: dict[str, float]) -> None:
    found = predict(COSTS, ASSUMED, PHOTOGRAPHS, workers, on)
    assert list(dict(found.limits)) == list(limits)
    assert dict(found.limits) == pytest.approx(limits)
    assert found.seconds == max(limits.values())


@pytest.mark.parametrize(
    ("workers", "on", "limits", "seconds"),
    [
        (1, model.NODES, {"CPU nodes": 400, "labels and tables, in one process": 20, "storage": 1.6}, 420),
        (8, model.NODES, {"CPU nodes": 80, "labels and tables, in one process": 20, "storage": 1.6}, 100),
        (64, model.NODES, {"CPU nodes": 40, "labels and tables, in one process": 20, "storage": 1.6}, 60),
        (
            8,
            model.GPUS,
            {"labels and tables, in one process": 20, "GPUs": 20, "CPU cores at the GPUs": 5, "storage": 1.6},
            40,
        ),
    ],
)
def test_workers_share_the_bands_of_a_slide_but_not_its_labels(
    workers: int, on: str, limits: dict[str, float], seconds: float
) -> None:
    slide = Work("slide", 1, pixels=10**6, tiles=1000, bands=10)  # 10 bands among 8 workers: one has two
    found = predict(COSTS, ASSUMED, slide, workers, on)
    assert dict(found.limits) == pytest.approx(limits)
    assert found.limits[0][1] == max(limits.values())
    assert found.seconds == pytest.approx(seconds)


def test_sleepers_end_together() -> None:
    assert model.seconds_of_sleepers(100, 64, 1.0, 1000) == pytest.approx(2 + 0.064)
    assert model.seconds_of_sleepers(100, 64, 0.01, 10) == pytest.approx(0.01 + 10)
    assert model.seconds_of_sleepers(100, 64, 0, 10) == 10


def test_durations() -> None:
    said = [model.duration(seconds) for seconds in (0.5, 119, 120, 7199, 7200, 200_000)]
    assert said == ["0.5 s", "119 s", "2 min", "120 min", "2 h", "2.31 days"]


@pytest.mark.usefixtures("quick_disk")
def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    from cellseg_benchmarks.cli import command
    from cellseg_deploy.cli import console

    asked = [
        "--megapixels",
        "0.02,0.1",
        "--slide-megapixels",
        "0.1",
        "--per-size",
        "1",
        "--workers",
        "2,3",
        "--sleep",
        "0.01",
        "--waves",
        "2",
    ]
    words = ["cluster-cost", "--model", str(model), *asked, "--free-images", "4", "-q", "-o", str(tmp_path / "out")]
    assert console.run(command, words) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out/cluster-cost.md").read_text() in text
    for part in (
        "| 3 | 4 images | 0 |",
        "| 2 | 4 images | 0.01 |",
        "| 3 | 6 bands | 0.01 |",
        "messages of",
        "**not measured**",
    ):
        assert part in text, part
    for places in ("1 GPU", "8 GPUs", "64 GPUs", "1 CPU node", "64 CPU nodes"):
        assert f"1,000,000 photographs of 1600 x 1200 px | {places} |" in text
        assert f"a slide of 100,000 x 100,000 px | {places} |" in text
    assert "scheduler and journal" in text
    assert "One streamed image" in text
