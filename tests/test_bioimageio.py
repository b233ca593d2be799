"""The bioimage.io package: its own validator accepts it, and the test tensors are what the model really answers."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, make_onnx, make_spec

from cellseg_deploy.cli import _common
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.model_spec import TrainingInfo, WeightsInfo
from cellseg_export.bioimageio import Credits, export_bioimageio, licence_of
from cellseg_export.cli import command

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

OnnxFile = Callable[..., Path]
SPEC = make_spec(
    variant="boundary",
    name="tiny smear v1.2/α",
    encoder="vit_small_patch14_dinov2",
    training=TrainingInfo(val_metrics={"f1": 0.9}),
)


@pytest.fixture
def package(onnx_file: OnnxFile, tmp_path: Path) -> Path:
    return export_bioimageio(onnx_file(SPEC), tmp_path / "package.zip", credits=Credits(("A. Nobody",)))


def content(package: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.filterwarnings("default")  # of the validator's own dependencies
def test_its_own_validator_accepts_it(package: Path) -> None:
    spec = pytest.importorskip("bioimageio.spec", reason="no validator: pip install bioimageio.spec")
    # Checks the description, that every file is there with its hash, and reads the shapes of the test tensors.
    summary = spec.load_description(package, perform_io_checks=True).validation_summary
    assert summary.status != "failed", summary.display()
    assert summary.type == "model"


def test_the_files_are_the_model_and_its_answer(package: Path, onnx_file: OnnxFile) -> None:
    files = content(package)
    assert sorted(files) == ["README.md", "model.onnx", "rdf.yaml", "test-input.npy", "test-output.npy"]
    assert files["model.onnx"] == onnx_file(SPEC).read_bytes()
    tiles, answer = (np.load(io.BytesIO(files[f"test-{side}.npy"])) for side in ("input", "output"))
    assert (tiles.dtype, tiles.shape, answer.shape) == (np.uint8, (1, 56, 56, 3), (1, 2, 56, 56))
    assert answer == pytest.approx(DarknessBackend(SPEC).predict(tiles), abs=1e-5)
    assert answer[:, 0].std() > 0.01


def test_the_description_says_what_the_spec_says(package: Path) -> None:
    files = content(package)
    rdf = json.loads(files["rdf.yaml"])
    assert rdf["config"]["cellseg"]["spec"]["name"] == SPEC.name
    assert rdf["outputs"][0]["axes"][1]["channel_names"] == ["foreground", "boundary"]
    assert rdf["outputs"][0]["axes"][2]["halo"] == SPEC.halo
    assert any("DINOv2" in entry["text"] for entry in rdf["cite"])
    assert rdf["license"] == "MIT"
    text = files["README.md"].decode()
    assert "| f1 | 0.9000 |" in text
    assert "unverified" in text


def test_mistakes(onnx_file: OnnxFile, tmp_path: Path) -> None:
    unclear = onnx_file(make_spec(weights=WeightsInfo(origin="somewhere", licence="free, ask us")), name="unclear.onnx")
    with pytest.raises(UsageError, match="no SPDX identifier"):
        export_bioimageio(unclear, tmp_path / "p.zip")
    assert export_bioimageio(unclear, tmp_path / "p.zip", credits=Credits(licence="CC0-1.0")).is_file()
    with pytest.raises(UsageError, match="author"):
        export_bioimageio(unclear, tmp_path / "q.zip", credits=Credits((), "MIT"))
    with pytest.raises(UsageError, match=r"\.zip"):
        export_bioimageio(unclear, tmp_path / "p.tar")
    with pytest.raises(OutputError, match="no such folder"):
        export_bioimageio(unclear, tmp_path / "none" / "p.zip")
    assert not (tmp_path / "q.zip").exists()
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(OutputError, match="a folder of that name"):  # before the licence
        export_bioimageio(unclear, tmp_path / "folder.zip")


@pytest.mark.parametrize(
    ("text", "given", "licence"),
    [
        ("MIT", None, "MIT"),
        ("apache-2.0", None, "Apache-2.0"),  # as timm writes it
        ("as the training data allows", None, None),
        ("unknown", None, None),
        ("unknown", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-3.0"),
        ("MIT", "ask us", None),
    ],
)
def test_a_licence_is_an_identifier_or_asked_for(text: str, given: str | None, licence: str | None) -> None:
    spec = make_spec(weights=WeightsInfo(origin="somewhere", licence=text))
    if licence is not None:
        assert licence_of(spec, Credits(licence=given)) == licence
    else:
        with pytest.raises(UsageError, match="no SPDX identifier.*" if given else "'.*no SPDX identifier.*--licence"):
            licence_of(spec, Credits(licence=given))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(make_onnx().SerializeToString())
    assert _common.run(command, ["bioimageio", str(source), "-o", str(tmp_path / "p.zip"), "--author", "Me"]) == 0
    assert json.loads(content(tmp_path / "p.zip")["rdf.yaml"])["authors"] == [{"name": "Me"}]
    assert "p.zip" in capsys.readouterr().out
