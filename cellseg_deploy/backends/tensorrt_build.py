"""Build a serialised TensorRT engine from an ONNX model. No PyTorch, so that ``cellseg-infer`` can build too.

The network is strongly typed: each tensor has the type that the ONNX graph gives it, and the builder may not choose
another. TensorRT 11 supports only this; in TensorRT 10 it is requested. So precision is decided where it can be
checked, in the graph, and an fp32 model gives an fp32 engine.

TensorRT reports most failures by returning None, False or -1, with the reason in its log. All of these are checked
here, and the last logged errors become part of the message.

``trt`` is always the module: ``tensorrt``, or ``tensorrt_rtx``, whose builder has the same interface and needs no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.backends.tensorrt_sidecar import version_tuple
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
from cellseg_deploy.models.onnx_file import ModelFile
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

TENSORRT_MAJORS = (10, 11)
_SHOWN_ERRORS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine; saved with it.

    ``profile``: tiles per call. ``workspace_mib``: device memory in MiB that a layer may use, None for all available.
    """

    profile: BatchProfile = field(default_factory=BatchProfile)
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace must be at least 1 MiB, got {self.workspace_mib}")


def make_logger(trt: Any) -> Any:
    """Create a logger for TensorRT: ``errors`` are kept for messages, the rest goes to Python's logging at debug level.

    Nothing is printed: the code that receives the None after an error raises it.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class exists only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            _log.debug("TensorRT: %s", message)

    return Logger()


def why(logger: Any) -> str:
    """Return the last errors that TensorRT logged, on one line."""
    return "; ".join(logger.errors[-_SHOWN_ERRORS:]) or "TensorRT gave no reason; run with -vv for its log"


def check_version(trt: Any) -> None:
    """Raise ``BackendUnavailableError`` unless ``trt`` is a supported TensorRT version."""
    if version_tuple(trt.__version__)[:1] not in {(major,) for major in TENSORRT_MAJORS}:
        raise BackendUnavailableError(
            f"TensorRT {trt.__version__} is installed; this program knows {' and '.join(map(str, TENSORRT_MAJORS))}; "
            "run: pip install 'cellseg-deploy[tensorrt]'"
        )


def build_engine(
    trt: Any,
    model: ModelFile,
    options: BuildOptions,
    *,
    compute_capabilities: Sequence[str] = (),
) -> bytes:
    """Build the engine of ``model`` for the current GPU and return its bytes; takes seconds to minutes.

    ``model`` was read by ``read_model_file``, so its weights are known to be finite: the builder does not notice
    infinite ones. ``compute_capabilities``: for ``tensorrt_rtx`` alone, build for these (as ``"86"``) without a GPU.

    Raises ``ModelError`` with the names of the nodes if TensorRT refuses the graph, ``BackendUnavailableError`` if the
    builder itself cannot be made, ``UsageError`` for an option this TensorRT does not have.
    """
    logger = make_logger(trt)
    builder = _make(lambda: trt.Builder(logger), "builder", logger)
    network = _make(lambda: builder.create_network(network_flags(trt)), "network", logger)
    parser = _make(lambda: trt.OnnxParser(network, logger), "ONNX parser", logger)
    parse(parser, model, logger)
    check_network(trt, network, model)
    config = _make(builder.create_builder_config, "builder configuration", logger)
    configure(trt, config, options, compute_capabilities)
    add_profile(builder, config, options.profile, model.spec, logger)
    plan = builder.build_serialized_network(network, config)
    engine = b"" if plan is None else bytes(plan)
    if not engine:
        raise ModelError(f"{model.path}: TensorRT {trt.__version__} cannot build an engine: {why(logger)}")
    return engine


def network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network: requested in TensorRT 10, the only kind in 11."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is None and version_tuple(trt.__version__) < (11,):
        raise BackendUnavailableError(
            f"TensorRT {trt.__version__} does not support strongly typed networks and would choose the precision "
            "itself; update it: pip install 'cellseg-deploy[tensorrt]'"
        )
    return 0 if flag is None else 1 << int(flag)


def parse(parser: Any, model: ModelFile, logger: Any) -> None:
    """Parse the bytes of ``model``; raises ``ModelError`` that names each node the parser rejected."""
    parsed = parser.parse(model.data)
    errors = [_describe_error(parser.get_error(i)) for i in range(parser.num_errors)]
    if parsed and not errors:
        return
    shown = errors[:_SHOWN_ERRORS]
    if len(errors) > len(shown):
        shown.append(f"and {len(errors) - len(shown)} more")
    reasons = "\n  - ".join(shown) or why(logger)
    raise ModelError(f"{model.path}: TensorRT's parser refuses the graph:\n  - {reasons}")


def check_network(trt: Any, network: Any, model: ModelFile) -> None:
    """Raise ``ModelError`` unless inputs and outputs of the parsed network match the model.

    The parser accepts bytes that are not a model at all, and leaves the network empty.
    """
    spec, size = model.spec, model.spec.tile_size
    expected = [
        (INPUT_NAME, trt.DataType.UINT8, (-1, size, size, 3)),
        (OUTPUT_NAME, trt.DataType.FLOAT, (-1, len(spec.channels), size, size)),
    ]
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    if found != expected:
        raise ModelError(
            f"{model.path}: TensorRT reads inputs and outputs as {_signature(found)}; expected {_signature(expected)}"
        )


def configure(trt: Any, config: Any, options: BuildOptions, compute_capabilities: Sequence[str] = ()) -> None:
    """Apply ``options`` to the builder configuration. Raises ``UsageError`` for an option that this TensorRT lacks."""
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    # TF32 is on by default: it rounds fp32 products to 10 bits of mantissa from Ampere on.
    config.clear_flag(trt.BuilderFlag.TF32)
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for i, capability in enumerate(compute_capabilities):
            if config.set_compute_capability(_member(trt, "ComputeCapability", f"SM{capability}"), i) is False:
                raise UsageError(f"TensorRT {trt.__version__} does not build for compute capability {capability}")


def add_profile(builder: Any, config: Any, profile: BatchProfile, spec: ModelSpec, logger: Any) -> None:
    """Declare the batch sizes of ``profile``. Raises ``ModelError`` if TensorRT rejects them."""
    shapes = _make(builder.create_optimization_profile, "optimisation profile", logger)
    try:
        shapes.set_shape(INPUT_NAME, *profile.input_shapes(spec))
        index = config.add_optimization_profile(shapes)
    except ValueError as error:
        raise ModelError(f"TensorRT does not accept batches of {profile}: {error}") from error
    if index != 0:
        raise ModelError(f"TensorRT does not accept batches of {profile}: {why(logger)}")


def _make(maker: Any, what: str, logger: Any) -> Any:
    """Call ``maker``; turn None, or pybind11's TypeError for a constructor that returned nothing, into our error."""
    try:
        made = maker()
    except (TypeError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"TensorRT could not create its {what} ({_first_line(error)}): {why(logger)}; check the NVIDIA GPU "
            "and its driver with nvidia-smi"
        ) from error
    if made is None:
        raise BackendUnavailableError(f"TensorRT could not create its {what}: {why(logger)}")
    return made


def _describe_error(error: Any) -> str:
    """Format as ``encoder.blocks.0.attn/Softmax (Softmax): reason [code]``; old parsers know only a node's number."""
    name = _ask(error, "node_name") or f"node {_ask(error, 'node')}"
    operator = _ask(error, "node_operator")
    text = " ".join(str(_ask(error, "desc")).split())
    return f"{name}{f' ({operator})' if operator else ''}: {text} [{_ask(error, 'code')}]"


def _ask(error: Any, what: str) -> Any:
    method = getattr(error, what, None)
    return None if method is None else method()


def _member(trt: Any, enum: str, name: str) -> Any:
    value = getattr(getattr(trt, enum, None), name, None)
    if value is None:
        raise UsageError(f"TensorRT {trt.__version__} has no {enum}.{name}; update it, or leave that option out")
    return value


def _signature(tensors: Sequence[tuple[str, Any, tuple[int, ...]]]) -> str:
    parts = [f"{name}: {str(dtype).rpartition('.')[2].lower()} {shape}" for name, dtype, shape in tensors]
    return ", ".join(parts) or "nothing at all"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
