"""The TensorRT backend on a GPU of plain Python: buffers, batches, graphs, refusals, the cache. And on a real one, if
there is any."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_onnx, make_spec
from fake_tensorrt import ErrorCode, FakeCuda, make_tensorrt
from PIL import Image

from cellseg_deploy.backends import EngineOptions, cuda_runtime, open_backend
from cellseg_deploy.backends import tensorrt as module
from cellseg_deploy.backends.cuda_runtime import Cuda, PinnedBuffers, parse_device
from cellseg_deploy.backends.tensorrt import TensorRTBackend, build_to, open_device
from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.backends.tensorrt_build import BuildOptions
from cellseg_deploy.backends.tensorrt_sidecar import EngineSidecar, read_sidecar, sidecar_path, write_sidecar
from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file, write_spec

pytest.importorskip("onnx")

OnnxFile = Callable[..., Path]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuda]:
    """A machine with a GPU, TensorRT 10 and an empty cache; whatever was allocated must be free in the end."""
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    yield fake
    assert (fake.memory, fake.streams, fake.graphs) == ({}, set(), {})


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, version: str = "10.13.0.35") -> Any:
    trt = make_tensorrt(cuda, version)
    monkeypatch.setattr(cuda_runtime, "import_bindings", lambda: cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


def fake_trt() -> Any:
    return sys.modules["tensorrt"]


def tiles(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 56, 56, 3), np.uint8)


def build(onnx: Path, engine: Path, profile: BatchProfile | None = None, **options: Any) -> Path:
    trt, _, here = open_device(0)
    settings = BuildOptions(profile=profile or BatchProfile(1, 4, 4), **options)
    build_to(trt, read_model_file(onnx), here, settings, engine, parity="verified: in a test")
    return engine


@pytest.fixture
def engine(cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path) -> Path:
    return build(onnx_file(), tmp_path / "model.engine")


def test_cuda_graphs_are_tensorrt_s(engine: Path, onnx_file: OnnxFile) -> None:
    for graph in (False, True):
        with open_backend(engine, EngineOptions(cuda_graph=graph)) as backend:
            assert backend.describe()["cuda_graph"] is graph
    with pytest.raises(UsageError, match="`cuda_graph` belongs to `backend='tensorrt'`, not to onnxruntime"):
        open_backend(onnx_file(), EngineOptions(backend="onnxruntime", cuda_graph=True))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("profile", [BatchProfile(1, 4, 4), BatchProfile(4, 4, 4), BatchProfile(1, 1, 1)])
def test_answers_are_those_of_the_network(
    cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path, profile: BatchProfile, graph: bool
) -> None:
    path = build(onnx_file(), tmp_path / "model.engine", profile)
    with TensorRTBackend(path, cuda_graph=graph) as backend:
        for n in (1, 4, 6, 9, 1, 8):
            given = tiles(n)
            got = backend.predict(given)
            assert got == pytest.approx(DarknessBackend().predict(given), abs=1e-6)
        again = backend.predict(tiles(4))
        assert backend.predict(tiles(8)) is not again
        assert again == pytest.approx(DarknessBackend().predict(tiles(4)), abs=1e-6), "a later call overwrote it"
    assert set(fake_trt().batches) <= set(range(profile.min, profile.max + 1))
    assert backend.batch_step == (profile.max if profile.min == profile.max else 1)


def test_the_last_partial_batch_is_run_as_it_is_or_filled_up(
    cuda: FakeCuda, onnx_file: OnnxFile, tmp_path: Path
) -> None:
    for profile, expected in ((BatchProfile(1, 4, 4), [4, 4, 2]), (BatchProfile(3, 4, 4), [4, 4, 3])):
        path = build(onnx_file(), tmp_path / "model.engine", profile)
        with TensorRTBackend(path) as backend:
            fake_trt().batches.clear()
            backend.predict(tiles(10))
            assert not backend._tiles.host[2 : expected[-1]].any(), "filled up with what an earlier call left there"
        assert fake_trt().batches == expected


def test_a_graph_replays_the_full_batch_and_leaves_the_others_alone(cuda: FakeCuda, engine: Path) -> None:
    with TensorRTBackend(engine, cuda_graph=True) as backend:
        fake_trt().batches.clear()
        backend.predict(tiles(12))
        assert fake_trt().batches == [4, 4]  # once for real, once to record
        assert cuda.log.count("cudaGraphLaunch") == 3
        backend.predict(tiles(6))
        assert fake_trt().batches == [4, 4, 2]
        assert cuda.log.count("cudaGraphInstantiate") == 1


def test_each_thread_selects_the_gpu(cuda: FakeCuda, engine: Path) -> None:
    with TensorRTBackend(engine) as backend:
        cuda.log.clear()
        backend.predict(tiles(1))
        assert cuda.log[0] == "cudaSetDevice"


def test_what_it_says_of_itself(cuda: FakeCuda, engine: Path) -> None:
    with open_backend(engine) as backend:
        assert (backend.name, backend.device, backend.precision) == ("tensorrt", "cuda:0", "fp32")
        assert (backend.verified, backend.choice, backend.spec.parity) == (True, *["verified: in a test"] * 2)
        facts = backend.describe()
    assert facts["gpu"] == "Fake RTX"
    assert (facts["compute_capability"], facts["cuda"]) == ("8.6", "13.5")
    assert facts["batch_profile"] == "1/4/4"
    assert len(facts["engine_sha256"]) == len(facts["model_identity"]) == 64


# --- refusals


@pytest.mark.reliability
@pytest.mark.parametrize("change", ["gpu", "tensorrt", "hash", "no description"])
def test_a_run_with_an_engine_of_another_machine_stops_before_work(
    change: str, cuda: FakeCuda, engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(tmp_path / "in" / "a.png")
    words = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(engine), "--backend", "tensorrt", "-q"]
    assert console.run(command, [*words[:2], str(tmp_path / "first"), *words[3:]]) == 0  # here it runs
    if change == "gpu":
        cuda.gpus = (("Other RTX", 8, 9),)
    elif change == "tensorrt":
        fake_trt().__version__ = "10.14.0"
    elif change == "hash":
        engine.write_bytes(engine.read_bytes() + b"!")
    else:
        sidecar_path(engine).unlink()
    opened = len(fake_trt().opened)
    capfd.readouterr()
    assert console.run(command, words) == 5
    said = capfd.readouterr().err
    assert said.startswith(f"error: {engine}")
    assert said.count("\n") == 1
    assert len(fake_trt().opened) == opened  # an engine is a program: it is not even looked into
    assert not (tmp_path / "out").exists()


@pytest.mark.reliability
def test_an_engine_is_not_opened_before_it_was_checked(cuda: FakeCuda, engine: Path) -> None:
    trt = fake_trt()
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="SHA-256"):
        TensorRTBackend(engine)
    engine.write_bytes(whole)
    other = engine.rename(engine.with_name("renamed.engine"))
    with pytest.raises(ModelError, match=r"renamed\.engine\.json: the description of the engine is missing"):
        TensorRTBackend(other)
    other.rename(engine)
    trt.__version__ = "10.14.0"
    with pytest.raises(
        ModelError, match=r"TensorRT 10\.13\.0\.35, this machine has 10\.14\.0.*cellseg-export tensorrt"
    ):
        TensorRTBackend(engine)
    trt.__version__ = "10.13.0.35"
    cuda.gpus = (("Other RTX", 8, 9),)
    with pytest.raises(ModelError, match=r"not for this machine.*Other RTX"):
        TensorRTBackend(engine)
    assert trt.opened == []


def test_an_engine_that_is_not_what_its_description_says(
    cuda: FakeCuda, onnx_file: OnnxFile, engine: Path, tmp_path: Path
) -> None:
    sidecar = read_sidecar(engine)
    write_sidecar(engine, msgspec.structs.replace(sidecar, profile=BatchProfile(1, 4, 64)))
    with pytest.raises(ModelError, match="its description says batches of 1/4/64"):
        TensorRTBackend(engine)
    write_sidecar(engine, msgspec.structs.replace(sidecar, spec=make_spec(tile_size=112)))
    with pytest.raises(ModelError, match="not those of its description"):
        TensorRTBackend(engine)


def test_none_and_false_are_errors(cuda: FakeCuda, engine: Path) -> None:
    behaviour = fake_trt().behaviour
    behaviour.deserialises = False
    with pytest.raises(ModelError, match="cannot open this engine: magic tag does not match"):
        TensorRTBackend(engine)
    behaviour.deserialises, behaviour.context = True, False
    with pytest.raises(MemoryError, match="could not create a context"):
        TensorRTBackend(engine)
    behaviour.context = True
    with TensorRTBackend(engine) as backend:
        behaviour.runs = False
        with pytest.raises(DataError, match="could not run 2 tiles"):
            backend.predict(tiles(2))
        behaviour.runs = True
        cuda.fail = {"cudaMemcpyAsync"}
        with pytest.raises(DataError, match="cudaMemcpyAsync: reason of cudaErrorInvalidValue"):
            backend.predict(tiles(2))
        cuda.fail = {"cudaStreamSynchronize"}
        with pytest.raises(DataError, match="cudaStreamSynchronize"):
            backend.predict(tiles(2))
        cuda.fail = set()
        assert backend.predict(tiles(2)) == pytest.approx(DarknessBackend().predict(tiles(2)), abs=1e-6)
        behaviour.gain = np.nan
        with pytest.raises(DataError, match="NaN"):
            backend.predict(tiles(2))


@pytest.mark.parametrize("kind", ["pinned", "device"])
@pytest.mark.parametrize("free", [37_631, 37_632, 87_807])  # tiles take 37,632 bytes, probabilities 50,176
def test_no_memory_leaves_nothing_behind(cuda: FakeCuda, engine: Path, kind: str, free: int) -> None:
    cuda.free_bytes[kind] = free
    with pytest.raises(MemoryError, match=r"out of GPU memory \(cuda(HostAlloc|Malloc): reason"):
        open_backend(engine)
    cuda.free_bytes[kind] = 87_808
    open_backend(engine).close()


def test_without_gpu_bindings_or_tensorrt(monkeypatch: pytest.MonkeyPatch, onnx_file: OnnxFile, cuda: FakeCuda) -> None:
    path = onnx_file()
    for device, words in (("cpu", "expected cuda or cuda:N"), ("cuda:x", "expected cuda"), ("gpu", "expected cuda")):
        with pytest.raises(UsageError, match=words):
            open_backend(path, EngineOptions(backend="tensorrt", device=device))
    with pytest.raises(BackendUnavailableError, match="last GPU here is cuda:0"):
        open_backend(path, EngineOptions(backend="tensorrt", device="cuda:3"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=r"cellseg-deploy\[tensorrt\]"):
        open_backend(path, EngineOptions(backend="tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    with pytest.raises(BackendUnavailableError, match="without its libraries"):
        open_backend(path, EngineOptions(backend="tensorrt"))
    cuda.gpus = ()
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA GPU can be used here.*NoDevice"):
        open_backend(path, EngineOptions(backend="tensorrt"))


def test_files_that_are_no_engines(cuda: FakeCuda, tmp_path: Path, engine: Path) -> None:
    with pytest.raises(UsageError, match="expected an engine"):
        TensorRTBackend(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        TensorRTBackend(tmp_path / "missing.engine")
    with pytest.raises(UsageError, match="cannot be built from itself"):
        TensorRTBackend(engine, rebuild=True)


# --- cache


def test_an_onnx_model_is_built_once(cuda: FakeCuda, onnx_file: OnnxFile, caplog: pytest.LogCaptureFixture) -> None:
    path, trt = onnx_file(make_spec(parity="verified: the .onnx, not its engine")), fake_trt()
    with open_backend(path, EngineOptions(backend="tensorrt")) as backend:
        assert backend.predict(tiles(3)) == pytest.approx(DarknessBackend().predict(tiles(3)), abs=1e-6)
        assert backend.spec.parity.startswith("unverified: built by cellseg-infer")
        assert not backend.verified
    assert len(trt.builds) == 1
    assert "cellseg-export tensorrt" in caplog.text
    caplog.clear()
    # Calibrated: the same network.
    write_spec(path, make_spec(name="stub", cell_diameter_px=30.0, parity="verified: the .onnx"))
    with open_backend(path, EngineOptions(backend="tensorrt")) as backend:
        assert backend.spec.cell_diameter_px == 30.0
        assert backend.spec.parity.startswith("unverified")
    assert len(trt.builds) == 1
    assert caplog.text == ""
    with open_backend(path, EngineOptions(backend="tensorrt", rebuild=True)):
        assert len(trt.builds) == 2


def test_another_network_gpu_or_tensorrt_is_another_engine(
    cuda: FakeCuda, onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = set()
    for change in (None, "network", "gpu", "tensorrt", "options"):
        options = BuildOptions(workspace_mib=64) if change == "options" else None
        model = make_onnx(contrast=9.0) if change == "network" else None
        if change == "gpu":
            cuda.gpus = (("Other RTX", 8, 6),)
        if change == "tensorrt":
            install(monkeypatch, cuda, "11.4.0.106")
        with TensorRTBackend(onnx_file(model=model), options=options) as backend:
            paths.add(backend.engine_path)
    assert len(paths) == 5


def test_a_damaged_engine_in_the_cache_is_refused_until_rebuilt(cuda: FakeCuda, onnx_file: OnnxFile) -> None:
    path = onnx_file()
    with open_backend(path, EngineOptions(backend="tensorrt")) as backend:
        engine = backend.engine_path  # type: ignore[attr-defined]
    for damage in (lambda: engine.write_bytes(b"x"), lambda: sidecar_path(engine).write_text("{}"), engine.unlink):
        damage()
        with pytest.raises(ModelError):
            open_backend(path, EngineOptions(backend="tensorrt"))
        with open_backend(path, EngineOptions(backend="tensorrt", rebuild=True)) as backend:
            assert backend.predict(tiles(1)).shape == (1, 1, 56, 56)
    write_sidecar(engine, msgspec.structs.replace(read_sidecar(engine), model_identity="0" * 64))
    with pytest.raises(ModelError, match="from another network; build it again with `rebuild=True`"):
        open_backend(path, EngineOptions(backend="tensorrt"))
    engine.write_bytes(b"x")
    with pytest.raises(ModelError, match="`rebuild=True`"):
        open_backend(path, EngineOptions(backend="tensorrt"))


@pytest.mark.reliability
@pytest.mark.parametrize("rebuild", [False, True])
def test_two_that_build_one_engine_do_not_collide(
    cuda: FakeCuda, onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, rebuild: bool
) -> None:
    """The second comes while the first builds. A lock is of an opened file, so threads stand for processes here."""
    trt, model = fake_trt(), read_model_file(onnx_file())
    _, _, here = open_device(0)
    building, may_end = threading.Event(), threading.Event()
    finish = trt.Builder.build_serialized_network

    def build_slowly(builder: Any, network: Any, config: Any) -> bytes:
        if building.is_set() and not rebuild:
            may_end.set()  # both build: neither may be left waiting
        building.set()
        assert may_end.wait(60)
        engine: bytes = finish(builder, network, config)
        return engine

    def warned(text: str, *_: object) -> None:
        if "waiting for it" in text:
            may_end.set()

    def want(_: int) -> tuple[Path, EngineSidecar, bytes]:
        return module.cached_engine(trt, model, here, BuildOptions(), rebuild=rebuild)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_slowly)
    monkeypatch.setattr(module._log, "warning", warned)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(want, 1)
        assert building.wait(60)
        second = pool.submit(want, 2)
        found = [first.result(), second.result()]
    assert len(trt.builds) == (2 if rebuild else 1)
    for _, sidecar, data in found:
        assert hashlib.sha256(data).hexdigest() == sidecar.engine_sha256
    ((path, _, _), _) = found
    assert read_sidecar(path).engine_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {file.name for file in path.parent.iterdir()} == {path.name, sidecar_path(path).name}


def test_a_build_that_was_cut_off_is_done_again(cuda: FakeCuda, onnx_file: OnnxFile) -> None:
    path = onnx_file()
    with open_backend(path, EngineOptions(backend="tensorrt")) as backend:
        engine = backend.engine_path  # type: ignore[attr-defined]
    sidecar_path(engine).unlink()  # it is written last
    engine.write_bytes(b"half")
    with open_backend(path, EngineOptions(backend="tensorrt")) as backend:
        assert backend.predict(tiles(1)).shape == (1, 1, 56, 56)
    assert len(fake_trt().builds) == 2


# --- CUDA's own bindings


def test_the_fake_has_the_names_and_arguments_of_the_real_bindings() -> None:
    """So that what passes with the fake at least calls functions that exist."""
    rt = pytest.importorskip("cuda.bindings.runtime", reason="NVIDIA's CUDA bindings are not installed")
    for name in dir(FakeCuda):
        if name.startswith("cuda"):
            assert hasattr(rt, name), name
    for code in ErrorCode:
        assert int(getattr(rt.cudaError_t, code.name)) == code
    for names in (FakeCuda.cudaMemcpyKind, FakeCuda.cudaStreamCaptureMode):
        owner = "cudaMemcpyKind" if names is FakeCuda.cudaMemcpyKind else "cudaStreamCaptureMode"
        assert all(hasattr(getattr(rt, owner), name) for name in vars(names))
    assert hasattr(rt.cudaDeviceProp(), "totalGlobalMem")


def test_real_bindings_without_a_gpu_are_one_clear_sentence() -> None:
    rt = pytest.importorskip("cuda.bindings.runtime", reason="NVIDIA's CUDA bindings are not installed")
    if rt.cudaGetDeviceCount()[0] == rt.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU can be used here") as caught:
        Cuda(0)
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert parse_device("cuda") == 0
    assert parse_device("cuda:12") == 12


def test_pinned_buffers_are_host_memory(cuda: FakeCuda) -> None:
    with_gpu = Cuda(0)
    buffers = PinnedBuffers(with_gpu, (2, 3), np.float32)
    buffers.host[:] = 1.5
    assert cuda.memory[buffers.host_address][0] == "pinned"
    assert np.frombuffer(bytes(cuda.memory[buffers.host_address][1]), np.float32).tolist() == [1.5] * 6
    buffers.close()


# --- a real GPU


@pytest.fixture
def real_gpu() -> None:
    try:
        open_device(0)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.usefixtures("real_gpu")
@pytest.mark.parametrize("graph", [False, True])
def test_gpu_answers_are_those_of_the_network(onnx_file: OnnxFile, tmp_path: Path, graph: bool) -> None:
    path = build(onnx_file(), tmp_path / "model.engine")
    with TensorRTBackend(path, cuda_graph=graph) as backend:
        for n in (1, 4, 6, 9):
            assert backend.predict(tiles(n)) == pytest.approx(DarknessBackend().predict(tiles(n)), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.usefixtures("real_gpu")
def test_gpu_batch_one_equals_batch_four(onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = build(onnx_file(), tmp_path / "model.engine", BatchProfile(4, 4, 4))
    given = tiles(8)
    with TensorRTBackend(path) as backend:
        together = backend.predict(given)
        assert np.array_equal(together, np.concatenate([backend.predict(given[i : i + 1]) for i in range(8)]))
