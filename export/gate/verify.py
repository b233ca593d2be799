"""The parity gate with its inputs: which forms, which images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellseg_deploy.backends import ENGINE_SUFFIX, OPENVINO_SUFFIX, EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.onnxruntime import OnnxRuntimeBackend
from cellseg_deploy.errors import BackendUnavailableError, ParityError, UsageError
from cellseg_deploy.images.find import require_images
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import check_same_size, pair_by_stem, read_image, read_labels
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.parity.compare import (
    Labels,
    NamedImage,
    ParityPolicy,
    ParityReport,
    compare,
    middle_tile,
    policy_for,
)
from cellseg_deploy.samples import Smear, SmearParams, make_smear, random_params

if TYPE_CHECKING:
    from cellseg_train.checkpoint import LoadedNetwork

SAMPLE_SEED = 20261
N_SAMPLES = 4
_HALF = ("fp16", "mixed")
_SMALLEST_CELL_PX = 12.0  # SmearParams does not draw smaller ones


@dataclass(frozen=True)
class GateImages:
    """Images for a gate, made or read one at a time.

    ``source``: description for the report. ``truth``: true labels of the image of that name, which ``load`` has just
    returned; None if unknown.
    """

    source: str
    load: Callable[[], Iterator[NamedImage]]
    truth: Callable[[str], Labels] | None = None


def sample_images(spec: ModelSpec, n: int = N_SAMPLES) -> GateImages:
    """``n`` synthetic smears, always the same for one model, with cells as large as those it was trained on.

    Every other smear imitates another laboratory, so that colours vary; about 90 cells per image.
    """
    # About cells of 90 px, in an image of 1600 x 1200, everything else is in proportion.
    diameter = max(spec.cell_diameter_px / spec.image_scale, _SMALLEST_CELL_PX)
    zoom = diameter / SmearParams().cell_diameter_px
    height, width = (max(64, round(side * zoom)) for side in SmearParams().size_hw)

    def smear(i: int) -> Smear:
        if i % 2:
            rng = np.random.default_rng((SAMPLE_SEED, i))
            params = random_params(rng, size_hw=(height, width), cell_diameter_px=diameter)
            params = replace(params, n_cells=SmearParams().n_cells)
        else:
            params = replace(SmearParams(), size_hw=(height, width), cell_diameter_px=diameter)
        return make_smear(params, SAMPLE_SEED + i)

    true: dict[str, Labels] = {}

    def load() -> Iterator[NamedImage]:
        for i in range(n):
            made = smear(i)
            true[f"sample-{i}"] = made.labels_hw
            yield f"sample-{i}", made.image_hwc

    source = f"sample smears made by the package, seed {SAMPLE_SEED}, cells of {diameter:.0f} px"
    return GateImages(source, load, true.__getitem__)


def folder_images(folder: Path, masks: Path | None = None, foreground: MaskForeground = "auto") -> GateImages:
    """The images in ``folder``, with the masks or label images in ``masks``, paired by stem, as their truth.
    ``foreground``: which mask values are cells, as in ``read_labels``.

    Raises ``NothingToDoError`` if there is no image, ``DataError`` if one has no partner. An unreadable image is an
    error when it is reached, because a gate that skips images proves less than it reports.
    """
    if masks is not None:
        return _pairs(folder, masks, foreground)
    found = require_images([folder], follow_links=True)

    def load() -> Iterator[NamedImage]:
        for image in found:
            yield image.name, read_image(image.path).pixels_hwc

    return GateImages(f"folder {folder.name}", load)


def _pairs(folder: Path, masks: Path, foreground: MaskForeground) -> GateImages:
    pairs = pair_by_stem(folder, masks)
    true: dict[str, Labels] = {}

    def load() -> Iterator[NamedImage]:
        for pair in pairs:
            image, labels = read_image(pair.image).pixels_hwc, read_labels(pair.mask, foreground=foreground)
            check_same_size(pair, (image.shape[0], image.shape[1]), (labels.shape[0], labels.shape[1]))
            true.clear()  # one at a time: a folder may hold thousands
            true[pair.stem] = labels
            yield pair.stem, image

    return GateImages(f"folder {folder.name}, truth in {masks.name}", load, true.__getitem__)


def open_form(
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Backend:
    """Open any form of a network: a training run or its ``.safetensors`` in PyTorch, an ``.onnx`` in ONNX Runtime, an
    ``.xml`` in OpenVINO, an ``.engine`` in TensorRT on the GPU.

    ``backend``: another engine for an ``.onnx``; never ``auto``, because a comparison must not depend on what an
    earlier one recorded. ``precision``: arithmetic of OpenVINO, ``fp32`` or ``bf16``.
    """
    suffix = path.suffix.lower()
    if suffix == ENGINE_SUFFIX or (suffix == ".onnx" and backend == "tensorrt"):
        # The only device kind for an engine.
        gpu = "cuda" if device == "cpu" else device
        return open_backend(path, EngineOptions("tensorrt", gpu))
    if suffix in (".onnx", OPENVINO_SUFFIX):
        own = "openvino" if suffix == OPENVINO_SUFFIX else "onnxruntime"
        return open_backend(path, EngineOptions(backend or own, device, precision, threads))
    if path.is_dir() or suffix == ".safetensors":
        if (backend, precision) != (None, None):
            raise UsageError(
                f"{path}: PyTorch runs a training run, in fp32; --backend and --precision are for an .onnx"
            )
        from cellseg_export.gate.torch_backend import TorchBackend
        from cellseg_train.checkpoint import load_network

        return TorchBackend(load_network(path), device)
    raise UsageError(f"{path}: expected a training run folder, its model.safetensors, an .onnx, an .xml or an .engine")


def verify(
    reference: Backend,
    candidate: Backend,
    images: GateImages,
    policy: ParityPolicy | None = None,
    *,
    batch_size: int = 8,
    on_image: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run ``parity.compare`` on ``images``; the report names their source.

    ``policy``: by default the one for the candidate's precision. A half-precision ONNX file on the CPU is also run in
    real half arithmetic, because ONNX Runtime would hide an overflow there: the results are in ``faults`` and
    ``notes``.
    """
    policy = policy or policy_for(candidate.precision)

    def run(expected: Backend) -> ParityReport:
        return compare(
            expected,
            candidate,
            images.load(),
            policy,
            truth=images.truth,
            images_from=images.source,
            batch_size=batch_size,
            on_image=on_image,
        )

    if isinstance(candidate, OnnxRuntimeBackend) and candidate.precision in _HALF and candidate.device == "cpu":
        return _with_half_check(run, reference, candidate, images, policy, batch_size)
    return run(reference)


