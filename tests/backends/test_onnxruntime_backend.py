"""Model files and ONNX Runtime: a sound model runs, anything else is refused before it runs."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_onnx, make_spec

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends import onnxruntime as module
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, UsageError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import model_identity, read_model_file, set_spec, write_spec
from cellseg_deploy.segmenter import Segmenter

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

OnnxFile = Callable[..., Path]


def random_tiles(n: int, size: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_runs_the_network(onnx_file: OnnxFile) -> None:
    with open_backend(onnx_file(), EngineOptions(threads=1)) as backend:
        tiles = random_tiles(5)
        assert backend.predict(tiles) == pytest.approx(DarknessBackend().predict(tiles), abs=1e-5)
        assert (backend.name, backend.device, backend.precision) == ("onnxruntime", "cpu", "fp32")
        facts = backend.describe()
        assert facts["onnxruntime"] == ort.__version__
        assert len(facts["model_identity"]) == len(facts["model_file_sha256"]) == 64


def test_batch_one_equals_batch_sixteen_and_any_number_of_threads(onnx_file: OnnxFile) -> None:
    path, tiles = onnx_file(make_spec(variant="boundary")), random_tiles(16)
    with open_backend(path, EngineOptions(threads=1)) as one, open_backend(path, EngineOptions(threads=2)) as two:
        together = one.predict(tiles)
        assert together.shape == (16, 2, 56, 56)
        single = np.concatenate([one.predict(tiles[i : i + 1]) for i in range(16)])
        assert np.array_equal(together, single)
        assert np.array_equal(together, two.predict(tiles))


def test_segmenter_load(onnx_file: OnnxFile) -> None:
    with Segmenter.load(onnx_file(), engine=EngineOptions(threads=1), scale=None) as segmenter:
        assert segmenter(draw_discs((100, 100), [(30, 30), (70, 60)])).count == 2


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        (np.zeros((0, 56, 56, 3), np.uint8), "empty batch"),
        (np.zeros((1, 57, 56, 3), np.uint8), "57"),
        (np.zeros((1, 56, 56, 3), np.float32), "float32"),
    ],
)
def test_wrong_tiles(onnx_file: OnnxFile, tiles: Any, words: str) -> None:
    with open_backend(onnx_file(), EngineOptions(threads=1)) as backend, pytest.raises(UsageError, match=words):
        backend.predict(tiles)


# --- models; those that are refused: test_reliability_models.py


def test_missing_default_model_is_said_clearly() -> None:
    try:
        path = default_model_path()
    except ModelError as error:
        assert "`model`" in str(error)  # noqa: PT017  (either outcome is right, each has its own test)
    else:
        assert path.is_file()


# --- identities


def test_identity_ignores_metadata_but_not_the_network(onnx_file: OnnxFile) -> None:
    first = make_onnx()
    calibrated = make_onnx(make_spec(name="other"))
    calibrated.producer_name = "someone else"
    calibrated.graph.node[0].doc_string = "where it came from"
    calibrated.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/a")
    assert model_identity(first) == model_identity(calibrated)
    raw = first.graph.initializer[0]
    as_floats = onnx.helper.make_tensor("weight", 1, list(raw.dims), onnx.numpy_helper.to_array(raw).ravel().tolist())
    calibrated.graph.initializer[0].CopyFrom(as_floats)
    assert model_identity(first) == model_identity(calibrated)
    assert model_identity(first) != model_identity(make_onnx(contrast=8.0001))
    rewired = make_onnx()
    rewired.graph.node[3].op_type = "HardSigmoid"
    assert model_identity(first) != model_identity(rewired)


def test_calibrating_a_file_keeps_its_identity(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    before = read_model_file(path)
    write_spec(path, make_spec(name="calibrated"))
    after = read_model_file(path)
    assert after.spec == make_spec(name="calibrated")
    assert after.identity == before.identity
    assert after.file_sha256 != before.file_sha256
    model = make_onnx()
    model.metadata_props.add(key="note", value="kept")
    set_spec(model, make_spec(name="x"))
    assert [entry.key for entry in model.metadata_props] == ["note", "cellseg"]


def test_precision_is_that_of_the_weights(onnx_file: OnnxFile) -> None:
    model = make_onnx()
    assert read_model_file(onnx_file(model=model)).precision == "fp32"
    # What no product takes does not count, however much there is of it.
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1000, np.float16), "half"))
    assert read_model_file(onnx_file(model=model)).precision == "fp32"
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    assert read_model_file(onnx_file(model=model)).precision == "fp16"


# --- devices


def test_cuda_is_never_replaced_by_the_cpu(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_file()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match=r"cellseg-deploy\[gpu\]"):
        open_backend(path, EngineOptions(device="cuda"))
    # As on a machine without a GPU: the provider is listed, and the session quietly runs on the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession

    def quiet_fallback(data: bytes, **settings: Any) -> Any:
        assert settings["providers"][0][0] == "CUDAExecutionProvider"
        return real(data, sess_options=settings["sess_options"], providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", quiet_fallback)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(BackendUnavailableError, match=r"'cuda:1' was requested.*CPUExecutionProvider"):
        open_backend(path, EngineOptions(device="cuda:1"))


def test_settings_that_cannot_be_meant(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    for settings, words in (
        ({"device": "gpu"}, "expected cpu, cuda"),
        ({"backend": "tensorflow"}, "expected one of auto, onnxruntime"),
        ({"threads": 0}, "threads"),
    ):
        with pytest.raises(UsageError, match=words):
            open_backend(path, EngineOptions(**settings))  # type: ignore[arg-type]


def test_two_builds_of_onnx_runtime(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "onnxruntime-gpu" else real(name))
    with pytest.raises(
        BackendUnavailableError,
        match=r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'cellseg-deploy\[cpu\]'",
    ):
        open_backend(onnx_file())


def test_no_onnx_runtime(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'cellseg-deploy\[cpu\]'"):
        open_backend(onnx_file())


def test_engine_errors_become_ours(onnx_file: OnnxFile) -> None:
    backend = module.OnnxRuntimeBackend(onnx_file(), threads=1)

    class Session:
        message = ""

        def run(self, *_: Any) -> Any:
            raise RuntimeError(self.message)

    backend._session = Session()
    Session.message = "Failed to allocate memory for requested buffer of size 9"
    with pytest.raises(MemoryError, match="2 tiles"):
        backend.predict(random_tiles(2))
    Session.message = "Non-zero status code\nwhile running"
    with pytest.raises(DataError, match=r"Non-zero status code$"):
        backend.predict(random_tiles(2))
