"""Building engines: what TensorRT is asked for, and what becomes of the ways in which it says no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec
from fake_tensorrt import FakeCuda, Flags, ParserError, make_tensorrt

from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.backends.tensorrt_build import BuildOptions, build_engine, check_version
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
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
    )
    build_engine(trt, model, options, compute_capabilities=("75", "86"))
    ((_, config),) = trt.builds
    assert config.flags == set()
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 64 * 2**20}
    assert config.num_compute_capabilities == 2
    assert config.capabilities == {0: trt.ComputeCapability.SM75, 1: trt.ComputeCapability.SM86}
    assert [shape[0] for shape in config.profile.shapes] == [2, 3, 4]


def test_a_workspace_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 MiB, got 0"):
        BuildOptions(workspace_mib=0)


def test_what_this_tensorrt_lacks(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
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
        with pytest.raises(BackendUnavailableError, match=f"could not create its {what}"):
            build_engine(trt, model, BuildOptions())


def test_a_compute_capability_that_is_not_taken(model: ModelFile) -> None:
    trt = make_tensorrt(FakeCuda())
    original = trt.Builder.create_builder_config

    def create_builder_config(self: Any) -> Any:
        config = original(self)
        config.set_compute_capability = lambda *_: False
        return config

    trt.Builder.create_builder_config = create_builder_config
    with pytest.raises(UsageError, match="does not build for compute capability 86"):
        build_engine(trt, model, BuildOptions(), compute_capabilities=("86",))


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
    with pytest.raises(ModelError, match="does not accept batches of 1/8/8"):
        build_engine(trt, model, BuildOptions())


def test_versions_of_tensorrt() -> None:
    for version in ("10.3.0", "11.4.0.106"):
        check_version(make_tensorrt(FakeCuda(), version))
    for version in ("8.6.1", "9.0", "12.0.0", "none"):
        with pytest.raises(BackendUnavailableError, match="this program knows 10 and 11"):
            check_version(make_tensorrt(FakeCuda(), version))
