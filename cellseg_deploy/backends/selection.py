"""``backend="auto"``: the fastest installed form that passed the gate for this model on this kind of device, in the
requested precision, or by default in the model's own or in fp32.

Candidates are the model file itself in each engine that reads it, and every other file named in its parity records. A
candidate is eligible only if a record says that it counts as the reference does; nothing is assumed about another
engine version, another kind of device, or another file of the same name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.device_class import (
    INSTALL,
    UNKNOWN_DEVICE,
    device_class,
    engine_problem,
    engine_version,
    is_known,
)
from cellseg_deploy.backends.options import PRECISIONS, check_precision
from cellseg_deploy.backends.records import ParityRecord, form_sha256, is_looser, read_records, records_path
from cellseg_deploy.errors import BackendUnavailableError, ParityError, UsageError
from cellseg_deploy.models.onnx_file import read_model_file

_log = logging.getLogger(__name__)

REFERENCES = ("pytorch", "onnxruntime")
"""Engines that a record may have been compared against; any other is itself a form that must be compared."""

_HOW = "`cellseg-export verify REF MODEL --backend {} --record` compares and times it"


@dataclass(frozen=True)
class Form:
    """A file in an engine. ``precision``: as in ``Backend``; ``inference_precision``: what to request from the engine,
    empty if it offers no choice."""

    file: Path
    backend: str
    precision: str
    inference_precision: str = ""

    def __str__(self) -> str:
        rest = self.inference_precision
        extra = f" with {rest}" if rest and rest != self.precision else ""
        return f"{self.backend} {self.precision}{extra} ({self.file.name})"


@dataclass(frozen=True)
class Candidate:
    """``eligible``: runs here, and passed the gate here. ``reason``: why, or why not, as the end of a sentence.
    ``threads``: number it was timed with, None for the engine's default."""

    form: Form
    eligible: bool
    reason: str
    ms_per_tile: float | None = None
    failed: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Selection:
    """The chosen form. ``verified``: it passed the gate for this model on this kind of device."""

    form: Form
    verified: bool
    why: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Here:
    """Inputs of a choice in addition to model and records. ``versions``: per engine, None if it is missing.
    ``problems``: per engine that cannot run on ``device``, the reason, as the end of a sentence."""

    device: str
    device_class: str
    versions: Mapping[str, str | None]
    problems: Mapping[str, str] = field(default_factory=dict)

    def runs(self, backend: str) -> bool:
        """Return whether that engine is installed and has no known problem."""
        return self.versions.get(backend) is not None and backend not in self.problems


def forms_of(model: Path, precision: str, records: Sequence[ParityRecord], device: str) -> list[Form]:
    """Return possible forms: ``model`` (an .onnx whose weights are ``precision``) in each engine for ``device``, then
    those of the records."""
    if device == "cpu":
        forms = [Form(model, "onnxruntime", precision)]
        forms += [Form(model, "openvino", asked, asked) for asked in ("fp32", "bf16")]
    else:
        forms = [Form(model, "onnxruntime", precision), Form(model, "tensorrt", precision)]
    engines = {form.backend for form in forms}
    for record in records:
        if Path(record.file).name != record.file:  # a path could point anywhere; the forms of a model are next to it
            continue
        form = Form(model.with_name(record.file), record.backend, record.precision, record.inference_precision)
        if form not in forms and form.backend in engines:
            forms.append(form)
    return forms


