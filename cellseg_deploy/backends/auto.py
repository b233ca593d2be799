"""What ``selection`` decides by, gathered from this machine and from the files beside a model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from cellseg_deploy.backends import check_precision
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.device_class import INSTALL, device_class, engine_problem, engine_version
from cellseg_deploy.backends.records import read_records, records_path
from cellseg_deploy.backends.selection import (
    Candidate,
    Form,
    Here,
    Selection,
    as_precise_as,
    candidates_of,
    choose,
    judge_form,
)
from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file

_log = logging.getLogger(__name__)


def here(device: str) -> Here:
    """This machine, for forms that run on ``device``."""
    problems = {name: problem for name in INSTALL if (problem := engine_problem(name, device))}
    return Here(device, device_class(device), {name: engine_version(name) for name in INSTALL}, problems)


def select(model: Path, *, device: str = "cpu", precision: str | None = None) -> tuple[Selection, Here]:
    """The form of the .onnx file ``model`` to run on ``device``, and what it was chosen by.

    ``precision``: only forms that compute in it; None for those that compute in the model's own or in fp32.
    Raises ``UsageError`` for an unknown precision, ``ModelError`` for a model or records that are damaged,
    ``BackendUnavailableError`` or ``ParityError`` if there is nothing to choose (see ``selection.choose``).
    """
    if model.suffix.lower() != ".onnx":
        raise UsageError(f"{model}: only an .onnx file leaves a choice of engines; this one opens its own")
    check_precision(precision)
    machine = here(device)
    file = read_model_file(model)
    records = read_records(records_path(model))
    passed_over = ""
    while True:  # ends: an engine that cannot be loaded is not chosen again
        found = candidates_of(model, file.identity, file.precision, file.spec.parity, records, machine)
        if precision is None:
            found = as_precise_as(file.precision, found)
        else:
            found = tuple(c for c in found if c.form.precision == precision)
            if not found:
                raise BackendUnavailableError(
                    f"precision {precision} was asked for, but no engine runs {model.name} in it on {device}"
                )
        selection = choose(found, machine)
        try:
            _load(selection.form.backend, device)
        except BackendUnavailableError as error:
            engine = selection.form.backend
            _log.warning("%s was chosen but cannot run, the next form is taken: %s", selection.form, error)
            machine = replace(machine, problems={**machine.problems, engine: f"cannot be loaded: {error}"})
            passed_over += f"; {selection.form} was chosen before it, but cannot be loaded"
            continue
        return replace(selection, why=selection.why + passed_over), machine


def _load(engine: str, device: str) -> None:
    """Load ``engine`` as opening a form does; raises ``BackendUnavailableError`` if that fails."""
    if engine == "openvino":
        from cellseg_deploy.backends.openvino import import_openvino

        import_openvino()
    elif engine == "onnxruntime":
        from cellseg_deploy.backends.onnxruntime import import_runtime

        import_runtime(device)
    else:
        from cellseg_deploy.backends.tensorrt import import_tensorrt

        import_tensorrt()


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
