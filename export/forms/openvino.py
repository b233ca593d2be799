"""Export a model file or trained network to OpenVINO's .xml and .bin, delivered only if it counts the same cells.

model -> OpenVINO network, ModelSpec in rt_info -> temporary pair -> OpenVINO against its origin on images -> MODEL.xml
                                                       |                                                   MODEL.bin
                                                       +-> MODEL.xml.parity.json; refused: MODEL.xml.refused.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend
from cellseg_deploy.backends.openvino import OpenVinoBackend, import_openvino, read_ir, shared_core
from cellseg_deploy.backends.openvino_ir import SUFFIX, IrFacts, IrFile, weights_path, write_rt_info
from cellseg_deploy.backends.records import ParityRecord, form_sha256
from cellseg_deploy.errors import ModelError, OutputError, ParityError, UsageError
from cellseg_deploy.files.atomic import writing
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models.onnx_file import ModelFile, read_model_file
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.parity.compare import ParityPolicy, ParityReport, policy_for
from cellseg_export.gate.gate_result import judge
from cellseg_export.gate.parity_record import record_form, record_refusal
from cellseg_export.gate.verify import GateImages, sample_images, verify

Weights = Literal["fp32", "fp16"]
Precision = Literal["fp32", "bf16"]
_PROBE_BYTES = 2**20


@dataclass(frozen=True)
class ExportedIr:
    """``path``: the .xml. ``report``: the gate's report, also at ``report_path``. ``record``: None if unverified."""

    path: Path
    report: ParityReport
    report_path: Path
    spec: ModelSpec
    facts: IrFacts
    record: ParityRecord | None


@dataclass(frozen=True)
class Origin:
    """Source of an OpenVINO form. ``file``: the checked ONNX file. ``path``: as passed by the user."""

    path: Path
    file: ModelFile
    reference: Backend


def report_path_of(path: Path, precision: str = "fp32") -> Path:
    """Path of the gate's report for the .xml ``path``, run in ``precision``: next to it, distinct from the report of an
    .onnx of the same name and from that of the other precision."""
    return path.with_name(f"{path.name}{'.bf16' if precision == 'bf16' else ''}.parity.json")


def export_openvino(
    source: Path,
    path: Path,
    *,
    weights: Weights = "fp32",
    precision: Precision = "fp32",
    images: GateImages | None = None,
    policy: ParityPolicy | None = None,
    unverified: bool = False,
    tile_batch: int = 8,
    threads: int | None = None,
    on_image: Callable[[str], None] = lambda _: None,
) -> ExportedIr:
    """Write ``source`` (an .onnx, a run folder or its .safetensors) to ``path`` (ending in .xml) and its .bin.

    ``weights``: how they are stored; fp16 halves the file and rounds them. ``precision``: arithmetic in which it is
    compared and recorded; the pair itself runs in either, and its note of a passed fp32 comparison is kept if
    the same network is then compared in bf16. ``images``, ``policy``, ``unverified``, ``tile_batch``: as in
    ``export_onnx``. An existing pair at ``path`` is kept if the gate refuses the new one.

    Raises ``ParityError`` (the report is written first), ``ModelError``, ``BackendUnavailableError`` without OpenVINO,
    ONNX Runtime or, for bf16, a CPU that supports it, ``OutputError``, ``UsageError``.
    """
    check_output(path)
    ov = import_openvino()
    policy = policy or policy_for("bf16" if precision == "bf16" else weights)
    with open_origin(source, path.parent, threads) as origin:
        model = read_network(ov, origin.file)
        facts = IrFacts(
            model_identity=origin.file.identity,
            onnx_sha256=origin.file.file_sha256,
            precision="fp32",
            weights="fp16" if weights == "fp16" or origin.file.precision == "fp16" else "fp32",
            made_with={"openvino": str(ov.__version__)},
        )
        return hand_over(
            ov,
            model,
            facts,
            origin,
            path,
            images=images or sample_images(origin.file.spec),
            policy=policy,
            precision=precision,
            unverified=unverified,
            tile_batch=tile_batch,
            threads=threads,
            on_image=on_image,
        )


def hand_over(
    ov: Any,
    model: Any,
    facts: IrFacts,
    origin: Origin,
    path: Path,
    *,
    images: GateImages,
    policy: ParityPolicy,
    precision: str = "fp32",
    notes: tuple[str, ...] = (),
    unverified: bool = False,
    tile_batch: int = 8,
    threads: int | None = None,
    on_image: Callable[[str], None] = lambda _: None,
) -> ExportedIr:
    """Write ``model`` (openvino.Model) to ``path`` if it passes the gate, with its record; errors as
    ``export_openvino``. ``notes``: for its report."""
    report_path = report_path_of(path, precision)
    record = None
    with workspace(path.parent) as place:
        temporary = place / path.name
        spec = msgspec.structs.replace(origin.file.spec, parity="unverified")
        facts = save_pair(ov, model, spec, facts, temporary, path)
        # Not cached: the cache folder of compiled networks would keep every attempt.
        with OpenVinoBackend(temporary, threads=threads, precision=precision, use_cache=False) as candidate:
            report = verify(origin.reference, candidate, images, policy, batch_size=tile_batch, on_image=on_image)
            report = replace(_without_temporary(report, path, facts), notes=(*report.notes, *notes))
            try:
                parity = judge(report, path, report_path, unverified=unverified)
            except ParityError:
                record_refusal(report, candidate, path, (path, origin.path))
                raise
            if precision == "bf16":  # the pair runs in fp32 unless requested otherwise: the fp32 note counts
                parity = _sentence_of_same(path, temporary, spec) or parity
            spec = msgspec.structs.replace(spec, parity=parity)
            save_pair(ov, model, spec, facts, temporary, path)
            _move(temporary, path)
            if report.verdict == "passed":
                record = record_form(
                    report, origin.reference, candidate, path, images, (path, origin.path), batch_size=tile_batch
                )
    return ExportedIr(path, report, report_path, spec, facts, record)


