"""The bioimage.io package: its own validator accepts it, and the test tensors are what the model really answers."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import DarknessBackend, make_onnx, make_spec

from cellseg_deploy.cli import console
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.spec import TrainingInfo, WeightsInfo
from cellseg_export.cli import command
from cellseg_export.forms.bioimageio import Credits, as_npy, export_bioimageio, licence_of

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
    with pytest.raises(UsageError, match="not an SPDX identifier"):
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
        with pytest.raises(
            UsageError, match="not an SPDX identifier.*" if given else "'.*not an SPDX identifier.*--licence"
        ):
            licence_of(spec, Credits(licence=given))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(make_onnx().SerializeToString())
    assert console.run(command, ["bioimageio", str(source), "-o", str(tmp_path / "p.zip"), "--author", "Me"]) == 0
    assert json.loads(content(tmp_path / "p.zip")["rdf.yaml"])["authors"] == [{"name": "Me"}]
    assert "p.zip" in capsys.readouterr().out


def shown(path: Path, capsys: Any) -> tuple[dict[str, Any], str]:
    """What ``cellseg-export info`` says of ``path``, for machines and for people."""
    assert console.run(command, ["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert console.run(command, ["info", str(path)]) == 0
    return facts, capsys.readouterr().out


def test_info_says_what_the_package_says(package: Path, onnx_file: OnnxFile, capsys: Any) -> None:
    facts, text = shown(package, capsys)
    model = read_model_file(onnx_file(SPEC))
    file = facts["file"]
    assert (file["form"], file["whole"], file["license"], file["authors"]) == (
        "bioimage.io package",
        True,
        "MIT",
        ["A. Nobody"],
    )
    assert (file["identity"], file["sha256"], file["precision"]) == (model.identity, model.file_sha256, "fp32")
    assert file["files"]["model.onnx"] == len(model.data)
    assert any("DINOv2" in entry for entry in file["cite"])
    assert facts["spec"] == json.loads(msgspec.json.encode(SPEC))
    assert "bioimage.io package" in text
    assert model.identity in text


def test_info_notices_a_package_that_was_changed_or_is_of_another_program(package: Path, capsys: Any) -> None:
    files = content(package)

    def written(name: str, changes: dict[str, bytes | None]) -> Path:
        path = package.with_name(name)
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in (files | changes).items():
                if data is not None:
                    archive.writestr(member, data)
        return path

    other = np.load(io.BytesIO(files["test-output.npy"])) * 0
    assert shown(written("changed.zip", {"test-output.npy": as_npy(other)}), capsys)[0]["file"]["whole"] is False
    refused: dict[str, dict[str, bytes | None]] = {
        "not in the package": {"model.onnx": None},
        "written by `cellseg-export bioimageio`": {"rdf.yaml": b"type: model\nname: other\n"},
        "expected a package written by": {"rdf.yaml": None},
        "model.onnx": {"model.onnx": b"not a model"},
    }
    for words, changes in refused.items():
        assert console.run(command, ["info", str(written("refused.zip", changes))]) == 5
        assert words in capsys.readouterr().err
    cut = package.with_name("cut.zip")
    cut.write_bytes(package.read_bytes()[:-40])
    assert console.run(command, ["info", str(cut)]) == 5
    assert "not a whole ZIP archive" in capsys.readouterr().err
    locked = bytearray(package.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(signature) + flags] |= 1  # says that the first member is encrypted
    cut.write_bytes(locked)
    assert console.run(command, ["info", str(cut)]) == 5
    said = capsys.readouterr().err
    assert "cannot be unpacked (File" in said
    assert "is encrypted" in said
    assert console.run(command, ["info", str(package.with_name("none.zip"))]) == 5
    assert "cannot be read (No such file" in capsys.readouterr().err