def look_inside(report: ParityReport, network: LoadedNetwork, path: Path, images: GateImages) -> ParityReport:
    """``report`` of ``network`` against the ``.onnx`` file ``path``, with the module at which the two diverge.

    Unchanged if it passed. Close the candidate first: a large model would be in memory twice.
    """
    from cellseg_export.gate.divergence import TOLERANCE, locate_fault

    if report.verdict == "passed":
        return report
    _, image_hwc = next(images.load())
    tolerance = TOLERANCE[report.candidate.precision]
    fault = locate_fault(network, path, middle_tile(network.spec, image_hwc), tolerance=tolerance)
    return replace(report, parts_at=fault)


def _with_half_check(
    run: Callable[[Backend], ParityReport],
    reference: Backend,
    candidate: OnnxRuntimeBackend,
    images: GateImages,
    policy: ParityPolicy,
    batch_size: int,
) -> ParityReport:
    """Result of ``run(reference)``, extended by the findings of real half arithmetic."""
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError(
            "a half-precision model is checked in PyTorch's half arithmetic, because ONNX Runtime hides an "
            "overflow on the CPU, and PyTorch is not installed; run: pip install 'cellseg-deploy[export]'"
        )
    import onnx

    from cellseg_export.forms.fp16_graph import float_parts, parts_of
    from cellseg_export.gate.mixed_precision import Remembered, check_in_half

    reference = Remembered(reference)
    model = onnx.load_model_from_string(candidate.model_file.data)
    try:
        report = run(reference)
    except ParityError as error:  # an overflow that even ONNX Runtime cannot hide: locate it
        outcome = check_in_half(model, candidate.spec, reference, images, policy, batch_size=batch_size)
        raise ParityError("\n  - ".join((str(error), *outcome.faults))) from error
    outcome = check_in_half(model, candidate.spec, reference, images, policy, batch_size=batch_size)
    kept = float_parts(model)
    notes = (f"kept in FP32: {', '.join(kept)} ({len(kept)} of {len(parts_of(model))} parts)",) if kept else ()
    return replace(report, faults=(*report.faults, *outcome.faults), notes=(*report.notes, *notes, *outcome.notes))