def judge_form(form: Form, identity: str, records: Sequence[ParityRecord], here: Here) -> Candidate:
    """Judge by ``records`` whether ``form`` of the network ``identity`` is eligible."""
    installed = here.versions.get(form.backend)
    if not here.runs(form.backend):
        missing = f"not installed: pip install 'cellseg-deploy[{INSTALL[form.backend]}]'"
        return Candidate(form, False, here.problems.get(form.backend, missing))
    of_form = [r for r in records if _is_of(r, form)]
    if not of_form:
        return Candidate(form, False, f"never compared with the reference: {_HOW.format(form.backend)}")
    of_model = [r for r in of_form if r.model_identity == identity]
    if not of_model:
        return Candidate(form, False, "compared for another network of that name (its identity differs)")
    if not is_known(here.device_class):
        return Candidate(form, False, f"no record can be of {here.device_class}: {UNKNOWN_DEVICE}")
    of_device = [r for r in of_model if r.device_class == here.device_class]
    if not of_device:
        seen = ", ".join(sorted({r.device_class for r in of_model}))
        return Candidate(form, False, f"compared on {seen} only, this is {here.device_class}")
    record = next((r for r in of_device if r.engine_version == installed), None)
    if record is None:
        seen = ", ".join(sorted({r.engine_version for r in of_device}))
        return Candidate(form, False, f"compared with version {seen}, {installed} is installed")
    if not record.passed:
        failed = record.verdict == "failed"  # too few cells to judge is not a failure
        return Candidate(form, False, f"parity {record.verdict} (policy {record.policy})", failed=failed)
    if record.reference not in REFERENCES:
        return Candidate(form, False, f"compared with {record.reference} only: {_HOW.format(form.backend)}")
    if is_looser(record.policy, "fp16" if _may_be_rounded(form) else form.precision):
        return Candidate(form, False, f"judged by policy {record.policy} only: {_HOW.format(form.backend)}")
    if form.file.suffix.lower() != ".onnx" and form_sha256(form.file) != record.file_sha256:
        what = "has changed since it was compared" if form.file.is_file() else "is missing"
        return Candidate(form, False, f"the file {form.file.name} {what}")
    reason = f"passed the gate against {record.reference} (policy {record.policy}), "
    if record.timing is None:
        return Candidate(form, True, reason + "not timed")
    ms, threads = record.timing.ms_per_tile, record.timing.threads
    return Candidate(form, True, reason + _speed(ms, threads), ms, threads=threads)


def candidates_of(
    model: Path, identity: str, precision: str, parity: str, records: Sequence[ParityRecord], here: Here
) -> tuple[Candidate, ...]:
    """Judge every form of ``model``. ``parity``: sentence of the ModelSpec; the export itself compared the file in
    ONNX Runtime on a CPU, so for that form the sentence replaces a missing record.

    Only times taken with one number of threads (the most common) are compared; others count as not timed.
    """
    judged = [judge_form(form, identity, records, here) for form in forms_of(model, precision, records, here.device)]
    references = [
        record.reference_timing
        for record in records
        if (record.model_identity, record.device_class, record.reference)
        == (identity, here.device_class, "onnxruntime")
        and record.reference_timing is not None
        and is_known(here.device_class)
    ]
    counts = Counter(item.threads for item in judged if item.ms_per_tile is not None)
    counts = counts or Counter(timing.threads for timing in references)
    threads = max(counts, key=lambda n: (counts[n], n is None, n or 0), default=None)
    ms = min((timing.ms_per_tile for timing in references if timing.threads == threads), default=None)
    speed = "not timed here" if ms is None else _speed(ms, threads)
    return tuple(
        Candidate(item.form, True, f"passed the gate when the model was exported, {speed}", ms, threads=threads)
        if _passed_at_export(item, model, parity, here)
        else item
        if item.threads == threads
        else replace(item, ms_per_tile=None)
        for item in judged
    )


