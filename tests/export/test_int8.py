"""INT8: made from real tiles, kept only while F1 against the truth holds; otherwise refused, with the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_spec

from cellseg_deploy.backends.records import read_records, records_path
from cellseg_deploy.errors import BackendUnavailableError, OutputError, ParityError, UsageError

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("nncf", reason="NNCF is not installed: pip install 'cellseg-deploy[int8]'")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

from test_export_openvino import discs

from cellseg_deploy.backends.openvino import OpenVinoBackend, shared_core
from cellseg_export.forms import int8
from cellseg_export.forms.int8 import Int8Options, calibration_tiles, export_int8

OnnxFile = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("default:::nncf", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_is_int8_and_finds_the_cells(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, path = onnx_file(), tmp_path / "stub.int8.xml"
    exported = export_int8(source, path, images=discs(), options=Int8Options(n_tiles=16), threads=1)
    assert exported.report.verdict == "passed"
    assert exported.facts.floating == ()
    assert exported.report.notes == ("ranges of activations from 16 tiles of discs, the images it is judged by",)
    rows = json.loads(exported.report_path.read_bytes())["truth"]["counting"]
    assert rows["reference"]["f1"] - rows["candidate"]["f1"] <= 0.01
    assert rows["reference"]["n_true"] == 240
    with OpenVinoBackend(path, threads=1) as backend:
        assert (backend.precision, backend.inference_precision) == ("int8", "fp32")
        assert backend.spec.parity.startswith("verified: counts as onnxruntime does under policy int8")
    (record,) = read_records(records_path(source))  # beside the model it was made from, where auto looks
    assert (record.file, record.precision, record.passed) == ("stub.int8.xml", "int8", True)
    assert record.timing is not None
    assert record.reference_timing is not None
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".cellseg")]


def test_images_for_calibration_alone_are_named(onnx_file: OnnxFile, tmp_path: Path) -> None:
    other = replace(discs(1), source="folder other")
    options = Int8Options(n_tiles=8)
    exported = export_int8(onnx_file(), tmp_path / "m.xml", images=discs(), calibration=other, options=options)
    assert exported.report.notes == ("ranges of activations from 8 tiles of folder other",)
    assert exported.spec.parity.endswith("8 tiles of folder other")


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "calibration_tiles", lambda *_, **__: pytest.fail("calibrated first"))
    with pytest.raises(OutputError, match=r"^/proc: cannot be written"):
        export_int8(onnx_file(), Path("/proc/m.xml"), images=discs())


def broken(nncf: Any, model: Any, tiles: Any) -> Any:
    """A quantiser that loses the cells: the network's answer shifted by a hundred logits."""
    for op in model.get_ops():
        if op.get_type_name() == "Sigmoid":
            import openvino.opset13 as ops

            shifted = ops.subtract(op.input_value(0), np.float32(100))
            op.input(0).replace_source_output(shifted.output(0))
    model.validate_nodes_and_infer_types()
    return model


def test_too_large_a_drop_is_refused_and_only_the_report_stays(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "quantise", broken)
    out = tmp_path / "out"
    out.mkdir()
    options = Int8Options(n_tiles=8, back_off=False)
    with pytest.raises(ParityError, match=r"F1 against the truth falls from .* allowed 0\.01"):
        export_int8(onnx_file(), out / "m.xml", images=discs(), options=options, threads=1)
    assert {p.suffix for p in out.iterdir()} <= {".json", ".jpg"}
    assert json.loads((out / "m.xml.refused.json").read_bytes())["verdict"] == "failed"


