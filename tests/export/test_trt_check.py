"""``cellseg-export tensorrt``: with --check-only TensorRT-RTX really builds, here and without a GPU; the rest runs on a
GPU of plain Python."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import draw_discs, make_onnx, make_spec
from fake_tensorrt import FakeCuda, make_tensorrt
from PIL import Image

from cellseg_deploy.backends import EngineOptions, cuda_runtime, device_class, open_backend
from cellseg_deploy.backends import tensorrt as backend_module
from cellseg_deploy.backends.records import read_records, records_path
from cellseg_deploy.backends.tensorrt_sidecar import read_sidecar
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, ModelError, OutputError, ParityError, UsageError
from cellseg_deploy.files.lock import LOCK_NAME
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_export.cli import command
from cellseg_export.forms import fp16_graph as precision
from cellseg_export.forms import tensorrt as export_module
from cellseg_export.forms.fp16_graph import to_half
from cellseg_export.forms.tensorrt import COMPUTE_CAPABILITIES, check_only, export_tensorrt, in_precision
from cellseg_export.gate.verify import GateImages

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OnnxFile = Callable[..., Path]


def call(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


def named_model(contrast: float = 8.0) -> Any:
    """The stub with names of modules, so that it can be turned into half precision."""
    model = make_onnx(contrast=contrast)
    for node, name in zip(model.graph.node, ("normalise", "normalise", "decoder.head", ""), strict=True):
        node.name = f"{name}/{node.op_type}".strip("/")
    return model


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- TensorRT-RTX, really


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[trt-check]'")


@pytest.mark.usefixtures("rtx")
def test_builds_ahead_of_time_and_leaves_nothing(
    onnx_file: OnnxFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = onnx_file(model=named_model())
    before = tree(tmp_path)
    wanted = ["--compute-capability", "7.5,86,120", "-o", tmp_path / "model.engine"]
    assert call("tensorrt", path, "--check-only", *wanted) == 0
    out = capsys.readouterr().out
    assert tree(tmp_path) == before
    for words in ("stub.onnx, fp16", "TensorRT-RTX", "7.5 ", "8.6 ", "12.0 ", "not shown", "no engine"):
        assert words in out
    assert "8.9" not in out


@pytest.mark.usefixtures("rtx")
def test_an_operator_that_the_parser_does_not_know(onnx_file: OnnxFile) -> None:
    model = named_model()
    model.graph.node[3].op_type = "Bernoulli"  # sound ONNX, but nothing that TensorRT has
    model.graph.node[3].name = "decoder.head/Bernoulli"
    with pytest.raises(ModelError, match=r"parser refuses the graph:\n  - decoder.head/Bernoulli"):
        check_only(onnx_file(model=model), precision="fp32", compute_capabilities=["86"])


@pytest.mark.usefixtures("rtx")
def test_infinite_weights_are_found_before_the_builder_overlooks_them(onnx_file: OnnxFile) -> None:
    model = named_model()
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0] = np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        check_only(onnx_file(model=model), compute_capabilities=["86"])


@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_the_model_that_ships_builds_everywhere() -> None:
    try:
        path = default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    result = check_only(path)
    assert tuple(build.compute_capability for build in result.builds) == COMPUTE_CAPABILITIES
    assert result.precision == "fp16"
    assert all(build.engine_bytes > 1_000_000 for build in result.builds)


@pytest.mark.night
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_vit_large_builds(tmp_path: Path) -> None:
    """ViT-L/14 with its decoder, random weights: 300 million numbers, some minutes and 10 GB."""
    pytest.importorskip("torch")
    from export_networks import random_network

    from cellseg_export.forms.onnx import write_graph
    from cellseg_train.config import ModelConfig

    path = tmp_path / "large.onnx"
    write_graph(random_network(ModelConfig(encoder="large", image_skip=())), path)
    (build,) = check_only(path, compute_capabilities=["86"]).builds
    assert build.engine_bytes > 500_000_000


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--check-only", "--compute-capability", "90"], 2),
        (["--check-only", "--compute-capability", ","], 2),
        (["--compute-capability", "86", "-o", "x.engine"], 2),
        (["--check-only", "--reference", "r.onnx"], 2),
        (["--check-only", "--images", "."], 2),
        (["--check-only", "--masks", "."], 2),
        (["--check-only", "--unverified"], 2),
        (["--check-only", "--device", "cuda"], 2),
        (["--check-only", "--threads", "1"], 2),
        ([], 2),
        (["-o", "x.trt"], 2),
        (["-o", "x.engine", "--min-batch", "9"], 2),
        (["-o", "no/such/folder/x.engine"], 6),
    ],
)
def test_usage(onnx_file: OnnxFile, arguments: list[str], code: int) -> None:
    assert call("tensorrt", onnx_file(), *arguments) == code


def test_without_a_gpu(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_runtime, "import_bindings", lambda: FakeCuda(gpus=()))
    assert call("tensorrt", onnx_file(), "-o", tmp_path / "model.engine") == 8
    message = capsys.readouterr().err
    assert "no NVIDIA GPU" in message
    assert "--check-only" in message
    assert message.count("\n") == 1
    assert tree(tmp_path) == ["stub.onnx"]


def test_without_tensorrt_rtx(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match=r"cellseg-deploy\[trt-check\]"):
        check_only(onnx_file())


def test_without_onnx_ir_only_a_half_model_is_taken(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    source, half = read_model_file(onnx_file(model=named_model())), to_half(named_model())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"missing packages: onnx_ir.*cellseg-deploy\[tensorrt\]"):
        in_precision(source, "fp16")
    given = read_model_file(onnx_file(model=half))
    assert in_precision(given, "fp16") is given


def test_a_half_graph_with_wrong_types_is_not_built(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "to_half", lambda model: model)
    source = read_model_file(onnx_file(model=named_model()))
    with pytest.raises(ModelError):
        in_precision(source, "fp16")


def test_half_precision_is_made_in_memory(onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is never on disk cannot stay there when the process is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = onnx_file(model=named_model())
    seen: list[Any] = []

    def build(trt: Any, model: Any, *_: Any, **__: Any) -> bytes:
        seen.append((model.precision, tree(tmp_path)))
        return b"engine"

    monkeypatch.setattr(export_module, "build_engine", build)
    monkeypatch.setattr(export_module, "import_tensorrt_rtx", lambda: SimpleNamespace(__version__="1.7"))
    check_only(path, compute_capabilities=["86"])
    assert seen == [("fp16", ["stub.onnx"])]


# --- the gate, on a GPU of Python


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_runtime, "import_bindings", lambda: fake)
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(fake))
    monkeypatch.setattr(backend_module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(device_class._DISTRIBUTIONS, "tensorrt", ("numpy",))  # something that has a version
    yield fake
    assert (fake.memory, fake.streams) == ({}, set())


def discs(n: int) -> GateImages:
    image = draw_discs((600, 600), [(20 + 28 * (i % 20), 20 + 28 * (i // 20)) for i in range(n)])
    return GateImages("discs", lambda: iter([("discs", image)]))


def test_an_engine_that_counts_the_same_is_kept(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    built = export_tensorrt(path, output, images=discs(210), threads=1)
    sidecar = read_sidecar(output)
    assert sidecar == built.sidecar
    assert sidecar.spec.parity.startswith("verified")
    assert sidecar.precision == "fp16"
    assert sidecar.parity_report is not None
    assert sidecar.parity_report["verdict"] == "passed"
    assert sidecar.onnx_name == "stub.onnx"
    with open_backend(path, EngineOptions(backend="onnxruntime")) as given:
        assert sidecar.model_identity == given.describe()["model_identity"]
        assert sidecar.onnx_sha256 == given.describe()["model_file_sha256"]
    facts = json.loads((tmp_path / "model.engine.parity.json").read_text())
    assert facts["candidate"]["details"]["engine_path"] == str(output)
    assert tree(tmp_path) == [
        "model.engine",
        "model.engine.json",
        "model.engine.parity.json",
        "model.parity-records.json",
        "stub.onnx",
        "stub.parity-records.json",
    ]
    with open_backend(output) as backend:
        assert backend.verified
    # Nobody asked for half precision here, and the model is in fp32 for good.
    built = export_tensorrt(path, output, precision="fp32", images=discs(210), threads=1)
    assert built.sidecar.precision == "fp32"


def test_what_a_killed_build_left_goes_with_the_next(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    left = tmp_path / ".cellseg-killed"
    left.mkdir()
    (left / LOCK_NAME).touch()
    (left / "model.engine").touch()
    hidden: set[str] = set()

    def look(_: str) -> None:
        hidden.update(name for name in tree(tmp_path) if name.startswith("."))

    export_tensorrt(path, output, images=discs(210), threads=1, on_image=look)
    (folder,) = {name.split("/")[0] for name in hidden}
    assert hidden == {folder} | {f"{folder}/{name}" for name in (LOCK_NAME, "model.engine", "model.engine.json")}
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


def test_an_engine_that_finds_nothing_is_not_kept(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    """As FP16 ViT engines that collapsed to one class did."""
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    export_tensorrt(path, output, images=discs(210), threads=1)
    older = output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()
    sys.modules["tensorrt"].behaviour.gain = 0.3
    with pytest.raises(ParityError):
        export_tensorrt(path, output, images=discs(210), threads=1)
    assert (output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()) == older
    assert json.loads((tmp_path / "model.engine.refused.json").read_text())["verdict"] == "failed"
    assert not [name for name in tree(tmp_path) if name.startswith(".cellseg")]


def test_auto_finds_the_engine_by_its_record(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    built = export_tensorrt(path, output, images=discs(210), threads=1)
    (record,) = read_records(records_path(path))
    assert record == built.record == read_records(records_path(output))[0]
    assert (record.file, record.backend) == ("model.engine", "tensorrt")
    assert (record.precision, record.policy) == ("fp16", "fp16")
    assert (record.device_class, record.verdict) == ("cuda-8.6", "passed")
    assert record.timing is not None
    assert record.timing.ms_per_tile > 0
    with open_backend(path, EngineOptions(device="cuda", precision="fp16")) as backend:
        assert (backend.name, backend.precision, backend.verified) == ("tensorrt", "fp16", True)
        assert backend.describe()["engine_path"] == str(output)
    cuda.gpus = (("Other RTX", 8, 9),)
    with pytest.raises(BackendUnavailableError):  # never compared there: no GPU form to take, and no CPU instead
        open_backend(path, EngineOptions(device="cuda"))


def test_an_engine_is_verified_against_the_cpu(
    cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one device for both, ONNX Runtime would be asked for a GPU of Python."""
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    export_tensorrt(path, output, images=discs(210), threads=1)
    (tmp_path / "images").mkdir()
    (_, image) = next(discs(210).load())
    Image.fromarray(image).save(tmp_path / "images" / "discs.png")
    words = ["verify", path, output, "--images", tmp_path / "images", "--device", "cuda", "--reference-device", "cpu"]
    assert call(*words) == 0
    assert "tensorrt" in capsys.readouterr().out
    output.write_bytes(output.read_bytes() + b" ")
    assert call(*words) == 5
    message = capsys.readouterr().err
    assert "SHA-256" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stub.onnx", "--precision", "bf16"], "--precision belongs to --backend openvino, not to onnxruntime"),
        ([".", "--backend", "openvino"], "--backend and --precision are for an .onnx"),
    ],
)
def test_verify_hands_engine_settings_on(
    onnx_file: OnnxFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(onnx_file().parent)
    assert call("verify", "stub.onnx", *arguments) == 2
    assert message in capsys.readouterr().err


def test_too_few_cells_prove_nothing(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path, output = onnx_file(model=named_model()), tmp_path / "model.engine"
    with pytest.raises(ParityError, match="inconclusive"):
        export_tensorrt(path, output, images=discs(5), threads=1)
    assert not output.exists()
    built = export_tensorrt(path, output, images=discs(5), threads=1, unverified=True)
    assert built.sidecar.spec.parity.startswith("unverified")
    assert built.record is None
    assert not list(tmp_path.glob("*records.json"))


def test_what_the_builder_refuses_leaves_nothing(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = onnx_file(model=named_model())
    sys.modules["tensorrt"].behaviour.plan = False
    with pytest.raises(ModelError, match="no kernel for node 4"):
        export_tensorrt(path, tmp_path / "model.engine", images=discs(210))
    assert tree(tmp_path) == ["stub.onnx"]


def test_precision_is_never_changed_unasked(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    model = named_model()
    path = onnx_file(model=to_half(model))
    with pytest.raises(UsageError, match="--precision fp32 was requested, but the model holds fp16 weights"):
        export_tensorrt(path, tmp_path / "model.engine", precision="fp32")
    built = export_tensorrt(path, tmp_path / "model.engine", images=discs(210), threads=1)
    assert sys.modules["tensorrt"].builds[-1][0].data == path.read_bytes()
    assert built.sidecar.precision == "fp16"


def test_names_of_engines(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = onnx_file(make_spec(), model=named_model())
    with pytest.raises(UsageError, match=r"must end in .engine"):
        export_tensorrt(path, tmp_path / "model.trt")
    with pytest.raises(OutputError, match="no such folder"):
        export_tensorrt(path, tmp_path / "no" / "model.engine")


def test_info_shows_the_engine_without_opening_it(
    cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.engine"
    export_tensorrt(onnx_file(model=named_model()), output, images=discs(210), threads=1)
    sys.modules["tensorrt"].opened.clear()
    assert call("info", output, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"]["whole"] is True
    assert facts["file"]["built_on"]["gpu"] == "Fake RTX"
    assert facts["spec"]["name"] == "stub"
    output.write_bytes(b"x")
    assert call("info", output, "--json") == 0
    assert json.loads(capsys.readouterr().out)["file"]["whole"] is False
    assert sys.modules["tensorrt"].opened == []
