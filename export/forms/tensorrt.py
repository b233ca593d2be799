"""Build a TensorRT engine from an ONNX model, delivered only if it counts the same cells on the GPU that built it.

    MODEL.onnx -> (fp32? half graph) -> engine under a temporary name -> compared with the ONNX file on images
        -> MODEL.engine + MODEL.engine.json, MODEL.engine.parity.json and a parity record, or MODEL.engine.refused.json

Without a GPU nothing can be built or compared. ``check_only`` is what remains: TensorRT-RTX, a sibling of
TensorRT for consumer cards, builds ahead of time on any machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cellseg_deploy.backends.cuda_runtime import parse_device
from cellseg_deploy.backends.records import ParityRecord
from cellseg_deploy.backends.tensorrt import TensorRTBackend, build_to, import_tensorrt_rtx, open_device
from cellseg_deploy.backends.tensorrt_build import BuildOptions, build_engine
from cellseg_deploy.backends.tensorrt_sidecar import SUFFIX, EngineSidecar, sidecar_path, write_sidecar
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, OutputError, UsageError
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models.onnx_file import ModelFile, check_model, read_model_file
from cellseg_deploy.parity.compare import ParityReport
from cellseg_deploy.parity.policy import ParityPolicy, policy_for
from cellseg_export.gate.gate_result import judge
from cellseg_export.gate.parity_record import record_form
from cellseg_export.gate.verify import GateImages, open_form, sample_images, verify

Precision = Literal["fp16", "fp32"]
COMPUTE_CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""Supported by TensorRT-RTX 1.7: Turing, Ampere (A100, RTX 30), Ada (RTX 40), Blackwell. No Hopper (90)."""


@dataclass(frozen=True)
class BuiltEngine:
    """``path``: the engine. ``sidecar``: the file next to it. ``report``: the gate's report, also at ``report_path``.
    ``record``: used by ``--backend auto``, None for an unverified engine."""

    path: Path
    sidecar: EngineSidecar
    report: ParityReport
    report_path: Path
    record: ParityRecord | None


@dataclass(frozen=True)
class AheadOfTimeBuild:
    """One engine that ``check_only`` built and discarded: its compute capability, its size, its build time."""

    compute_capability: str
    engine_bytes: int
    seconds: float


@dataclass(frozen=True)
class BuildCheck:
    """Result of ``check_only``. ``precision``: of the graph that was built."""

    model: Path
    precision: str
    builder: str
    builds: tuple[AheadOfTimeBuild, ...]

    def to_text(self) -> str:
        """Return a table, and a note on what it does and does not show."""
        lines = [
            f"model      {self.model.name}, {self.precision}",
            f"builder    {self.builder}",
            "",
            f"{'compute capability':<20}{'engine':>12}{'build':>10}",
        ]
        for build in self.builds:
            capability = f"{build.compute_capability[:-1]}.{build.compute_capability[-1]}"
            lines.append(f"{capability:<20}{build.engine_bytes / 1e6:>9.1f} MB{build.seconds:>8.1f} s")
        return "\n".join(
            [
                *lines,
                "",
                "shown      the weights are finite, the parser of TensorRT-RTX takes every node, its builder makes an",
                "           engine for each of these GPUs ahead of time",
                "not shown  that TensorRT itself (a different program) builds it, that an engine runs, how",
                "           fast, and that it counts the same cells: this needs the GPU, without --check-only",
                "kept       no engine",
            ]
        )