def test_it_backs_off_and_says_what_stayed_in_floating_point(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(int8, "quantise", broken)
    monkeypatch.setattr(int8, "quantised_operations", lambda model: {"head"} if "half" in seen else {"conv", "head"})

    def within(*arguments: Any, **settings: Any) -> Any:
        seen.append("half")
        return arguments[1]  # the floating-point network

    monkeypatch.setattr(int8, "quantise_within", within)
    exported = export_int8(
        onnx_file(),
        tmp_path / "m.xml",
        images=discs(),
        options=Int8Options(n_tiles=8),
        threads=1,
        on_step=seen.append,
    )
    assert exported.facts.floating == ("conv",)
    assert any("1 of 2 operations stay in floating point: conv" in text for text in seen)


def test_what_accuracy_control_follows_is_the_loss_of_f1(onnx_file: OnnxFile) -> None:
    import nncf
    import openvino as ov

    from cellseg_export.forms.openvino import open_origin, read_network

    asked: dict[str, Any] = {}

    class FakeNncf:
        """As NNCF, but hands out what it was asked."""

        ModelType, DropType = nncf.ModelType, nncf.DropType
        AdvancedAccuracyRestorerParameters = nncf.AdvancedAccuracyRestorerParameters

        @staticmethod
        def Dataset(items: Any) -> Any:  # noqa: N802
            return items

        @staticmethod
        def quantize_with_accuracy_control(model: Any, _: Any, items: Any, validate: Any, **settings: Any) -> Any:
            asked.update(settings)
            whole = shared_core().compile_model(model, "CPU")
            asked["same"] = validate(whole, items)
            dark = shared_core().compile_model(broken(None, model, None), "CPU")
            asked["dark"] = validate(dark, items[:1])
            return model

    options, images = Int8Options(n_tiles=8, max_f1_drop=0.25), discs(2)
    with open_origin(onnx_file(), 1) as origin:
        tiles = calibration_tiles(origin.file.spec, images, 8)
        int8.quantise_within(FakeNncf, read_network(ov, origin.file), tiles, origin, images, options)
    assert asked["same"] == (1.0, [1.0, 1.0])
    metric, by_image = asked["dark"]  # no cell is left
    assert metric < 0.05
    assert by_image == [metric]
    assert (asked["max_drop"], asked["drop_type"]) == (0.25, nncf.DropType.ABSOLUTE)
    assert asked["model_type"] == nncf.ModelType.TRANSFORMER
    assert asked["advanced_accuracy_restorer_parameters"].ranking_subset_size == 2


def test_accuracy_control_finds_nothing_to_put_back_where_nothing_is_lost(onnx_file: OnnxFile) -> None:
    import nncf
    import openvino as ov

    from cellseg_export.forms.openvino import open_origin, read_network

    options, images = Int8Options(n_tiles=8), discs(1)
    with open_origin(onnx_file(), 1) as origin:
        tiles = calibration_tiles(origin.file.spec, images, 8)
        plain = int8.quantise(nncf, read_network(ov, origin.file), tiles)
        kept = int8.quantise_within(nncf, read_network(ov, origin.file), tiles, origin, images, options)
    assert int8.quantised_operations(plain) == int8.quantised_operations(kept) != set()


def test_transformers_are_quantised_as_such() -> None:
    """Without it NNCF leaves SmoothQuant out, and quantises what a transformer cannot bear."""

    class Asked:
        class ModelType:
            TRANSFORMER = "transformer"

        Dataset = list

        @staticmethod
        def quantize(model: Any, dataset: Any, **asked: Any) -> Any:
            return model, len(dataset), asked

    tiles = np.zeros((5, 28, 28, 3), np.uint8)
    assert int8.quantise(Asked, "model", tiles) == (
        "model",
        5,
        {"subset_size": 5, "model_type": "transformer"},
    )


def test_calibration_tiles_are_the_runtimes_own() -> None:
    spec = make_spec()
    tiles = calibration_tiles(spec, discs(3), 10)
    assert (tiles.dtype, tiles.shape) == (np.uint8, (10, 56, 56, 3))
    assert np.array_equal(tiles, calibration_tiles(spec, discs(3), 10))
    assert not np.array_equal(tiles, calibration_tiles(spec, discs(3), 10, seed=1))


def test_what_it_cannot_be_made_from(onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="without masks"):
        export_int8(onnx_file(), tmp_path / "m.xml", images=discs(1, with_truth=False))
    with pytest.raises(UsageError, match=r"must end in \.xml"):
        export_int8(onnx_file(), tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'cellseg-deploy\[int8\]'"):
        export_int8(onnx_file(), tmp_path / "m.xml", images=discs(1))
