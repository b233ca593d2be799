"""OpenVINO: the same answers as ONNX Runtime for any batch, threads and streams; broken files are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_onnx, make_spec

from cellseg_deploy.backends import EngineOptions, open_backend, openvino_ir
from cellseg_deploy.backends import openvino as module
from cellseg_deploy.backends.openvino import OpenVinoBackend
from cellseg_deploy.backends.openvino_cache import CompiledCache
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.spec import to_json
from cellseg_deploy.segmenter import Segmenter

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'cellseg-deploy[openvino]'")

OnnxFile = Callable[..., Path]
NATIVE_BF16 = "BF16" in module.shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not NATIVE_BF16, reason="this CPU has no bf16 instructions")
PRECISIONS = ["fp32", pytest.param("bf16", marks=needs_bf16)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of one block and random weights, on 4 x 4 patches."""
    path = tmp_path_factory.mktemp("vit") / "vit.onnx"
    path.write_bytes(make_transformer().SerializeToString())
    return path


def make_transformer(width: int = 32, patch: int = 14, size: int = 56) -> Any:
    """onnx.ModelProto: patches -> LayerNorm -> attention -> pixels, with the input and output of a model file."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    n = (size // patch) ** 2
    weights = {
        "scale": np.float32(1 / 64),
        "shift": np.float32(-2),
        "embed": rng.normal(0, 0.1, (width, 3, patch, patch)),
        "gain": rng.uniform(0.5, 1.5, width),
        **{name: rng.normal(0, 0.3, (width, width)) for name in ("wq", "wk", "wv")},
        "head": rng.normal(0, 0.3, (width, patch * patch)),
        "tokens": np.array([0, width, n], np.int64),
        "grid": np.array([0, patch * patch, size // patch, size // patch], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["tiles"], ["f"], to=TensorProto.FLOAT),
        node("Transpose", ["f"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Mul", ["nchw", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["image"]),
        node("Conv", ["image", "embed"], ["patches"], strides=[patch, patch]),
        node("Reshape", ["patches", "tokens"], ["rows"]),
        node("Transpose", ["rows"], ["x"], perm=[0, 2, 1]),
        node("LayerNormalization", ["x", "gain"], ["normed"]),
        *(node("MatMul", ["normed", f"w{name}"], [name]) for name in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Softmax", ["scores"], ["attention"], axis=-1),
        node("MatMul", ["attention", "v"], ["mixed"]),
        node("Add", ["x", "mixed"], ["y"]),
        node("MatMul", ["y", "head"], ["pixels"]),
        node("Transpose", ["pixels"], ["planes"], perm=[0, 2, 1]),
        node("Reshape", ["planes", "grid"], ["planes4"]),
        node("DepthToSpace", ["planes4"], ["logits"], blocksize=patch),
        node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(a, a.dtype if np.asarray(a).dtype == np.int64 else np.float32), name)
        for name, a in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", size, size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 1, size, size])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.metadata_props.add(key="cellseg", value=to_json(make_spec()))
    return model


def random_tiles(n: int, size: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


# --- answers


def test_runs_the_network(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    with OpenVinoBackend(path, threads=1) as backend:
        tiles = random_tiles(5)
        assert backend.predict(tiles) == pytest.approx(DarknessBackend().predict(tiles), abs=1e-5)
        assert (backend.name, backend.device, backend.precision) == ("openvino", "cpu", "fp32")
        facts = backend.describe()
        assert facts["openvino"] == ov.__version__
        assert facts["model_identity"] == read_model_file(path).identity
        assert facts["inference_precision"] == "fp32"


def test_a_segmenter_counts_with_it(onnx_file: OnnxFile) -> None:
    with Segmenter(OpenVinoBackend(onnx_file(), threads=1)) as segmenter:
        assert segmenter(draw_discs((100, 100), [(30, 30), (70, 60)])).count == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_batch_size_thread_or_stream_changes_an_answer(vit: Path, precision: str) -> None:
    tiles = random_tiles(16)
    with OpenVinoBackend(vit, threads=1, precision=precision) as one:
        together = one.predict(tiles)
        assert together.std() > 0.01  # a constant answer would be equal to itself
        for batch in (1, 3, 4):
            parts = [one.predict(tiles[i : i + batch]) for i in range(0, 16, batch)]
            assert np.array_equal(np.concatenate(parts), together), batch
    with OpenVinoBackend(vit, threads=2, precision=precision) as two:
        assert np.array_equal(two.predict(tiles), together)
    with OpenVinoBackend(vit, threads=2, streams=2, precision=precision) as streams:
        assert np.array_equal(streams.predict(tiles[:13]), together[:13])
        assert (one.batch_step, streams.batch_step) == (4, 8)  # tiles that cost as much as one


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_fills_a_batch_does_not_matter(vit: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = random_tiles(5)
    with OpenVinoBackend(vit, threads=1, precision=precision) as backend:
        black = backend.predict(tiles)
        noise = np.random.default_rng(1).integers(0, 256, (4, *tiles.shape[1:]), np.uint8)
        monkeypatch.setattr(
            module, "_filled", lambda given, batch: np.concatenate([given, noise])[:batch].astype(np.uint8)
        )
        assert np.array_equal(backend.predict(tiles), black)


def test_agrees_with_onnx_runtime(vit: Path) -> None:
    pytest.importorskip("onnxruntime")
    tiles = random_tiles(3)
    with (
        open_backend(vit, EngineOptions(backend="onnxruntime", threads=1)) as reference,
        OpenVinoBackend(vit, threads=1) as backend,
    ):
        expected = reference.predict(tiles)
        assert expected.std() > 0.01
        assert np.abs(backend.predict(tiles) - expected).max() < 1e-4


@needs_bf16
def test_bf16_is_never_taken_unasked_and_reported(vit: Path) -> None:
    tiles = random_tiles(2)
    with OpenVinoBackend(vit, threads=1) as exact, OpenVinoBackend(vit, threads=1, precision="bf16") as rounded:
        assert (exact.precision, rounded.precision) == ("fp32", "bf16")
        assert rounded.describe()["inference_precision"] == "bf16"
        difference = np.abs(exact.predict(tiles) - rounded.predict(tiles)).max()
        assert 1e-4 < difference < 0.2  # bf16 in deed and not in name only, and still the same network


def test_bf16_on_a_cpu_without_it_is_refused(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCore:
        def get_property(self, device: str, name: str) -> Any:
            return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else core.get_property(device, name)

    core = module.shared_core()
    monkeypatch.setattr(module, "shared_core", OldCore)
    with pytest.raises(BackendUnavailableError, match=r"has no bf16 instructions .* `precision='fp32'`"):
        OpenVinoBackend(onnx_file(), precision="bf16")


def test_an_engine_that_takes_another_precision_is_refused(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._HINTS, "fp32", "f16")  # what the engine is told, and answers, is not f32
    backend = OpenVinoBackend.__new__(OpenVinoBackend)
    backend.spec, backend.inference_precision = make_spec(), "fp32"
    backend._threads, backend._streams, backend._batch, backend._version = 1, 1, 1, "1"

    class Compiled:
        def get_property(self, name: str) -> Any:
            return ov.Type.f32

    class Core:
        def compile_model(self, *_: Any) -> Compiled:
            return Compiled()

    class Model:
        def reshape(self, shape: Any) -> None: ...

    with pytest.raises(BackendUnavailableError, match="computes in f32"):
        backend._compile(Core(), Model(), None, False)


# --- cache


def test_compiled_networks_are_kept_for_this_user(vit: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = random_tiles(2)
    folder = own_cache / "cellseg-deploy" / "openvino"
    with OpenVinoBackend(vit, threads=1) as first:
        expected = first.predict(tiles)
    kept = sorted(path.name for path in folder.iterdir())
    assert len(kept) == 1
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(CompiledCache, "keep", pytest.fail)  # it was not compiled again
    with OpenVinoBackend(vit, threads=1) as second:
        assert np.array_equal(second.predict(tiles), expected)
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_another_setting_is_another_compiled_network(vit: Path, own_cache: Path) -> None:
    for threads, batch in ((1, 4), (1, 2), (2, 4)):
        OpenVinoBackend(vit, threads=threads, static_batch=batch).close()
    assert len(list((own_cache / "cellseg-deploy" / "openvino").iterdir())) == 3


@pytest.mark.reliability
@pytest.mark.parametrize("damage", ["a flipped byte", "4 kB flipped", "cut", "empty", "another network"])
def test_a_compiled_network_that_is_not_whole_is_compiled_again(
    vit: Path, own_cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    tiles = random_tiles(2)
    with OpenVinoBackend(vit, threads=1) as first:
        expected = first.predict(tiles)
    (kept,) = (own_cache / "cellseg-deploy" / "openvino").iterdir()
    whole = kept.read_bytes()
    broken = bytearray(whole)
    middle = len(broken) // 2
    changes = {"a flipped byte": slice(middle, middle + 1), "4 kB flipped": slice(middle, middle + 4096)}
    if damage in changes:
        broken[changes[damage]] = bytes(byte ^ 255 for byte in broken[changes[damage]])
    kept.write_bytes({"cut": whole[:middle], "empty": b"", "another network": whole[:32] + b"x"}.get(damage, broken))
    with OpenVinoBackend(vit, threads=1) as second:
        assert np.array_equal(second.predict(tiles), expected)
    assert "its bytes differ from those written; compiling it again" in caplog.text
    assert kept.read_bytes()[32:]
    with OpenVinoBackend(vit, threads=1) as third:  # the new one is good
        assert np.array_equal(third.predict(tiles), expected)


@pytest.mark.reliability
def test_a_compiled_network_that_ends_the_process_is_not_opened_twice(
    vit: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    OpenVinoBackend(vit, threads=1).close()
    (kept,) = (own_cache / "cellseg-deploy" / "openvino").iterdir()
    program = (
        "import os, sys; from pathlib import Path\n"
        "from cellseg_deploy.backends.openvino_cache import CompiledCache\n"
        "CompiledCache(Path(sys.argv[1])).open(lambda _: os.abort())"
    )
    done = subprocess.run([sys.executable, "-c", program, kept], check=False, capture_output=True, timeout=60)
    assert done.returncode < 0
    left = sorted(path.suffix for path in kept.parent.iterdir())
    assert left == [".compiled", ".opening", ".opening-lock"]
    OpenVinoBackend(vit, threads=1).close()
    assert "an earlier start did not finish opening it" in caplog.text
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.reliability
@pytest.mark.parametrize("end", ["killed", "well"])
def test_a_compiled_network_that_another_process_is_opening_is_opened_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """Two runs that start together: no warning, and nothing is discarded. Once the other was killed, it is."""
    cache = CompiledCache(tmp_path / "a.compiled")
    cache.keep(b"network")
    program = (
        "import sys; from pathlib import Path\n"
        "from cellseg_deploy.backends.openvino_cache import CompiledCache\n"
        "CompiledCache(Path(sys.argv[1])).open(lambda _: (print('opening', flush=True), input()))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, cache.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "opening\n"
        assert cache.open(bytes) == b"network"
        assert cache.open(lambda _: cache.open(bytes)) == b"network"
        assert not caplog.records
        if end == "killed":
            other.kill()
        else:
            other.communicate("\n")
    assert cache.open(bytes) == (None if end == "killed" else b"network")
    assert bool(caplog.records) == (end == "killed")
    assert [path.name for path in tmp_path.iterdir()] == ([] if end == "killed" else ["a.compiled"])


def test_a_compiled_network_of_another_build_is_compiled_again(tmp_path: Path, caplog: Any) -> None:
    cache = CompiledCache(tmp_path / "a.compiled")
    assert cache.open(bytes) is None
    cache.keep(b"network")
    assert cache.open(bytes) == b"network"

    def refuse(_: bytes) -> None:
        raise RuntimeError("Exception from src")

    assert cache.open(refuse) is None
    assert "OpenVINO refuses it" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_used_is_said_and_done_without(
    onnx_file: OnnxFile, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_cache / "cellseg-deploy").write_text("a file where a folder should be")
    with OpenVinoBackend(onnx_file(), threads=1) as backend:
        backend.predict(random_tiles(1))
    assert "compiled networks are not cached" in caplog.text


# --- refused: what


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "GPU.0", "auto"])
def test_other_devices_are_not_available(onnx_file: OnnxFile, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match="runs on the CPU only"):
        OpenVinoBackend(onnx_file(), device=device)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"precision": "fp16"}, "unknown precision"), ({"streams": 0}, "streams"), ({"static_batch": 0}, "static batch")],
)
def test_settings_that_cannot_be_meant(onnx_file: OnnxFile, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OpenVinoBackend(onnx_file(), **settings)


def test_without_openvino_the_extra_is_named(onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'cellseg-deploy\[openvino\]'"):
        OpenVinoBackend(onnx_file())


def test_the_checks_of_model_files_come_first(tmp_path: Path) -> None:
    model = make_onnx()
    weight = np.full((1, 3, 1, 1), np.nan, np.float32)
    import onnx

    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    path = tmp_path / "nan.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="NaN"):
        OpenVinoBackend(path)


def test_an_operator_openvino_does_not_know(tmp_path: Path) -> None:
    model = make_onnx()
    model.graph.node[3].op_type, model.graph.node[3].domain = "Teleport", "com.example"
    model.opset_import.add(domain="com.example", version=1)
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"OpenVINO .* cannot read the model"):
        OpenVinoBackend(path)


def test_an_engine_failure_is_an_error_of_the_image(onnx_file: OnnxFile) -> None:
    class Broken:
        def __init__(self, text: str) -> None:
            self.text = text

        def start_async(self, _: Any) -> None:
            raise RuntimeError(self.text)

    with OpenVinoBackend(onnx_file(), threads=1) as backend:
        backend._requests = [Broken("Exception from src/x.cpp:1:\nthe primitive failed")]
        with pytest.raises(DataError, match="could not run 2 tiles: the primitive failed"):
            backend.predict(random_tiles(2))
        backend._requests = [Broken("std::bad_alloc")]
        with pytest.raises(MemoryError, match="2 tiles"):
            backend.predict(random_tiles(2))


# --- the .xml with its .bin


@pytest.fixture
def pair(onnx_file: OnnxFile, tmp_path: Path) -> Path:
    return write_pair(onnx_file(), tmp_path / "stub.xml")


def write_pair(onnx: Path, path: Path, **changes: Any) -> Path:
    """An .xml as the export writes it, with ``changes`` of its facts."""
    import hashlib

    import msgspec

    source = read_model_file(onnx)
    model = ov.Core().read_model(source.data)
    facts = openvino_ir.IrFacts(
        model_identity=source.identity, onnx_sha256=source.file_sha256, precision="fp32", weights="fp32"
    )
    ov.save_model(model, path, compress_to_fp16=False)
    digest = hashlib.sha256(path.with_suffix(".bin").read_bytes()).hexdigest()
    facts = msgspec.structs.replace(facts, bin_sha256=digest)
    openvino_ir.write_rt_info(model, source.spec, msgspec.structs.replace(facts, **changes))
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def test_the_pair_runs_as_the_onnx_does(pair: Path, onnx_file: OnnxFile) -> None:
    tiles = random_tiles(3)
    assert pair.read_text().count("spec_version") == 1  # that of the ONNX file is not carried along
    with OpenVinoBackend(pair, threads=1) as backend:
        assert backend.spec == make_spec()
        assert backend.predict(tiles) == pytest.approx(DarknessBackend().predict(tiles), abs=1e-5)
        assert backend.describe()["model_identity"] == read_model_file(onnx_file()).identity


def break_bin(path: Path) -> None:
    data = bytearray(path.with_suffix(".bin").read_bytes())
    data[data.index(np.float32(-1 / 24).tobytes())] ^= 1  # the last bit of a weight
    path.with_suffix(".bin").write_bytes(data)


def cut_bin(path: Path) -> None:
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:4])


def no_bin(path: Path) -> None:
    path.with_suffix(".bin").unlink()


def empty_xml(path: Path) -> None:
    path.write_bytes(b"")


def cut_xml(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text, "OpenVINO writes this .xml in another way"
        path.write_text(text.replace(old, new))

    return change


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_bin, "SHA-256 differs"),
        (cut_bin, "cannot read the model"),
        (no_bin, "no such file"),
        (empty_xml, "empty"),
        (cut_xml, "cannot read the model"),
        (edit("{&quot;spec_version", "{&quot;version"), "has no spec_version"),
        (edit("<cellseg>", "<other>"), "cannot read|no 'cellseg' section"),
        (edit("bin_sha256", "hash"), "SHA-256 differs|is invalid"),
        (edit("tile_size&quot;:56", "tile_size&quot;:70"), "expected tiles: u8 .\\?,70,70,3"),
    ],
)
def test_a_harmed_pair_is_refused(pair: Path, harm: Callable[[Path], None], words: str) -> None:
    harm(pair)
    with pytest.raises(ModelError, match=words):
        OpenVinoBackend(pair)


def test_weights_that_are_not_finite_are_refused(onnx_file: OnnxFile, tmp_path: Path) -> None:
    import onnx

    source = make_onnx()
    openvino_ir.check_finite(tmp_path, ov.Core().read_model(source.SerializeToString()))
    weight = np.full((1, 3, 1, 1), np.inf, np.float32)
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    with pytest.raises(ModelError, match="'weight' hold NaN or infinity"):
        openvino_ir.check_finite(tmp_path, ov.Core().read_model(source.SerializeToString()))


def test_another_programs_model_is_refused(tmp_path: Path, onnx_file: OnnxFile) -> None:
    ov.save_model(ov.Core().read_model(read_model_file(onnx_file()).data), tmp_path / "foreign.xml")
    with pytest.raises(ModelError, match="no 'cellseg' section"):
        OpenVinoBackend(tmp_path / "foreign.xml")