def as_precise_as(precision: str, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Restrict ``candidates`` of a model with weights in ``precision``, if no precision was requested: only those that
    compute in it or in fp32 stay eligible. That a form passed the gate does not mean that anyone wants it."""

    def judged(candidate: Candidate) -> Candidate:
        of_form = candidate.form.precision
        if not candidate.eligible or (of_form in ("fp32", precision) and of_form in PRECISIONS):
            return candidate
        reason = f"{of_form}, the model is {precision}: used only with `precision={of_form!r}`"
        if of_form not in PRECISIONS:
            reason = f"unknown precision {of_form!r}: never used"
        return replace(candidate, eligible=False, reason=reason)

    return tuple(judged(candidate) for candidate in candidates)


def choose(candidates: Sequence[Candidate], here: Here) -> Selection:
    """Choose the fastest eligible candidate; untimed ones come after timed ones, in order.

    Without any, choose ONNX Runtime, marked unverified: every model file is made for it. Raises
    ``BackendUnavailableError`` if it is unavailable, ``ParityError`` if it was compared and failed.
    """
    all_of_them = tuple(candidates)
    eligible = [c for c in all_of_them if c.eligible]
    if eligible:
        best = min(eligible, key=lambda c: (c.ms_per_tile is None, c.ms_per_tile or 0.0))
        others = len(eligible) - 1
        rank = f"fastest of {len(eligible)} forms that passed: " if others and best.ms_per_tile is not None else ""
        return Selection(best.form, True, rank + best.reason, all_of_them)
    plain = all_of_them[0]
    listing = "".join(f"\n  - {c.form}: {c.reason}" for c in all_of_them)
    if not here.runs(plain.form.backend):
        raise BackendUnavailableError(
            f"no engine here passed the gate for {plain.form.file.name} on {here.device_class}; install one, or "
            f"name one as `backend` to run it unverified:{listing}"
        )
    if plain.failed:
        raise ParityError(
            f"no form of {plain.form.file.name} passed the gate on {here.device_class}; export the model again, or "
            f"name one as `backend` to run it unverified:{listing}"
        )
    return Selection(
        plain.form, False, f"no form passed the gate here; {plain.form.backend} {plain.reason}", all_of_them
    )


def table(selection: Selection, here: Here) -> str:
    """Format the choice and all candidates, one per line."""
    rows = [
        (
            ">" if candidate.form == selection.form else " ",
            str(candidate.form),
            "-" if candidate.ms_per_tile is None else f"{candidate.ms_per_tile:.3g}",
            "yes" if candidate.eligible else "no",
            candidate.reason,
        )
        for candidate in selection.candidates
    ]
    head = (" ", "form", "ms/tile", "passed", "why")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
    lines = [" ".join((*(row[i].ljust(widths[i]) for i in range(4)), row[4])).rstrip() for row in (head, *rows)]
    mark = "verified" if selection.verified else "UNVERIFIED"
    return "\n".join([f"device     {here.device} ({here.device_class})", *lines,
                      f"chosen     {selection.form}, {mark}: {selection.why}"])  # fmt: skip


def _speed(ms_per_tile: float, threads: int | None) -> str:
    return f"{ms_per_tile:.3g} ms per tile" + (
        "" if threads is None else f" with {threads} thread{'s' * (threads > 1)}"
    )


def _may_be_rounded(form: Form) -> bool:
    """Return whether weights may be rounded: an .xml may store fp16, compute in fp32, and is then judged as fp16."""
    return form.precision == "fp32" and form.file.suffix.lower() == ".xml"


def _is_of(record: ParityRecord, form: Form) -> bool:
    return (record.file, record.backend, record.precision, record.inference_precision) == (
        form.file.name,
        form.backend,
        form.precision,
        form.inference_precision,
    )


def _passed_at_export(item: Candidate, model: Path, parity: str, here: Here) -> bool:
    if item.eligible or item.failed or not here.runs("onnxruntime") or here.device != "cpu":
        return False
    return item.form.backend == "onnxruntime" and item.form.file == model and parity.startswith("verified")


# ------------------------------------------------------------------------------- on this machine, for a model file


def here(device: str) -> Here:
    """Describe this machine, for forms that run on ``device``."""
    problems = {name: problem for name in INSTALL if (problem := engine_problem(name, device))}
    return Here(device, device_class(device), {name: engine_version(name) for name in INSTALL}, problems)


def select(model: Path, *, device: str = "cpu", precision: str | None = None) -> tuple[Selection, Here]:
    """Return the form of the .onnx file ``model`` to run on ``device``, and the facts it was chosen by.

    ``precision``: only forms that compute in it; None for those that compute in the model's own or in fp32.
    Raises ``UsageError`` for an unknown precision, ``ModelError`` for a damaged model or damaged records,
    ``BackendUnavailableError`` or ``ParityError`` if there is nothing to choose (see ``selection.choose``).
    """
    if model.suffix.lower() != ".onnx":
        raise UsageError(f"{model}: only an .onnx file offers a choice of engines; this file has its own")
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
                    f"precision {precision} was requested, but no engine runs {model.name} in it on {device}"
                )
        selection = choose(found, machine)
        try:
            _load(selection.form.backend, device)
        except BackendUnavailableError as error:
            engine = selection.form.backend
            _log.warning("%s was chosen but cannot run; using the next form: %s", selection.form, error)
            machine = replace(machine, problems={**machine.problems, engine: f"cannot be loaded: {error}"})
            passed_over += f"; {selection.form} was chosen before it, but cannot be loaded"
            continue
        return replace(selection, why=selection.why + passed_over), machine


def _load(engine: str, device: str) -> None:
    """Load ``engine`` as opening a form does; raises ``BackendUnavailableError`` on failure."""
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
    """Return the form of ``backend``, opened from ``file``."""
    return Form(file, backend.name, backend.precision, str(backend.describe().get("inference_precision", "")))


def verdict_on(backend: Backend, file: Path) -> tuple[bool, str]:
    """Return whether the explicitly named ``file`` passed the gate here, and the evidence."""
    if backend.name == "tensorrt":  # its sidecar was checked against this GPU at opening
        return backend.spec.parity.startswith("verified"), backend.spec.parity
    if backend.name == "onnxruntime" and backend.device == "cpu" and backend.spec.parity.startswith("verified"):
        return True, backend.spec.parity
    identity = str(backend.describe()["model_identity"])
    judged = judge_form(form_of(backend, file), identity, read_records(records_path(file)), here(backend.device))
    return judged.eligible, judged.reason
