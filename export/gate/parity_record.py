"""Build the parity record that ``--backend auto`` uses from a gate's report and timings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.device_class import UNKNOWN_DEVICE, device_class, engine_version, is_known
from cellseg_deploy.backends.records import ParityRecord, Timing, add_record, form_sha256, is_looser, records_path
from cellseg_deploy.backends.selection import REFERENCES, form_of
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
from cellseg_deploy.parity.compare import ParityReport, middle_tile
from cellseg_deploy.parity.policy import ParityPolicy
from cellseg_export.gate.verify import GateImages

_SECONDS = 3.0
_CALLS = (3, 20)


def time_backend(
    backend: Backend, tile_nhwc: npt.NDArray[np.uint8], *, batch_size: int = 8, seconds: float = _SECONDS
) -> Timing:
    """Median time of ``backend`` for a batch of ``tile_nhwc`` (1, H, W, 3), after a first call that is not counted.

    A backend returns when it is done, so nothing is still running when the timer stops. 3 to 20 calls, at most
    ``seconds`` once there are 3.
    """
    tiles = np.repeat(tile_nhwc, batch_size, axis=0)
    backend.predict(tiles)
    taken: list[float] = []
    while len(taken) < _CALLS[0] or (sum(taken) < seconds and len(taken) < _CALLS[1]):
        start = time.perf_counter()
        backend.predict(tiles)
        taken.append(time.perf_counter() - start)
    return Timing(
        ms_per_tile=round(1000 * statistics.median(taken) / batch_size, 4),
        batch_size=batch_size,
        calls=len(taken),
        threads=backend.describe().get("threads"),
    )


def make_record(
    report: ParityReport,
    candidate: Backend,
    path: Path,
    *,
    timing: Timing | None = None,
    reference_timing: Timing | None = None,
) -> ParityRecord:
    """Record of ``candidate``, opened from ``path`` (or intended for it, if refused), from the gate's ``report``;
    errors as ``check_recordable``."""
    identity, version = _network_and_version(candidate, path)
    form = form_of(candidate, path)
    return ParityRecord(
        file=path.name,
        file_sha256=form_sha256(path),
        model_identity=identity,
        backend=form.backend,
        precision=form.precision,
        inference_precision=form.inference_precision,
        engine_version=version,
        device_class=device_class(candidate.device),
        verdict=report.verdict,
        policy=report.policy.name,
        reference=report.reference.backend,
        images_from=report.images_from,
        figures={task: report.summary(task) for task in report.tasks},
        timing=timing,
        reference_timing=reference_timing,
        program=f"cellseg-deploy {_version()}",
    )


def check_recordable(reference: Backend, candidate: Backend, path: Path, policy: ParityPolicy) -> None:
    """Raise unless a comparison by ``policy`` may be recorded for ``candidate``, opened from ``path``.

    ``BackendUnavailableError`` for a GPU that cannot be queried; ``UsageError`` for PyTorch, which cellseg-infer does
    not run, for a reference that is the same form, or not a reference at all, and for a policy looser than the form's
    own; ``ModelError`` for a form of unknown network.
    """
    if candidate.name == "pytorch":
        raise UsageError(
            f"{path}: records are kept only for forms that cellseg-infer runs; this is the PyTorch network itself"
        )
    identity, _ = _network_and_version(candidate, path)
    if not is_known(kind := device_class(candidate.device)):
        raise BackendUnavailableError(f"{path}: no record can be kept of {kind}: {UNKNOWN_DEVICE}")
    if reference.name not in REFERENCES:
        raise UsageError(
            f"{path}: records are kept only for comparisons with {' or '.join(REFERENCES)}, not with {reference.name}"
        )
    same = (reference.name, reference.device) == (candidate.name, candidate.device)
    if same and reference.describe().get("model_identity") == identity:
        raise UsageError(f"{path}: a form compared with itself proves nothing, so no record is kept of it")
    facts = candidate.describe()
    own = "fp16" if (facts.get("weights"), candidate.precision) == ("fp16", "fp32") else candidate.precision
    if is_looser(policy.name, own):
        raise UsageError(f"{path}: policy {policy.name} is weaker than a form in {own} requires; no record is kept")


def record_form(
    report: ParityReport,
    reference: Backend,
    candidate: Backend,
    path: Path,
    images: GateImages,
    beside: Iterable[Path],
    *,
    batch_size: int = 8,
) -> ParityRecord:
    """Time both forms on the first of ``images``, and add the record of ``candidate`` next to each model of ``beside``
    that is in the folder of ``path``, because records name files without a folder. Errors as ``check_recordable``."""
    check_recordable(reference, candidate, path, report.policy)
    _, image_hwc = next(images.load())
    tile = middle_tile(candidate.spec, image_hwc)
    record = make_record(
        report,
        candidate,
        path,
        timing=time_backend(candidate, tile, batch_size=batch_size),
        reference_timing=time_backend(reference, tile, batch_size=batch_size) if reference.name != "pytorch" else None,
    )
    _add(record, path, beside)
    return record


def record_refusal(report: ParityReport, candidate: Backend, path: Path, beside: Iterable[Path]) -> None:
    """Add to the records of ``beside``, as ``record_form`` does, that the form meant for ``path`` failed.

    Nothing is added if an older file, which may well have passed, keeps that name, or if the gate was inconclusive.
    """
    if report.verdict == "failed" and not path.exists():
        _add(make_record(report, candidate, path), path, beside)


def _add(record: ParityRecord, path: Path, beside: Iterable[Path]) -> None:
    for place in {records_path(model) for model in beside if model.parent.resolve() == path.parent.resolve()}:
        add_record(place, record)


def _network_and_version(candidate: Backend, path: Path) -> tuple[str, str]:
    """Identity of the network of ``candidate``, and the version of its engine; raises ``ModelError`` if unknown."""
    identity, version = candidate.describe().get("model_identity"), engine_version(candidate.name)
    if not identity or version is None:
        raise ModelError(f"{path}: {candidate.name} does not say which network this is; export the form again")
    return str(identity), version


def _version() -> str:
    from importlib.metadata import version

    return version("cellseg-deploy")
