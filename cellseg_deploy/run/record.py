"""Options, totals and identity of a folder run, and run.json: the record of model, engine, settings and times."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.field_of_view import Field, check_field
from cellseg_deploy.cells.scale import check_scale
from cellseg_deploy.errors import UsageError
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.files.urls import text_of
from cellseg_deploy.images.find import absolute, input_roots
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.models.spec import to_json
from cellseg_deploy.outputs.formats import DEFAULT, NAMES, Format, chosen_formats
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.report.groups import grouping
from cellseg_deploy.report.thresholds import MAX_IMAGES
from cellseg_deploy.run.elsewhere import Elsewhere
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.journal import ImageRecord
from cellseg_deploy.run.output_folder import PROGRAM
from cellseg_deploy.run.plan import RunPlan
from cellseg_deploy.run.shard import Shard
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

if TYPE_CHECKING:
    from cellseg_deploy.run.streamed import OnStream

EDITED = "edited"
"""In run.json: result files that somebody edited."""

MEASURED = "measured"
"""Recorded as the scale if it was measured per group of images. Earlier versions measured each image: ``auto``."""

SHARD = "shard"
"""Among the settings of a run's identity: which shard of a whole run it is, as ``2/4``."""

SKIPPED = "skipped"
"""Status of an image that an earlier run had done."""

_LIBRARIES = ("numpy", "opencv-python-headless", "scikit-image", "scipy", "pillow", "tifffile", "imagecodecs")
# Properties of an engine that change no result: location of its file, amount of work at a time.
_WITHOUT_EFFECT = frozenset(
    (
        *("threads", "streams", "static_batch", "batch_profile", "cuda_graph"),
        *("engine_path", "nodes_by_provider"),
    )
)


@dataclass(frozen=True)
class RunOptions:
    """Options for reading and writing, with the defaults of ``cellseg-infer``; ``UsageError`` for invalid values.

    ``save``: kinds of files to write, names of ``outputs.formats.FORMATS``. ``overwrite``: replace an earlier run in
    the folder; otherwise it is resumed. ``field_of_view``: ``full`` takes the whole image as the field of view,
    surround included. ``scales``: by group of images, as measured by an earlier run (see
    ``images.groups``); these are not measured again.
    ``group_by``: how images are grouped in summary.csv and the report, see ``report.groups``. ``report``:
    whether to write report.html and the files for MultiQC; ``report_thresholds``: number of images with a slider
    there. None of these three changes a result. ``shard``: do only its images, as a run of all would do them; see
    ``merge``. ``memory``: bytes that the windows of an image that is read by region may take, None for half of what is
    free; it changes no result.
    """

    save: tuple[str, ...] = DEFAULT
    overwrite: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)
    count_rule: CountRule = DEFAULT_RULE
    field_of_view: Field = "auto"
    group_by: str = ""
    report: bool = True
    report_thresholds: int = 0
    scales: Mapping[str, float] = field(default_factory=dict)
    shard: Shard | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        chosen_formats(self.save)
        check_rule(self.count_rule)
        check_field(self.field_of_view)
        grouping(self.group_by)
        if not 0 <= self.report_thresholds <= MAX_IMAGES:
            raise UsageError(f"`report_thresholds` must be 0 to {MAX_IMAGES} images, got {self.report_thresholds}")


