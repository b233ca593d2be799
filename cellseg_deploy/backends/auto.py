"""What ``selection`` decides by, gathered from this machine and from the files beside a model."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.device_class import device_class, engine_version
from cellseg_deploy.backends.selection import (
    INSTALL,
    Candidate,
    Form,
    Here,
    Selection,
    candidates_of,
    choose,
    judge_form,
)
from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.model_file import read_model_file
from cellseg_deploy.parity_records import read_records, records_path


def here(device: str) -> Here:
    """This machine, for forms that run on ``device``."""
    return Here(device, device_class(device), {name: engine_version(name) for name in INSTALL})


def select(model: Path, *, device: str = "cpu", precision: str | None = None) -> tuple[Selection, Here]:
    """The form of the .onnx file ``model`` to run on ``device``, and what it was chosen by.

    ``precision``: only forms that compute in it. Raises ``ModelError`` for a model or records that are damaged,
    ``BackendUnavailableError`` or ``ParityError`` if there is nothing to choose (see ``selection.choose``).
    """
    if model.suffix.lower() != ".onnx":
        raise UsageError(f"{model}: only an .onnx file leaves a choice of engines; this one opens its own")
    file = read_model_file(model)
    machine = here(device)
    found = candidates_of(
        model, file.identity, file.precision, file.spec.parity, read_records(records_path(model)), machine
    )
    if precision is not None:
        found = tuple(c for c in found if c.form.precision == precision)
        if not found:
            raise BackendUnavailableError(
                f"precision {precision} was asked for, but no engine runs {model.name} in it on {device}"
            )
    return choose(found, machine), machine


def form_of(backend: Backend, file: Path) -> Form:
    """The form that ``backend``, opened from ``file``, is."""
    return Form(file, backend.name, backend.precision, str(backend.describe().get("inference_precision", "")))


def verdict_on(backend: Backend, file: Path) -> tuple[bool, str]:
    """Whether what was opened from ``file`` by its name passed the gate here, and by what that is known."""
    if backend.name == "tensorrt":  # its sidecar was checked against this very GPU when it was opened
        return backend.spec.parity.startswith("verified"), backend.spec.parity
    if backend.name == "onnxruntime" and backend.device == "cpu" and backend.spec.parity.startswith("verified"):
        return True, backend.spec.parity
    identity = str(backend.describe()["model_identity"])
    judged: Candidate = judge_form(
        form_of(backend, file), identity, read_records(records_path(file)), here(backend.device)
    )
    return judged.eligible, judged.reason
