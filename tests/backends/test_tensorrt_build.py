"""Building engines: what TensorRT is asked for, and what becomes of the ways in which it says no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec
from fake_tensorrt import FakeCuda, Flags, ParserError, make_tensorrt

from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.backends.tensorrt_build import BuildOptions, TimingCache, build_engine, check_version
from cellseg_deploy.errors import BackendUnavailableError, ModelError, OutputError, UsageError
from cellseg_deploy.models.onnx_file import ModelFile, read_model_file

pytest.importorskip("onnx")


@pytest.fixture
def model(onnx_file: Callable[..., Path]) -> ModelFile:
    return read_model_file(onnx_file(make_spec(variant="boundary")))


@pytest.mark.parametrize("version", ["10.13.0.35", "11.4.0.106"])
def test_a_strongly_typed_network_is_built_in_either_version(model: ModelFile, version: str) -> None:
    trt = make_tensorrt(FakeCuda(), version)  # the fake refuses other flags, and knows no FP16
    assert build_engine(trt, model, BuildOptions())
    ((network, config),) = trt.builds
    assert network.data == model.data
    assert Flags.TF32 not in config.flags
    assert config.profile.name == "tiles"
    assert config.profile.shapes == [(1, 56, 56, 3), (8, 56, 56, 3), (8, 56, 56, 3)]
    assert config.pools == {}


def test_options_reach_the_builder(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
    options = BuildOptions(
        profile=BatchProfile(2, 3, 4),
        workspace_mib=64,
        optimization_level=5,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        tf32=True,
    )
    build_engine(trt, model, options, compute_capabilities=("75", "86"))
    ((_, config),) = trt.builds
    assert config.flags == {Flags.TF32, Flags.VERSION_COMPATIBLE}
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 64 * 2**20}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.num_compute_capabilities == 2
    assert config.capabilities == {0: trt.ComputeCapability.SM75, 1: trt.ComputeCapability.SM86}
    assert [shape[0] for shape in config.profile.shapes] == [2, 3, 4]


@pytest.mark.parametrize("wrong", [{"optimization_level": 6}, {"workspace_mib": 0}, {"hardware_compatibility": "all"}])
def test_options_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BuildOptions(**wrong)


def test_what_this_tensorrt_lacks(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
    with pytest.raises(UsageError, match=r"no HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"):
        build_engine(trt, model, BuildOptions(hardware_compatibility="same_compute_capability"))
    with pytest.raises(UsageError, match=r"no ComputeCapability\.SM90"):
        build_engine(trt, model, BuildOptions(), compute_capabilities=("90",))
    del trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    with pytest.raises(BackendUnavailableError, match="choose the precision"):
        build_engine(trt, model, BuildOptions())


@pytest.mark.parametrize("parses", [False, True])  # errors beside a yes are errors
def test_parser_errors_name_the_nodes(model: ModelFile, parses: bool) -> None:
    trt = make_tensorrt(FakeCuda())
    trt.behaviour.parses = parses
    trt.behaviour.parser_errors = [ParserError(name="encoder.blocks.3.attn/Softmax", operator="Softmax")] + [
        ParserError(name=f"other{i}", operator="") for i in range(7)
    ]
    with pytest.raises(ModelError) as caught:
        build_engine(trt, model, BuildOptions())
    text = str(caught.value)
    assert "- encoder.blocks.3.attn/Softmax (Softmax): cannot do this [UNSUPPORTED_NODE]" in text
    assert "- other3: cannot do this" in text
    assert "and 3 more" in text
    assert "other4" not in text
    assert trt.builds == []


def test_a_parser_that_says_yes_to_nothing(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
    trt.OnnxParser.parse = lambda self, data: True
    with pytest.raises(ModelError, match="as nothing at all; expected tiles: uint8"):
        build_engine(trt, model, BuildOptions())


def test_none_is_an_error(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
    trt.behaviour.plan = False
    with pytest.raises(ModelError, match="cannot build an engine: no kernel for node 4"):
        build_engine(trt, model, BuildOptions())
    for method, what in (
        ("create_network", "network"),
        ("create_builder_config", "builder configuration"),
        ("create_optimization_profile", "optimisation profile"),
    ):
        trt = make_tensorrt(FakeCuda())
        setattr(trt.Builder, method, lambda *_: None)
        with pytest.raises(BackendUnavailableError, match=f"could not make its {what}"):
            build_engine(trt, model, BuildOptions())


def test_a_timing_cache_that_is_not_given_back(model: ModelFile, tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / "timings")

    def build(change: Callable[[Any], None]) -> None:
        """With a configuration whose timing cache ``change`` breaks."""
        trt = make_tensorrt(FakeCuda())
        original = trt.Builder.create_builder_config

        def create_builder_config(self: Any) -> Any:
            config = original(self)
            change(config)
            return config

        trt.Builder.create_builder_config = create_builder_config
        build_engine(trt, model, BuildOptions(), timing_cache=cache, compute_capabilities=("86",))

    with pytest.raises(ModelError, match="did not give back the timing cache"):
        build(lambda config: setattr(config, "get_timing_cache", lambda: None))
    with pytest.raises(ModelError, match="could not make an empty timing cache"):
        build(lambda config: setattr(config, "create_timing_cache", lambda data: None))
    assert not cache.path.exists()
    with pytest.raises(UsageError, match="does not build for compute capability 86"):
        build(lambda config: setattr(config, "set_compute_capability", lambda *_: False))


def test_a_builder_that_finds_no_gpu(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())

    def nullptr(logger: Any) -> Any:
        logger.log(trt.ILogger.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = nullptr
    with pytest.raises(BackendUnavailableError, match=r"nullptr.*CUDA initialization failure with error: 35.*GPU"):
        build_engine(trt, model, BuildOptions())


@pytest.mark.parametrize("answer", [-1, ValueError("dimension 1 is static")])
def test_a_profile_that_is_not_taken(model: ModelFile, answer: Any) -> None:
    trt = make_tensorrt(FakeCuda())

    def create_builder_config(self: Any) -> Any:
        def refuse(profile: Any) -> int:
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        config = original(self)
        config.add_optimization_profile = refuse
        return config

    original, trt.Builder.create_builder_config = trt.Builder.create_builder_config, create_builder_config
    with pytest.raises(ModelError, match="does not take batches of 1/8/8"):
        build_engine(trt, model, BuildOptions())


def test_the_timing_cache_is_used_and_grows(model: ModelFile, tmp_path: Path) -> None:
    trt, cache = make_tensorrt(FakeCuda()), TimingCache(tmp_path / "timings")
    build_engine(trt, model, BuildOptions(), timing_cache=cache)
    assert cache.read() == b"+timed"
    build_engine(trt, model, BuildOptions(), timing_cache=cache)
    assert trt.builds[1][1].cache.data == b"+timed"
    assert cache.read() == b"+timed+timed"


@pytest.mark.reliability
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "longer"])
def test_a_damaged_timing_cache_is_not_used_and_replaced(
    model: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """TensorRT would believe other times, and choose other kernels without a word."""
    trt, cache = make_tensorrt(FakeCuda()), TimingCache(tmp_path / "timings")
    cache.write(b"old")
    whole = cache.path.read_bytes()
    broken = {"a flipped bit": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-2], "longer": whole + b"x"}[damage]
    cache.path.write_bytes(broken)
    build_engine(trt, model, BuildOptions(), timing_cache=cache)
    assert "timings: this timing cache is damaged" in caplog.text
    assert trt.builds[0][1].cache.data == b""
    assert cache.read() == b"+timed"


def test_another_file_is_not_replaced_by_a_timing_cache(model: ModelFile, tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / "model.onnx")
    cache.path.write_bytes(b"weights")
    with pytest.raises(UsageError, match=r"model.onnx: not a timing cache of this program"):
        build_engine(make_tensorrt(FakeCuda()), model, BuildOptions(), timing_cache=cache)
    assert cache.path.read_bytes() == b"weights"
    cache.path.write_bytes(b"")  # as mktemp makes one
    build_engine(make_tensorrt(FakeCuda()), model, BuildOptions(), timing_cache=cache)
    assert cache.read() == b"+timed"


def test_a_timing_cache_of_another_gpu_is_told_and_replaced(
    model: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt, cache = make_tensorrt(FakeCuda()), TimingCache(tmp_path / "timings")
    cache.write(b"foreign")
    build_engine(trt, model, BuildOptions(), timing_cache=cache)
    assert "another TensorRT or GPU" in caplog.text
    assert cache.read() == b"+timed"
    with pytest.raises(OutputError, match="no such folder for the timing cache"):
        build_engine(trt, model, BuildOptions(), timing_cache=TimingCache(tmp_path / "no" / "timings"))


def test_versions_of_tensorrt() -> None:
    for version in ("10.3.0", "11.4.0.106"):
        check_version(make_tensorrt(FakeCuda(), version))
    for version in ("8.6.1", "9.0", "12.0.0", "none"):
        with pytest.raises(BackendUnavailableError, match="this program knows 10 and 11"):
            check_version(make_tensorrt(FakeCuda(), version))