@contextmanager
def open_origin(source: Path, folder: Path, threads: int | None = None) -> Iterator[Origin]:
    """``source`` as a checked ONNX file, and the reference for its forms: ONNX Runtime for an .onnx, PyTorch for
    a training run, which is converted via a temporary ONNX file within ``folder``."""
    if source.suffix.lower() == ".onnx":
        with OnnxRuntimeBackend(source, threads=threads) as reference:
            yield Origin(source, reference.model_file, reference)
        return
    if not source.is_dir() and source.suffix.lower() != ".safetensors":
        raise UsageError(f"{source}: expected an .onnx, a training run folder or its model.safetensors")
    from cellseg_export.forms.onnx import write_graph
    from cellseg_export.gate.torch_backend import TorchBackend
    from cellseg_train.checkpoint import load_network

    network = load_network(source)
    with workspace(folder) as place:
        write_graph(network, place / "model.onnx")
        file = read_model_file(place / "model.onnx")
    yield Origin(source, file, TorchBackend(network))


def read_network(ov: Any, file: ModelFile) -> Any:
    """The openvino.Model of a checked ONNX file. Raises ``ModelError`` if OpenVINO cannot read it."""
    try:
        return shared_core().read_model(file.data)
    except Exception as error:  # OpenVINO raises plain RuntimeError
        raise ModelError(f"{file.path}: OpenVINO {ov.__version__} cannot read the model: {error}") from error


def save_pair(ov: Any, model: Any, spec: ModelSpec, facts: IrFacts, path: Path, final: Path) -> IrFacts:
    """Write ``model`` to ``path`` and its .bin with ``spec`` and ``facts``, which get the hash of the .bin.

    ``facts.weights`` decides how floats are stored. Raises ``OutputError``, which names ``final``.
    """
    half = facts.weights == "fp16"
    try:
        ov.save_model(model, path, compress_to_fp16=half)
        with weights_path(path).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        facts = msgspec.structs.replace(facts, bin_sha256=digest)
        write_rt_info(model, spec, facts)
        ov.save_model(model, path, compress_to_fp16=half)  # the .xml names the hash of the .bin, so it comes second
    except (OSError, RuntimeError) as error:
        with writing(final):  # OpenVINO does not report the operating system's error, so ask again
            path.with_suffix(".probe").write_bytes(bytes(_PROBE_BYTES))
        raise OutputError(f"{final}: OpenVINO cannot write it ({error}); check free space and permissions") from error
    return facts


def check_output(path: Path) -> None:
    """Raise ``UsageError`` or ``OutputError`` before any work is done for a ``path`` that cannot be written."""
    if path.suffix.lower() != SUFFIX:
        raise UsageError(f"{path}: the name of an OpenVINO model must end in {SUFFIX}; its .bin gets the same name")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it, or choose another -o")
    for part in (path, weights_path(path)):
        if part.is_dir():
            raise OutputError(f"{part}: there is a folder of that name; choose another -o")
    with workspace(path.parent):  # if it can be made, files can be written there
        pass


def _move(temporary: Path, path: Path) -> None:
    """Rename the pair, weights first: after a crash in between, the two files are known not to match."""
    try:
        weights_path(temporary).replace(weights_path(path))
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _sentence_of_same(path: Path, temporary: Path, spec: ModelSpec) -> str:
    """Parity note of the pair at ``path``, "" if it did not pass or is not of this ``spec`` and network."""
    if form_sha256(path) != form_sha256(temporary):
        return ""
    older: IrFile = read_ir(path)
    same = msgspec.structs.replace(older.spec, parity=spec.parity) == spec
    return older.spec.parity if same and older.spec.parity.startswith("verified") else ""


def _without_temporary(report: ParityReport, path: Path, facts: IrFacts) -> ParityReport:
    """``report`` with the final file name and the form's facts; the hash of the .xml is not yet known."""
    details = {key: value for key, value in report.candidate.details.items() if key != "model_file_sha256"}
    details |= {"model_path": str(path), "weights": facts.weights, "bin_sha256": facts.bin_sha256}
    return replace(report, candidate=replace(report.candidate, details=details))
