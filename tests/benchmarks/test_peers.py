"""``python -m cellseg_benchmarks peers``: ratios of paired rounds, reasons for what is not there, the three files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import FakeWorker
from PIL import Image
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import peer_tools
from cellseg_benchmarks.folder.peers import PeersReport, Row, Settings, measure_peers
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.timer import Plan
from cellseg_benchmarks.harness.worker import WorkerError
from cellseg_benchmarks.options import Engine
from cellseg_deploy.cli.console import run

PLAN = Plan(rounds=3, min_seconds=0.0, settle_seconds=0.0)
OURS = {"engine": "onnxruntime fp32 on cpu"}
CELLPOSE = {"library": "Cellpose 4.2", "details": "CPSAM, bfloat16, random weights", "images": 2}


class Start:
    """Starts fake workers; keeps what each was given."""

    def __init__(self) -> None:
        self.given: dict[str, dict[str, Any]] = {}

    def __call__(self, kind: str, arguments: dict[str, Any], *, threads: int | None) -> Any:
        name = Path(arguments["settings"]["path"]).stem if kind == "folder" else kind
        self.given[name] = arguments
        if kind == "folder":
            return FakeWorker({"folder": 4.0 if name == "small" else 8.0}, OURS)
        if kind == "cellpose":
            return FakeWorker({"network": 40.0, "network and masks": 50.0}, CELLPOSE)
        raise WorkerError(f"{kind} cannot be imported")


def measured(tmp_path: Path, **more: Any) -> tuple[dict[tuple[str, str], Row], Start]:
    start = Start()
    images = [np.full((20, 30, 3), 200, np.uint8)] * 2
    rows = measure_peers(
        images,
        np.zeros((20, 30), np.int32),
        Settings(
            models=(Path("small.onnx"), Path("large.onnx")),
            cell_diameter=90.0,
            engine=Engine(backend="openvino"),
            threads=2,
            **more,
        ),
        tmp_path,
        PLAN,
        start=start,
    )
    return {(row.name, row.what): row for row in rows}, start


def test_ratios_are_of_an_image(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path)
    assert [key[0] for key in rows] == ["small", "large", "cellpose", "cellpose", "stardist", "instanseg"]
    ours = rows["small", "folder of 8, files to results"]
    assert ours.seconds_per_image == 0.5  # 8 images in 4 s
    network = rows["cellpose", "network"]
    assert network.seconds_per_image == 20.0  # 2 images in 40 s
    assert network.slower is not None
    assert {name: found.median for name, found in network.slower.items()} == {
        "small": pytest.approx(40),
        "large": pytest.approx(20),
    }
    masks = rows["cellpose", "network and masks"].slower
    assert masks is not None
    assert masks["small"].median == pytest.approx(50)
    assert ours.slower is not None
    assert ours.slower["small"].median == pytest.approx(1)


def test_all_get_the_same_images_at_their_own_scale(tmp_path: Path) -> None:
    _, start = measured(tmp_path, cellpose_weights=Path("cpsam"))
    ours, cellpose, stardist = (start.given[name] for name in ("small", "cellpose", "stardist"))
    expected = {**Engine(backend="openvino").arguments(), "path": "small.onnx", "cell_diameter_px": 90.0}
    assert ours["settings"] == expected
    assert len(list(Path(ours["timed"]).iterdir())) == 8
    assert cellpose["diameter"] == stardist["diameter"] == 90.0
    assert [np.load(path).shape for path in cellpose["images"]] == [(20, 30, 3)] * 2
    assert cellpose["weights"] == "cpsam"
    assert np.load(cellpose["labels"]).shape == (20, 30)
    assert (stardist["weights"], stardist["labels"]) == (None, None)
    with Image.open(sorted(Path(ours["timed"]).iterdir())[0]) as opened:
        assert np.array_equal(np.asarray(opened), np.load(cellpose["images"][0]))


def test_instanseg_wants_multiples() -> None:
    image = np.zeros((9, 16, 3), np.uint8)
    image[8] = 255
    padded = peer_tools._padded(image)
    assert (padded.shape, padded.dtype) == ((1, 3, 16, 16), np.float32)
    assert padded[0, 0, :, 0].tolist() == [0] * 8 + [1, 1] + [0] * 6


def test_the_command_leaves_three_files(
    tmp_path: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    arguments = [
        *("peers", "--model", str(onnx_file()), "-o", str(out), "--peers", "stardist", "--megapixels", "0.01"),
        *("--folder-images", "2", "--rounds", "2", "--settle", "0", "--threads", "1"),
    ]
    assert run(cli.command, arguments) == 0
    found = written_report(out, "peers", PeersReport)
    assert (found["benchmark"], found["report_version"], found["diameter_px"]) == ("peers", 1, image_set.DIAMETER_PX)
    ours = found["rows"][0]
    assert (ours["name"], ours["what"], ours["images_per_call"]) == ("stub", "folder of 2, files to results", 2)
    assert len(ours["times"]["seconds"]) == 2
    if importlib.util.find_spec("stardist") is None:
        assert found["rows"][1]["status"] == "not run"
        assert "pip install stardist" in found["rows"][1]["reason"]
    assert str(tmp_path) not in (out / "peers.json").read_text()
    assert "opening stub" in capsys.readouterr().err