@dataclass(frozen=True)
class Inputs:
    """``paths``: files and folders that were passed, absolute. ``roots``: the folders that names are relative to."""

    paths: tuple[str, ...]
    roots: tuple[str, ...]
    follow_links: bool = False

    @classmethod
    def of(cls, paths: Iterable[Path], *, follow_links: bool = False) -> Inputs:
        """Return the inputs for the ``paths`` passed to ``find_images``. Raises ``UsageError`` as it does."""
        paths = list(paths)
        roots = input_roots(paths)
        return cls(tuple(text_of(absolute(path)) for path in paths), tuple(map(text_of, roots)), follow_links)


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One line of images.csv. ``status`` is ``done`` or ``failed``; a failed image has an error and no numbers.

    ``cells``: all cells found; ``counted``: cells that the count rule includes. ``seconds``: by stage; a network call
    with tiles of several images is shared among them. ``by_class``: cells of each class that the count rule includes,
    if the model distinguishes classes.
    """

    image: str
    status: str
    cells: int | None = None
    counted: int | None = None
    confluence: float | None = None
    field_of_view_share: float | None = None
    median_cell_area_px: float | None = None
    scale: float | None = None
    warning: str = ""
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    by_class: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, record: ImageRecord) -> ImageResult:
        """Return the result that the journal records for an image."""
        known = {field.name for field in fields(cls)}
        numbers = {name: value for name, value in record.result.items() if name in known}
        return cls(record.image, record.status, seconds=record.seconds, **numbers)


@dataclass
class RunSummary:
    """Totals of a run; ``remaining`` is 0 unless the run was stopped.

    ``images``: result of each image that was passed, by name; its status is also ``skipped``, or "" while pending.
    ``others``: number of table rows of other images. ``warnings``: warnings in all rows
    of the tables as last written, see ``tables.warned``. ``classes``: classes that the model distinguishes;
    ``counting``: classes that count as cells.
    ``shard``: see ``shard.record_of``; None for a whole run.
    ``edited``: files of images, relative to ``output``, that somebody edited after they were written; they are kept.
    ``stage_seconds``: sums over images; images overlap, so the sums may exceed ``wall_seconds``. ``engine_seconds``:
    time during which a network call was running. ``idle_seconds``: time without images, of a watched folder.
    """

    output: Path
    images: dict[str, ImageResult] = field(default_factory=dict)
    others: int = 0
    wall_seconds: float = 0.0
    idle_seconds: float = 0.0
    engine_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, dict[str, Any]] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)
    classes: tuple[str, ...] = ()
    counting: tuple[str, ...] = ()
    shard: dict[str, Any] | None = None

    @property
    def found(self) -> int:
        """Images that were passed."""
        return len(self.images)

    @property
    def done(self) -> int:
        """Images that were done by this run."""
        return self._with("done")

    @property
    def failed(self) -> int:
        """Images that failed in this run."""
        return self._with("failed")

    @property
    def skipped(self) -> int:
        """Images already done by the earlier run that this one resumed."""
        return self._with(SKIPPED)

    @property
    def remaining(self) -> int:
        """Images that are still to be done."""
        return self._with("")

    @property
    def cells(self) -> int:
        """Cells of all images that are done or skipped."""
        return sum(image.cells or 0 for image in self.images.values())

    @property
    def counted(self) -> int:
        """Cells that the count rule includes, of the same images."""
        return sum(image.counted or 0 for image in self.images.values())

    @property
    def by_class(self) -> dict[str, int]:
        """As ``counted``, per class of the model, including classes that do not count as cells."""
        return {name: sum(image.by_class.get(name, 0) for image in self.images.values()) for name in self.classes}

    @property
    def edited_files(self) -> list[str]:
        """``edited``, sorted, for run.json and ``--json``."""
        return [utf8(name) for name in sorted(self.edited)]

    @property
    def totals(self) -> dict[str, Any]:
        """Totals for run.json: over all images that were passed, whichever run did them."""
        return {
            "found": self.found,
            "done": self.done + self.skipped,
            "failed": self.failed,
            "remaining": self.remaining,
            "cells": self.cells,
            "counted": self.counted,
            **({"by_class": self.by_class} if self.classes else {}),
        }

    @property
    def engine_busy(self) -> float:
        """Share of the time at work during which the network ran, 0 to 1."""
        seconds = self.wall_seconds - self.idle_seconds
        return self.engine_seconds / seconds if seconds > 0 else 0.0

    def add(self, result: ImageResult, status: str | None = None) -> None:
        """Count an image; ``status`` overrides the status of the result. The last call for an image holds."""
        self.images[result.image] = replace(result, status=status or result.status, seconds={})
        for stage, seconds in result.seconds.items() if status is None else ():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def _with(self, status: str) -> int:
        return sum(image.status == status for image in self.images.values())


@dataclass(frozen=True)
class RunSetup:
    """Settings of a run, except its images.

    ``on_result``: called with each processed image, in the order of the run; ``on_plan``: called with the plan of each
    round before its work begins; ``on_scale``: called with one line per measured scale; ``on_stream``: see
    ``streamed.OnStream``. ``tables_seconds``: interval at which tables are written while there are new results; None:
    only at the end. ``elsewhere``: does the images, None for this process.
    """

    segmenter: Segmenter
    out: Path
    options: RunOptions
    threads: ThreadPlan
    inputs: Inputs
    on_result: Callable[[ImageResult], None] | None = None
    on_plan: Callable[[RunPlan], None] | None = None
    on_scale: Callable[[str], None] | None = None
    on_stream: OnStream | None = None
    tables_seconds: float | None = None
    elsewhere: Elsewhere | None = None

    @cached_property
    def identity(self) -> RunIdentity:
        """Identity of the run: everything that its results depend on."""
        return identity_of(self.segmenter, self.options, self.inputs)

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """The kinds of files to write."""
        return chosen_formats(self.options.save)


def run_json(
    setup: RunSetup, summary: RunSummary, *, status: str, started: datetime.datetime, scales: Mapping[str, float]
) -> bytes:
    """Content of run.json, enough to repeat the run; ``status``: ``running``, ``finished`` or ``stopped``."""
    segmenter, identity = setup.segmenter, setup.identity
    backend, spec = segmenter.backend, segmenter.backend.spec
    engine = backend.describe()
    record = {
        "program": PROGRAM,
        "version": version("cellseg-deploy"),
        "status": status,
        "model": {
            "name": spec.name,
            "variant": spec.variant,
            "path": None if backend.path is None else str(absolute(backend.path)),
            "given": None if backend.given is None else str(absolute(backend.given)),
            "parity": spec.parity,
            **{key: engine.pop(key) for key in sorted(engine) if key.startswith("model_")},
        },
        "backend": {
            "name": backend.name,
            "device": backend.device,
            "precision": backend.precision,
            "verified": backend.verified,
            "choice": backend.choice,
            **engine,
        },
        "task": identity.task,
        "operating_point": identity.operating_point,
        "settings": {
            **msgspec.to_builtins(setup.options.reading),
            **identity.settings,
            "save": list(setup.options.save),
            "overwrite": setup.options.overwrite,
            "tile_size": spec.tile_size,
            "batch_size": segmenter.batch_size,
            "scales": dict(scales),
        },
        "inputs": {"paths": list(setup.inputs.paths), "follow_links": setup.inputs.follow_links},
        "identity": identity.to_json(),
        "versions": {"python": platform.python_version(), **identity.versions},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "threads": msgspec.to_builtins(setup.threads),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(summary.wall_seconds, 3),
        "engine_busy": round(summary.engine_busy, 4),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in summary.stage_seconds.items()},
        "totals": summary.totals,
        "warnings": summary.warnings,
        EDITED: summary.edited_files,
        # The model's description, so that shards can be merged where the model is not.
        **({} if summary.shard is None else {"shard": {**summary.shard, "model_spec": json.loads(to_json(spec))}}),
    }
    # Paths that are not valid UTF-8 are kept as escapes.
    return json.dumps(record, indent=2, allow_nan=False).encode("ascii") + b"\n"


def with_edited_files(record: Path, summary: RunSummary) -> bytes | None:
    """Content of ``record``, a run.json of earlier work, with its edited files updated; None if nothing changed.

    Edited files of images that were not passed this time stay listed.
    """
    content = content_of(record)
    before = content.get(EDITED, [])
    edited = sorted({*before, *summary.edited_files}) if summary.others else summary.edited_files
    if before == edited:
        return None
    return json.dumps({**content, EDITED: edited}, indent=2, allow_nan=False).encode("ascii") + b"\n"


def scales_in(record: Path) -> dict[str, float]:
    """Return the measured scales recorded in ``record``, a run.json, by group of images; empty if it is invalid."""
    try:
        said = content_of(record)["settings"]["scales"]
        return {str(group): check_scale(float(scale)) for group, scale in said.items()}
    except (KeyError, TypeError, ValueError, AttributeError, UsageError):
        return {}


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of the libraries that compute or encode."""
    return {name: version(name) for name in _LIBRARIES}


