"""The OpenVINO pair: handed over only if it counts as its origin does, whole or not at all, with a record of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_discs, make_spec

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.records import form_sha256, read_records, records_path
from cellseg_deploy.cli import console
from cellseg_deploy.errors import ModelError, OutputError, ParityError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.parity.policy import policy_for

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'cellseg-deploy[openvino]'")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

from cellseg_deploy.backends.openvino import OpenVinoBackend, read_ir, shared_core
from cellseg_export.cli import command
from cellseg_export.forms import openvino as module
from cellseg_export.forms.openvino import export_openvino
from cellseg_export.gate.parity_record import check_recordable
from cellseg_export.gate.verify import GateImages

OnnxFile = Callable[..., Path]
needs_bf16 = pytest.mark.skipif(
    "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this CPU has no bf16 instructions",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def discs(n: int = 3, with_truth: bool = True) -> GateImages:
    """``n`` images of 80 discs of 20 px each, with the discs as truth."""
    from scipy import ndimage

    centres = [(24.0 * i + 20, 24.0 * j + 20) for i in range(10) for j in range(8)]
    images = {f"discs-{k}": draw_discs((210, 260), [(x + k, y) for x, y in centres]) for k in range(n)}
    truth = {name: ndimage.label(image[..., 0] < 200)[0].astype(np.int32) for name, image in images.items()}

    def load() -> Iterator[tuple[str, Any]]:
        yield from images.items()

    return GateImages("discs", load, truth.__getitem__ if with_truth else None)


@pytest.fixture
def darkening(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO reads the network with its logits lowered by ten: cells vanish."""
    import openvino.opset13 as ops

    def read(ov: Any, file: Any) -> Any:
        model = ov.Core().read_model(file.data)
        sigmoid = next(op for op in model.get_ops() if op.get_type_name() == "Sigmoid")
        sigmoid.input(0).replace_source_output(ops.subtract(sigmoid.input_value(0), np.float32(10)).output(0))
        model.validate_nodes_and_infer_types()
        return model

    monkeypatch.setattr(module, "read_network", read)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_pair_with_its_report_and_a_record_for_auto(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, path = onnx_file(), tmp_path / "stub.xml"
    exported = export_openvino(source, path, images=discs(), threads=1)
    assert names(tmp_path) == {
        "stub.onnx", "stub.xml", "stub.bin", "stub.xml.parity.json", "stub.parity-records.json",
    }  # fmt: skip
    file = read_ir(path)
    assert file.spec.parity.startswith("verified: counts as onnxruntime does under policy fp32; 240 cells")
    assert file.facts.model_identity == read_model_file(source).identity
    assert json.loads(exported.report_path.read_bytes())["verdict"] == "passed"
    (record,) = read_records(records_path(source))
    assert record == exported.record
    assert (record.file, record.file_sha256) == ("stub.xml", form_sha256(path))
    assert (record.backend, record.precision, record.inference_precision) == ("openvino", "fp32", "fp32")
    with open_backend(path, EngineOptions(threads=1)) as backend:
        assert (backend.name, backend.verified) == ("openvino", True)


@needs_bf16
def test_bf16_is_judged_and_recorded_as_bf16(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, path = onnx_file(), tmp_path / "b.xml"
    exported = export_openvino(source, path, images=discs(), precision="bf16", threads=1)
    assert (exported.report.policy.name, exported.report.candidate.precision) == ("bf16", "bf16")
    (record,) = read_records(records_path(source))
    assert (record.precision, record.inference_precision) == ("bf16", "bf16")
    with open_backend(path, EngineOptions(threads=1)) as backend:  # fp32, which nobody compared
        assert (backend.precision, backend.verified) == ("fp32", False)


@needs_bf16
@pytest.mark.parametrize("order", [("fp32", "bf16"), ("bf16", "fp32")])
def test_one_pair_passes_in_both_precisions(onnx_file: OnnxFile, tmp_path: Path, order: tuple[Any, ...]) -> None:
    source, path = onnx_file(), tmp_path / "m.xml"
    for precision in order:
        export_openvino(source, path, images=discs(), precision=precision, threads=1)
    assert "under policy fp32" in read_ir(path).spec.parity  # in which it runs unless asked otherwise
    assert names(tmp_path) >= {"m.xml.parity.json", "m.xml.bf16.parity.json"}
    for precision in order:
        with open_backend(path, EngineOptions(precision=precision, threads=1)) as backend:
            assert (backend.precision, backend.verified) == (precision, True)


@needs_bf16
def test_a_sentence_is_not_kept_for_another_network(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, path = onnx_file(), tmp_path / "m.xml"
    export_openvino(source, path, images=discs(), weights="fp16", threads=1)
    export_openvino(source, path, images=discs(), precision="bf16", threads=1)
    assert "under policy bf16" in read_ir(path).spec.parity


def test_fp16_weights_are_rounded_and_said_so(onnx_file: OnnxFile, tmp_path: Path) -> None:
    exported = export_openvino(onnx_file(), tmp_path / "h.xml", images=discs(), weights="fp16", threads=1)
    assert (exported.facts.weights, exported.facts.precision) == ("fp16", "fp32")
    assert exported.report.policy.name == "fp16"
    assert "f16" in exported.path.read_text().lower()
    with open_backend(exported.path, EngineOptions(threads=1)) as backend:
        assert backend.verified  # by the policy of its weights


@pytest.mark.usefixtures("darkening")
def test_a_pair_that_counts_otherwise_is_refused_and_the_older_one_stays(onnx_file: OnnxFile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = onnx_file()
    for older in ("m.xml", "m.bin", "m.xml.parity.json"):
        (out / older).write_text("older")
    with pytest.raises(ParityError, match="was not written: parity failed"):
        export_openvino(source, out / "m.xml", images=discs(), threads=1)
    assert {(out / older).read_text() for older in ("m.xml", "m.bin", "m.xml.parity.json")} == {"older"}
    assert json.loads((out / "m.xml.refused.json").read_bytes())["verdict"] == "failed"
    assert not [name for name in names(out) if name.startswith(".") or "records" in name]
    assert read_records(records_path(source)) == ()


@pytest.mark.usefixtures("darkening")
def test_a_refusal_is_on_record(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source = onnx_file()
    with pytest.raises(ParityError):
        export_openvino(source, tmp_path / "m.xml", images=discs(), threads=1)
    (record,) = read_records(records_path(source))
    assert (record.file, record.verdict, record.timing) == ("m.xml", "failed", None)


def test_too_few_cells_are_no_proof(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, path = onnx_file(), tmp_path / "few.xml"
    with pytest.raises(ParityError, match="inconclusive"):
        export_openvino(source, path, images=discs(1), threads=1)
    assert not path.exists()
    exported = export_openvino(source, path, images=discs(1), unverified=True, threads=1)
    assert exported.spec.parity.startswith("unverified")
    assert exported.record is None
    assert read_records(records_path(source)) == ()


def test_names_that_cannot_be_written(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source = onnx_file()
    with pytest.raises(UsageError, match=r"must end in \.xml"):
        export_openvino(source, tmp_path / "m.onnx")
    with pytest.raises(OutputError, match="no such folder"):
        export_openvino(source, tmp_path / "nowhere" / "m.xml")
    (tmp_path / "m.bin").mkdir()
    with pytest.raises(OutputError, match="a folder of that name"):
        export_openvino(source, tmp_path / "m.xml")
    with pytest.raises(OutputError, match=r"^/proc: cannot be written \(No such file"):
        module.check_output(Path("/proc/m.xml"))
    with pytest.raises(UsageError, match=r"expected an \.onnx"):
        export_openvino(tmp_path / "x.xml", tmp_path / "n.xml")


def test_a_full_disk_is_named_by_its_reason_and_the_final_name(onnx_file: OnnxFile, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source, path = onnx_file(), tmp_path / "m.xml"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError) as caught:
            export_openvino(source, path, images=discs(), threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{path}: cannot be written (File too large)")
    assert names(tmp_path) == {"stub.onnx"}


def test_the_onnx_file_of_a_run_lies_where_the_next_export_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = pytest.importorskip("cellseg_train.checkpoint")
    from cellseg_export.forms import onnx

    seen: list[Path] = []

    def write(network: Any, path: Path) -> None:
        seen.append(path)
        assert (path.parent / ".cellseg-lock").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load_network", lambda source: None)
    monkeypatch.setattr(onnx, "write_graph", write)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(KeyboardInterrupt):
        export_openvino(run, tmp_path / "m.xml", images=discs(), threads=1)
    assert seen[0].parent.parent == tmp_path
    assert names(tmp_path) == {"run"}


def verify_record(*arguments: object) -> int:
    return console.run(command, ["verify", "--record", "--threads", "1", *map(str, arguments)])


def test_what_no_record_is_kept_of(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from cellseg_export.gate import verify as gate

    source, path = onnx_file(), tmp_path / "out" / "m.xml"
    path.parent.mkdir()
    export_openvino(source, path, images=discs(), threads=1)
    records_path(path).unlink()
    few = discs(1)
    monkeypatch.setattr(gate, "sample_images", lambda spec: few)
    assert verify_record(source, path) == 5
    assert "no record is kept: too few cells" in capsys.readouterr().err

    def compared(*_: Any, **__: Any) -> Any:
        raise AssertionError("refused only after the comparison")

    monkeypatch.setattr(gate, "verify", compared)
    for arguments, words in (
        ((path, path), "not with openvino"),
        ((source, source), "compared with itself"),
        ((source, path, "--policy", "int8"), "policy int8 is weaker than a form in fp32"),
    ):
        assert verify_record(*arguments) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="PyTorch network itself"):
        check_recordable(*pytorch_candidate(source), tmp_path, policy_for("fp32"))
    assert not records_path(path).exists()


def pytorch_candidate(source: Path) -> tuple[Any, Any]:
    """A reference, and a candidate that says it is PyTorch."""
    backend = open_backend(source, EngineOptions(backend="onnxruntime", threads=1))
    other = open_backend(source, EngineOptions(backend="onnxruntime", threads=1))
    other.name = "pytorch"
    return backend, other


def test_an_onnx_file_under_the_name_of_a_pair_is_not_even_opened(onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = tmp_path / "renamed.xml"
    path.write_bytes(onnx_file().read_bytes())
    path.with_suffix(".bin").write_bytes(b"weights")
    with pytest.raises(ModelError, match="not XML"):
        OpenVinoBackend(path)


def test_the_command(onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import cv2

    source = onnx_file(make_spec())
    smears, out = tmp_path / "smears", tmp_path / "out"
    smears.mkdir()
    out.mkdir()
    for name, image in discs().load():
        cv2.imwrite(str(smears / f"{name}.png"), image[..., ::-1])
    arguments = ["openvino", str(source), "-o", str(out / "m.xml"), "--images", str(smears), "--threads", "1"]
    assert console.run(command, arguments) == 0
    text = capsys.readouterr().out
    assert "verdict    passed" in text
    assert "looks for forms of stub.onnx in its own folder only" in text
    assert console.run(command, ["info", str(out / "m.xml")]) == 0
    assert "form        openvino" in capsys.readouterr().out.replace("form            ", "form        ")
    find_spec = importlib.util.find_spec
    for package, extra in (("openvino", "openvino"), ("nncf", "int8")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else find_spec(name))
            verb = "openvino" if package == "openvino" else "int8"
            assert console.run(command, [verb, str(source), "-o", str(out / "n.xml")]) == 8
            assert f"pip install 'cellseg-deploy[{extra}]'" in capsys.readouterr().err
