"""``python -m cellseg_benchmarks peers``: ratios of paired rounds, reasons for what is not there, the three files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import FakeWorker, make_conditions
from PIL import Image
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import peer_cellpose, peer_instanseg, peer_stardist, peers
from cellseg_benchmarks.folder.peers import PeersReport, Row, measure_peers
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.timer import Plan
from cellseg_benchmarks.harness.worker import WorkerError
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import BackendUnavailableError

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
        [Path("small.onnx"), Path("large.onnx")],
        tmp_path,
        PLAN,
        diameter_px=90.0,
        folder_images=8,
        threads=2,
        settings={"backend": "openvino"},
        start=start,
        **more,
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


def test_what_is_not_there_is_a_row_with_the_reason(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path)
    skipped = rows["stardist", ""]
    assert (skipped.status, skipped.reason, skipped.times) == ("not run", "stardist cannot be imported", None)


def test_all_get_the_same_images_at_their_own_scale(tmp_path: Path) -> None:
    _, start = measured(tmp_path, cellpose_weights=Path("cpsam"))
    ours, cellpose, stardist = (start.given[name] for name in ("small", "cellpose", "stardist"))
    assert ours["settings"] == {"path": "small.onnx", "cell_diameter_px": 90.0, "backend": "openvino"}
    assert len(list(Path(ours["timed"]).iterdir())) == 8
    assert cellpose["diameter"] == stardist["diameter"] == 90.0
    assert [np.load(path).shape for path in cellpose["images"]] == [(20, 30, 3)] * 2
    assert cellpose["weights"] == "cpsam"
    assert np.load(cellpose["labels"]).shape == (20, 30)
    assert (stardist["weights"], stardist["labels"]) == (None, None)
    with Image.open(sorted(Path(ours["timed"]).iterdir())[0]) as opened:
        assert np.array_equal(np.asarray(opened), np.load(cellpose["images"][0]))


def test_the_report(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path)
    report = PeersReport(
        make_conditions(), 2, PLAN, (20, 30), "given images", 90.0, tuple(rows.values()), {"cuda": "not yet run: none"}
    )
    text = report.to_markdown()
    assert "|  | what is timed | details | x small | x large |" in text
    assert (
        "| cellpose | network | Cellpose 4.2: CPSAM, bfloat16, random weights | 40.00 (40.00 to 40.00) | 20.00" in text
    )
    assert "| stardist |  | not yet run |" in text
    assert "- stardist: stardist cannot be imported" in text
    assert "- cuda: not yet run: none" in text
    assert "Images of 30 x 20 px (given images), cells of 90 px." in text
    assert peers.png(report).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (peer_cellpose, "cellpose", "pip install cellpose"),
        (peer_stardist, "stardist", "pip install stardist tensorflow-cpu"),
        (peer_instanseg, "instanseg", "pip install instanseg-torch"),
    ],
)
def test_a_peer_that_is_not_installed_says_how_to(module: Any, name: str, words: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(BackendUnavailableError, match=words):
        module.subject([], None, 90.0, "cpu", None, None)


def test_instanseg_wants_multiples() -> None:
    image = np.zeros((9, 16, 3), np.uint8)
    image[8] = 255
    padded = peer_instanseg._padded(image)
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


def test_bad_calls_get_one_sentence(
    tmp_path: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]
    for hw in ((20, 30), (30, 20)):
        Image.fromarray(np.zeros((*hw, 3), np.uint8)).save(tmp_path / f"{hw[0]}.png")
    pictures = [str(tmp_path / "20.png"), str(tmp_path / "30.png")]
    for arguments, code, words in (
        (["--peers", "ilastik", *out], 2, "no peer named ilastik; there are cellpose"),
        ([pictures[0], *out], 2, "--cell-diameter must be given"),
        ([*pictures, "--cell-diameter", "9", *out], 2, "the images have different sizes"),
        (["--model", str(tmp_path / "none.onnx"), *out], 5, "no such file"),
        (["--cellpose-weights", str(tmp_path / "none"), *out], 5, "no such file"),
        (["--model", str(onnx_file()), "--model", str(onnx_file()), *out], 2, "two models of one name"),
    ):
        assert run(cli.command, ["peers", *arguments]) == code, words
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