def program() -> str:
    """Name and version of the program whose runs these are, whichever command writes them."""
    return f"{PROGRAM} {version('cellseg-deploy')}"


def identity_of(segmenter: Segmenter, options: RunOptions, inputs: Inputs) -> RunIdentity:
    """The identity of a run of ``segmenter`` over ``inputs``."""
    backend, spec = segmenter.backend, segmenter.backend.spec
    facts = backend.describe()
    engine = {
        name: value for name, value in facts.items() if name not in _WITHOUT_EFFECT and not name.startswith("model_")
    }
    return RunIdentity(
        program=program(),
        model={
            "name": spec.name,
            "sha256": facts.get("model_file_sha256"),
            "given_sha256": _given_sha256(backend),
            "identity": facts.get("model_identity"),
        },
        backend={
            "name": backend.name,
            "device": backend.device,
            "precision": backend.precision,
            "form": backend.path.name if backend.path else "",
            **engine,
        },
        task=segmenter.task,
        operating_point=msgspec.to_builtins(segmenter.params),
        settings={  # by argument name
            "scale": MEASURED if segmenter.auto_scale else segmenter.scale,
            "halo": segmenter.halo,
            "bit_depth": options.reading.bit_depth,
            "pixel_size_um": options.reading.pixel_size_um,
            "count_rule": options.count_rule,
            "border_cells": segmenter.border_cells,
            "field_of_view": options.field_of_view,
            **({"classes": list(segmenter.counting_classes)} if spec.classes else {}),
            **({} if options.shard is None else {SHARD: str(options.shard)}),
        },
        saved=tuple(name for name in NAMES if name in options.save),
        versions=library_versions(),
        inputs=inputs.roots,
    )


def _given_sha256(backend: Backend) -> str | None:
    """SHA-256 of the model file that was passed, which may differ from the file that is run."""
    if backend.given is None:
        return None
    known = backend.describe().get("model_file_sha256") if backend.given == backend.path else None
    return known if known and backend.given.suffix.lower() == ".onnx" else sha256_of(backend.given)
