"""I/O binding and providers of ONNX Runtime. Binding is the same code for any device, so it runs on the CPU here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, make_spec

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.onnxruntime_binding import (
    RECORD_ASSIGNMENT,
    BoundSession,
    heavy_on_cpu,
    nodes_by_provider,
    summary,
)
from cellseg_deploy.errors import BackendUnavailableError

ort = pytest.importorskip("onnxruntime")
OnnxFile = Callable[..., Path]


def tiles(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 56, 56, 3), np.uint8)


@pytest.fixture
def session(onnx_file: OnnxFile) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    return ort.InferenceSession(onnx_file().read_bytes(), options, providers=["CPUExecutionProvider"])


def test_bound_memory_gives_the_same_answers(session: Any) -> None:
    bound = BoundSession(ort, session, make_spec(), device_type="cpu")
    answers = [(given, bound.run(given)) for given in (tiles(4), tiles(4, 1), tiles(3, 2), tiles(4, 3))]
    for given, got in answers:  # all of them, in the end: no call wrote over the answer of another
        assert got == pytest.approx(DarknessBackend().predict(given), abs=1e-5)
        assert got.dtype == np.float32


def test_memory_is_kept_for_two_batch_sizes(session: Any) -> None:
    made = []
    real = ort.OrtValue.ortvalue_from_shape_and_type

    def count(*arguments: Any) -> Any:
        made.append(arguments)
        return real(*arguments)

    runtime = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=count))
    bound = BoundSession(runtime, session, make_spec(), device_type="cpu")
    for n in (4, 4, 1, 4, 1, 4):
        bound.run(tiles(n))
    assert bound.batch_sizes == (1, 4)
    assert made[0] == ((4, 56, 56, 3), np.uint8, "cpu", 0)
    assert made[1] == ((4, 1, 56, 56), np.float32, "cpu", 0)
    assert len(made) == 4
    bound.run(tiles(2))
    assert bound.batch_sizes == (4, 2)


def test_nodes_are_counted_by_provider(session: Any) -> None:
    nodes = nodes_by_provider(session)
    assert nodes == {"CPUExecutionProvider": Counter(Cast=1, Transpose=1, Conv=1, Sigmoid=1)}
    assert summary(nodes) == {"CPUExecutionProvider": 4}
    assert heavy_on_cpu(nodes) == ["1 Conv", "1 Sigmoid"]
    assert heavy_on_cpu({"CUDAExecutionProvider": Counter(Conv=3), "CPUExecutionProvider": Counter(Gather=2)}) == []
    assert nodes_by_provider(SimpleNamespace()) == {}


class GpuSession:
    """A session that says it has a GPU, runs on the CPU, and shares the nodes out as ``cpu_nodes`` says."""

    cpu_nodes: tuple[str, ...] = ("Gather",)
    opened: dict[str, Any]

    def __init__(self, data: bytes, sess_options: Any, providers: list[Any], enable_fallback: int) -> None:
        assert enable_fallback == 0
        type(self).opened = {"options": sess_options, "providers": providers}
        self._providers = [*(name for name, _ in providers), "CPUExecutionProvider"]
        self._real = REAL_SESSION(data, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(provider: str, kinds: tuple[str, ...]) -> Any:
            return SimpleNamespace(
                ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in kinds]
            )

        return [part(self._providers[0], ("Conv", "Sigmoid")), part("CPUExecutionProvider", self.cpu_nodes)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


REAL_SESSION = ort.InferenceSession


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[GpuSession]:
    """ONNX Runtime on a machine with a GPU, as far as its answers go; device memory is host memory."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(ort, "InferenceSession", GpuSession)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(GpuSession, "cpu_nodes", ("Gather",))
    real = BoundSession.__init__

    def on_cpu(self: BoundSession, *arguments: Any, device_type: str, device_id: int) -> None:
        assert (device_type, device_id) == ("cuda", 1)
        real(self, *arguments, device_type="cpu")

    monkeypatch.setattr(BoundSession, "__init__", on_cpu)
    return GpuSession


def open_on_gpu(path: Path) -> Any:
    return open_backend(path, EngineOptions(backend="onnxruntime", device="cuda:1"))


def test_cuda_runs_through_bound_memory(onnx_file: OnnxFile, gpu: type[GpuSession]) -> None:
    with open_on_gpu(onnx_file()) as backend:
        assert backend.predict(tiles(5)) == pytest.approx(DarknessBackend().predict(tiles(5)), abs=1e-5)
        assert backend._bound.batch_sizes == (5,)
        assert backend.device == "cuda:1"
        facts = backend.describe()
    assert gpu.opened["providers"] == [
        ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"})
    ]
    assert facts["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert facts["nodes_by_provider"] == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}


def test_work_left_to_the_cpu_is_refused(onnx_file: OnnxFile, gpu: type[GpuSession]) -> None:
    gpu.cpu_nodes = ("Gather", "Softmax", "Conv", "Conv")
    with pytest.raises(
        BackendUnavailableError, match=r"'cuda:1' was requested.*would run 2 Conv, 1 Softmax on the CPU"
    ):
        open_on_gpu(onnx_file())


def test_a_provider_that_gave_way_is_refused(
    onnx_file: OnnxFile, gpu: type[GpuSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GpuSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="could only open CPUExecutionProvider"):
        open_on_gpu(onnx_file())


def test_a_library_that_is_missing_is_named(
    onnx_file: OnnxFile, gpu: type[GpuSession], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ONNX Runtime falls back without a word where its provider's library cannot be loaded; the linker knows why."""
    monkeypatch.setattr(GpuSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_shared.so").write_bytes(b"not a library")
    with pytest.raises(
        BackendUnavailableError, match=r"open CPUExecutionProvider \(libonnxruntime_providers_shared\.so"
    ):
        open_on_gpu(onnx_file())


CUDA_SAYS = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<THRW, void, Status> "
    "onnxruntime::CudaCall(...) [with ERRTYPE = cudaError] CUDA failure 100: no CUDA-capable device is detected ; "
    "GPU=-1 ; hostname=somewhere ; file=cuda_execution_provider.cc ; line=282 ; expr=cudaSetDevice(0);"
)


def test_the_reason_is_in_the_error_and_nothing_on_stdout(
    onnx_file: OnnxFile, gpu: type[GpuSession], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class NoDevice(REAL_SESSION):  # ONNX Runtime's own Python around a provider that fails
        def _create_inference_session(self, providers: Any, *rest: Any) -> None:
            if providers[0][0] == "CUDAExecutionProvider":
                raise RuntimeError(CUDA_SAYS)
            super()._create_inference_session(providers, *rest)

    monkeypatch.setattr(ort, "InferenceSession", NoDevice)
    with pytest.raises(
        BackendUnavailableError, match="CUDA failure 100: no CUDA-capable device is detected;"
    ) as caught:
        open_on_gpu(onnx_file())
    assert "hostname" not in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
def test_gpu_answers_are_those_of_the_network(onnx_file: OnnxFile) -> None:
    try:
        backend = open_backend(onnx_file(), EngineOptions(backend="onnxruntime", device="cuda"))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    with backend:
        for n in (1, 8, 11):
            assert backend.predict(tiles(n)) == pytest.approx(DarknessBackend().predict(tiles(n)), abs=1e-4)