def export_tensorrt(
    model_path: Path,
    output: Path,
    options: BuildOptions | None = None,
    *,
    precision: Precision = "fp16",
    device: str = "cuda",
    reference: Path | None = None,
    images: GateImages | None = None,
    policy: ParityPolicy | None = None,
    unverified: bool = False,
    threads: int | None = None,
    on_image: Callable[[str], None] = lambda _: None,
) -> BuiltEngine:
    """Build the engine of ``model_path`` (.onnx) at ``output`` (.engine) with its sidecar, if it passes the gate.

    ``precision``: ``fp16`` converts an fp32 model to half and takes a half model as it is; ``fp32`` requires an fp32
    one. ``reference``: another form to compare with (a training run, an fp32 .onnx), by default ``model_path`` in
    ONNX Runtime on the CPU. ``policy``: by default that of the precision. ``unverified``: as in ``export_onnx``.
    ``threads``: of the reference. An existing engine at ``output`` is kept if the gate refuses the new one.

    Raises ``BackendUnavailableError`` without GPU or TensorRT, ``ParityError`` (after the report is written),
    ``ModelError`` for a model that TensorRT refuses, ``OutputError``, ``UsageError``.
    """
    if output.suffix.lower() != SUFFIX:
        raise UsageError(f"{output}: the name of the engine must end in {SUFFIX}")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; make it, or choose another -o")
    options = options or BuildOptions()
    try:
        trt, _, here = open_device(parse_device(device))
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{error}; whether the model parses and builds can be checked without a GPU: cellseg-export tensorrt "
            f"{model_path} --check-only"
        ) from error
    source = read_model_file(model_path)
    images = images or sample_images(source.spec)
    report_path = output.with_name(output.name + ".parity.json")
    with workspace(output.parent) as place:
        temporary = place / output.name
        built = build_to(
            trt,
            in_precision(source, precision),
            here,
            options,
            temporary,
            parity="unverified",
            source=source,
        )
        with (
            open_form(reference or model_path, threads=threads) as expected,
            TensorRTBackend(temporary, device=device) as candidate,
        ):
            report = verify(
                expected,
                candidate,
                images,
                policy or policy_for(built.precision),
                batch_size=options.profile.max,
                on_image=on_image,
            )
            report = _with_path(report, output)
            parity = judge(report, output, report_path, unverified=unverified)
            sidecar = msgspec.structs.replace(
                built,
                spec=msgspec.structs.replace(built.spec, parity=parity),
                parity_report=msgspec.json.decode(report.to_json()),
            )
            write_sidecar(temporary, sidecar)
            _move(temporary, output)
            record = None
            if report.verdict == "passed":
                record = record_form(
                    report, expected, candidate, output, images, (output, model_path), batch_size=options.profile.max
                )
    return BuiltEngine(output, sidecar, report, report_path, record)


def check_only(
    model_path: Path,
    options: BuildOptions | None = None,
    *,
    precision: Precision = "fp16",
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    on_build: Callable[[str], None] = lambda _: None,
) -> BuildCheck:
    """Build the engine of ``model_path`` with TensorRT-RTX for each of ``compute_capabilities`` (``"86"``) and discard
    it: no GPU is needed and no file is left.

    Raises ``ModelError`` if one cannot be built, ``BackendUnavailableError`` without TensorRT-RTX, ``UsageError``.
    """
    unknown = [c for c in compute_capabilities if c not in COMPUTE_CAPABILITIES]
    if unknown or not compute_capabilities:
        raise UsageError(
            f"compute capabilities {', '.join(unknown) or 'none'}; TensorRT-RTX builds for "
            f"{', '.join(COMPUTE_CAPABILITIES)}"
        )
    options = options or BuildOptions()
    trt = import_tensorrt_rtx()
    builds = []
    model = in_precision(read_model_file(model_path), precision)
    for capability in compute_capabilities:
        started = time.perf_counter()
        size = len(build_engine(trt, model, options, compute_capabilities=[capability]))
        builds.append(AheadOfTimeBuild(capability, size, time.perf_counter() - started))
        on_build(capability)
    return BuildCheck(model_path, model.precision, f"TensorRT-RTX {trt.__version__}, without a GPU", tuple(builds))


def in_precision(source: ModelFile, precision: Precision) -> ModelFile:
    """``source``, or its graph in half precision, checked like any model file; nothing is written.

    Raises ``UsageError`` if the precision would require a change that was not requested,
    ``BackendUnavailableError`` without onnx-ir, which edits the graph.
    """
    if precision == "fp32" and source.precision != "fp32":
        raise UsageError(
            f"{source.path}: --precision fp32 was requested, but the model holds {source.precision} weights; give the "
            "fp32 model, or --precision fp16"
        )
    if source.precision == "int8":
        raise UsageError(f"{source.path}: int8 models are not built into TensorRT engines; give the fp32 or fp16 model")
    if precision == source.precision or source.precision != "fp32":
        return source
    console.require_packages("tensorrt", "onnx_ir")
    import onnx

    from cellseg_export.forms.fp16_graph import check_types, to_half

    half = to_half(onnx.load_model_from_string(source.data))
    check_types(half)
    return check_model(source.path, half.SerializeToString(deterministic=True))


def _move(temporary: Path, output: Path) -> None:
    """Move both files to their final names. An engine without its own sidecar is never opened, so a
    crash between the steps leaves nothing that runs."""
    try:
        sidecar_path(output).unlink(missing_ok=True)
        temporary.replace(output)
        sidecar_path(temporary).replace(sidecar_path(output))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from error


def _with_path(report: ParityReport, output: Path) -> ParityReport:
    """``report`` with the engine's final name."""
    details: dict[str, Any] = report.candidate.details | {"engine_path": str(output)}
    return dataclasses.replace(report, candidate=dataclasses.replace(report.candidate, details=details))
