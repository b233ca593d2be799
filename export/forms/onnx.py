"""Export a trained network to a one-file ONNX model, delivered only if it counts the same cells.

network ------> fp32 graph --(fp16, mixed)--> half graph
                    |                             |
MODEL.onnx ---------+                             |
                    +-----------+-----------------+
                                v
                         temporary file -> ONNX Runtime against what it was made from, on images -> MODEL.onnx
                                                   |
                                                   +-> MODEL.parity.json; refused: MODEL.refused.json, .jpg
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend
from cellseg_deploy.cells import tiling
from cellseg_deploy.errors import ModelError, OutputError, UsageError
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models import onnx_file
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec, TrainingInfo
from cellseg_deploy.parity.compare import ParityPolicy, ParityReport, policy_for
from cellseg_export.forms.deploy_module import DeployModule, exportable
from cellseg_export.forms.graph import check_graph, finish_graph
from cellseg_export.gate.gate_result import REPORT_END, judge
from cellseg_export.gate.torch_backend import TorchBackend
from cellseg_export.gate.verify import GateImages, look_inside, sample_images, verify
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.config import ModelConfig
from cellseg_train.loop import halo_of
from cellseg_train.model import CellSegNet

Precision = Literal["fp32", "fp16", "mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

OPSET = 20
MAX_OPSET = 22
"""Largest opset: from 23 on the exporter writes attention as one operator, which TensorRT refuses in fp32."""

# Room for names and nodes in addition to the weights; ViT-L/14 needs 1 MB.
_GRAPH_BYTES = 16 * 2**20

_log = logging.getLogger("cellseg_deploy.export")


@dataclass(frozen=True)
class Exported:
    """``path``: the model. ``report``: the gate's report, also at ``report_path``. ``spec``: as written."""

    path: Path
    report: ParityReport
    report_path: Path
    spec: ModelSpec


def report_path_of(model: Path) -> Path:
    """Path of the gate's report for ``model``: ``MODEL.parity.json`` next to it."""
    return model.with_suffix(REPORT_END)


def export_onnx(
    source: LoadedNetwork | Path,
    path: Path,
    *,
    precision: Precision = "fp32",
    images: GateImages | None = None,
    policy: ParityPolicy | None = None,
    unverified: bool = False,
    opset: int = OPSET,
    tile_batch: int = 8,
    threads: int | None = None,
    on_image: Callable[[str], None] = lambda _: None,
    on_try: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write ``source`` to ``path`` (ending in .onnx), whole or not at all, after it has passed the gate.

    ``source``: a trained network, or an fp32 model file (for fp16 and mixed; the result is then compared with that
    file). ``precision``: ``fp16`` (LayerNorm, softmax, sigmoid in FP32), ``mixed`` (also the parts that need it).
    ``images``: for the gate, by default sample smears. ``policy``: by default that of the precision. ``unverified``:
    write the file even if too few cells were found to judge, as long as probabilities agree to
    ``policy.tensor_tolerance``, also within the network. ``tile_batch``: tiles per call. ``on_try``: called with each
    choice of parts for ``mixed``. An existing file at ``path`` and its report are kept if the gate refuses.

    Raises ``ParityError`` (the report is written first, see ``judge``), ``ModelError`` for a network that cannot be
    exported, ``BackendUnavailableError`` without an ONNX Runtime, ``OutputError``, ``UsageError``.
    """
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"{path}: the name of the model must end in .onnx")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it, or choose another -o")
    if path.is_dir():
        raise OutputError(f"{path}: there is a folder of that name; choose another -o")
    policy = policy or policy_for(precision)
    report_path = report_path_of(path)
    with workspace(path.parent) as place:
        temporary = place / path.name
        with _reference(source, precision, threads) as reference:
            images = images or sample_images(reference.spec)
            if isinstance(source, Path):
                write_bytes(temporary, _data_of(reference))
            else:
                write_graph(source, temporary, opset=opset)
            if precision != "fp32":
                rewrite_in_half(temporary, precision, reference, images, policy, tile_batch=tile_batch, on_try=on_try)
            with OnnxRuntimeBackend(temporary, threads=threads) as candidate:
                report = verify(reference, candidate, images, policy, batch_size=tile_batch, on_image=on_image)
            spec = reference.spec
        del candidate, reference  # otherwise a large model would be in memory twice
        if not isinstance(source, Path):
            report = look_inside(report, source, temporary, images)
        report = _without_temporary(report, path)
        spec = msgspec.structs.replace(spec, parity=judge(report, path, report_path, unverified=unverified))
        onnx_file.write_spec(temporary, spec)
        try:
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    return Exported(path, report, report_path, spec)


def rewrite_in_half(
    path: Path,
    precision: Precision,
    reference: Backend,
    images: GateImages,
    policy: ParityPolicy,
    *,
    tile_batch: int = 8,
    on_try: Callable[[str], None] = lambda _: None,
) -> None:
    """Convert the fp32 model file ``path`` to its ``fp16`` or ``mixed`` form, types checked, in place.

    Whether the counts agree is left to the gate. Raises ``ModelError`` if a weight does not fit into half.
    """
    import onnx

    from cellseg_export.forms.fp16_graph import check_types, float_parts, to_half
    from cellseg_export.gate.mixed_precision import mixed_form

    model = onnx.load_model_from_string(onnx_file.read_model_file(path).data)  # checks that weights are finite
    if precision == "fp16":
        half = to_half(model)
    else:
        spec = reference.spec
        half = mixed_form(model, spec, reference, images, policy, batch_size=tile_batch, on_try=on_try)
    check_types(half, float_parts(half) if precision == "mixed" else ())
    onnx_file.set_spec(half, msgspec.structs.replace(reference.spec, parity="unverified"))
    write_bytes(path, half.SerializeToString(deterministic=True))
    _check_valid(path)


def _reference(source: LoadedNetwork | Path, precision: Precision, threads: int | None) -> Backend:
    """Open the reference that the new form is compared with."""
    if not isinstance(source, Path):
        return TorchBackend(source)
    if precision == "fp32":
        raise UsageError(f"{source}: a model file already; --precision fp16 or mixed makes its half-precision form")
    reference = OnnxRuntimeBackend(source, threads=threads)
    if reference.precision != "fp32":
        reference.close()
        raise UsageError(f"{source}: holds {reference.precision} weights; half precision is made from the fp32 model")
    return reference


def _data_of(reference: Backend) -> bytes:
    assert isinstance(reference, OnnxRuntimeBackend)
    return reference.model_file.data


def write_graph(network: LoadedNetwork, path: Path, *, opset: int = OPSET) -> None:
    """Write the checked ONNX file of ``network``, its ModelSpec marked ``unverified``: it has not been compared yet.

    Raises ``ModelError`` if it would be over 2 GiB, or is not what was requested.
    """
    if not OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset must be {OPSET} to {MAX_OPSET}, got {opset}")
    check_size(network.net)
    model = trace(network, opset)
    finish_graph(model, name=network.spec.name, version=_version())
    check_graph(model, opset=opset)
    onnx_file.set_spec(model, msgspec.structs.replace(network.spec, parity="unverified"))
    write_bytes(path, model.SerializeToString(deterministic=True))
    del model
    _check_valid(path)


def _check_valid(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)  # by path: a large model in memory is copied three times
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is not valid ONNX: {error}") from error


def check_size(net: torch.nn.Module) -> None:
    """Raise ``ModelError`` if the weights of ``net`` do not fit into one ONNX file."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    if size + _GRAPH_BYTES > onnx_file.MAX_BYTES:
        raise ModelError(
            f"the weights take {size / 2**30:.2f} GiB; an ONNX file with embedded weights is limited to 2 GiB "
            "(a protobuf message cannot be larger), and external weights are not accepted; use a smaller encoder"
        )


def trace(network: LoadedNetwork, opset: int) -> Any:
    """Return the onnx.ModelProto that PyTorch's exporter makes of ``network``, batch norms folded, batch size free."""
    size = network.config.tile_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    module = DeployModule(network.net).eval()
    with _silence(), exportable(network.net), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={INPUT_NAME: {0: torch.export.Dim("n")}},
            optimize=True,
            verbose=False,
        )
        if program is None:
            raise ModelError("PyTorch's exporter returned nothing")
        model = program.model_proto
    del program
    gc.collect()  # the exporter leaves cycles that hold every weight twice
    return model


def with_tiles(network: LoadedNetwork, *, tile_size: int | None = None, halo: int | None = None) -> LoadedNetwork:
    """``network`` for tiles of ``tile_size`` px that share ``halo`` px of context on each side.

    ``tile_size``: by default as trained; for another size the position embedding is resampled once, as timm does it.
    ``halo``: by default as trained, for another tile size its usual share. The metrics in the ModelSpec are dropped,
    because they were measured with other tiles. Raises ``UsageError`` for sizes that do not fit patch, decoder or tile.
    """
    config, net, spec = network.config, network.net, network.spec
    if tile_size is not None and tile_size != config.tile_size:
        config = dataclasses.replace(config, tile_size=tile_size)
        net = _resampled(network.net, config)
        spec = msgspec.structs.replace(spec, tile_size=tile_size, halo=halo_of(tile_size))
    if halo is not None and halo != spec.halo:
        tiling.plan((1, 1), spec.tile_size, halo)  # raises for a halo that does not fit
        spec = msgspec.structs.replace(spec, halo=halo)
    if spec is network.spec:
        return network
    training = msgspec.structs.replace(spec.training, val_metrics=TrainingInfo().val_metrics)
    return LoadedNetwork(net.eval(), config, msgspec.structs.replace(spec, training=training))


def _resampled(trained: CellSegNet, config: ModelConfig) -> CellSegNet:
    """A network of ``config`` with the weights of ``trained``, which has a different tile size."""
    from timm.layers import resample_abs_pos_embed

    net = CellSegNet(config)
    state = trained.state_dict()
    embedding = state["encoder.pos_embed"]
    state["encoder.pos_embed"] = resample_abs_pos_embed(
        embedding, new_size=[net.grid, net.grid], num_prefix_tokens=embedding.shape[1] - trained.grid**2
    )
    net.load_state_dict(state)
    return net


def _without_temporary(report: ParityReport, path: Path) -> ParityReport:
    """``report`` with the final file name; the file's hash is not yet known, its identity is."""
    details = {key: value for key, value in report.candidate.details.items() if key != "model_file_sha256"}
    candidate = dataclasses.replace(report.candidate, details=details | {"model_path": str(path)})
    return dataclasses.replace(report, candidate=candidate)


def _version() -> str:
    from importlib.metadata import version

    return version("cellseg-deploy")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the exporter's messages unless ``-v`` is set; its errors are raised, not logged."""
    if _log.isEnabledFor(logging.INFO):
        yield
        return
    loud = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
