"""What a folder run was asked for, what became of each image, and run.json: what ran, with what, how long."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.field_of_view import Field, check_field
from cellseg_deploy.cells.scale import check_scale
from cellseg_deploy.errors import UsageError
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.images.find import absolute, input_roots
from cellseg_deploy.images.read import MAX_PIXELS, check_settings
from cellseg_deploy.outputs.formats import DEFAULT, chosen_formats
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.journal import ImageRecord
from cellseg_deploy.run.output_folder import PROGRAM
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

EDITED = "edited"
"""In run.json: result files that somebody edited."""

MEASURED = "measured"
"""Recorded for the scale if each group of images was measured. Earlier versions measured each image: ``auto``."""

SKIPPED = "skipped"
"""Status of an image that was done before."""


@dataclass(frozen=True)
class RunOptions:
    """What to write and how to read, with the defaults of ``cellseg-infer``; ``UsageError`` if it cannot be meant.

    ``save``: kinds of files to write, names of ``outputs.formats.FORMATS``. ``overwrite``: an earlier run in the folder
    is replaced, else gone on with. ``pixel_size_um``: side of a pixel in the specimen in micrometres, whatever files
    say. ``field_of_view``: ``full`` takes whole pictures for it, surround and all.
    ``scales``: by group of images, as an earlier run measured them (see ``run.scales``): not measured again.
    """

    save: tuple[str, ...] = DEFAULT
    overwrite: bool = False
    max_pixels: int = MAX_PIXELS
    bit_depth: int | None = None
    pixel_size_um: float | None = None
    count_rule: CountRule = DEFAULT_RULE
    field_of_view: Field = "auto"
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen_formats(self.save)
        check_rule(self.count_rule)
        check_field(self.field_of_view)
        check_settings(self.max_pixels, self.bit_depth, self.pixel_size_um)


@dataclass(frozen=True)
class Inputs:
    """``paths``: files and folders that were passed, absolute. ``roots``: the folders that names are relative to."""

    paths: tuple[str, ...]
    roots: tuple[str, ...]
    follow_links: bool = False

    @classmethod
    def of(cls, paths: Iterable[Path], *, follow_links: bool = False) -> Inputs:
        """Those that ``find_images`` was called with. Raises ``UsageError`` as it does."""
        paths = list(paths)
        roots = input_roots(paths)
        return cls(tuple(str(absolute(path)) for path in paths), tuple(str(root) for root in roots), follow_links)


@dataclass(frozen=True)
class ImageResult:
    """One line of images.csv. ``status`` is ``done`` or ``failed``; a failed image has an error and no numbers.

    ``cells``: all that were found; ``counted``: those that the count rule lets in. ``seconds``: by stage; of a call of
    the network with tiles of several images, each has its share. ``was_gone``: it failed because there was no file.
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
    was_gone: bool = False

    @classmethod
    def of(cls, record: ImageRecord) -> ImageResult:
        """What the journal records of an image."""
        known = {field.name for field in fields(cls)}
        numbers = {name: value for name, value in record.result.items() if name in known}
        return cls(record.image, record.status, seconds=record.seconds, **numbers)


@dataclass
class RunSummary:
    """Totals of a run; ``remaining`` is 0 unless it was stopped.

    ``found``: images that were given. ``skipped``: done before, in a run that this one went on with; ``done`` and
    ``failed``: now. ``cells``, ``counted``: of both. ``others``: rows of the tables of images that were not given now,
    or were and cannot be read any more.
    ``warnings``: of all rows of the tables as they were last written, see ``tables.warned``.
    ``edited``: files of images, relative to ``output``, that somebody edited since they were written: kept.
    ``stage_seconds``: sums over images, which overlap, so together more than ``wall_seconds``. ``engine_seconds``: how
    long some call of the network was under way.
    """

    found: int
    output: Path
    done: int = 0
    failed: int = 0
    skipped: int = 0
    others: int = 0
    cells: int = 0
    counted: int = 0
    wall_seconds: float = 0.0
    engine_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, dict[str, Any]] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)

    @property
    def remaining(self) -> int:
        """Images that are neither done nor failed."""
        return self.found - self.done - self.skipped - self.failed

    @property
    def edited_files(self) -> list[str]:
        """``edited``, sorted, for run.json and ``--json``."""
        return [utf8(name) for name in sorted(self.edited)]

    @property
    def totals(self) -> dict[str, int]:
        """For run.json: of all images that were given, whenever they were done."""
        return {
            "found": self.found,
            "done": self.done + self.skipped,
            "failed": self.failed,
            "remaining": self.remaining,
            "cells": self.cells,
            "counted": self.counted,
        }

    @property
    def engine_busy(self) -> float:
        """Share of the wall time during which the network ran, 0 to 1."""
        return self.engine_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def add(self, result: ImageResult) -> None:
        """Count one more image; ``status`` may be ``skipped`` too."""
        self._count(result, 1)
        for stage, seconds in result.seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def forget(self, result: ImageResult) -> None:
        """Take back what ``add`` counted, but for its time."""
        self._count(result, -1)

    def _count(self, result: ImageResult, sign: int) -> None:
        self.done += sign * (result.status == "done")
        self.failed += sign * (result.status == "failed")
        self.skipped += sign * (result.status == SKIPPED)
        self.cells += sign * (result.cells or 0)
        self.counted += sign * (result.counted or 0)


def run_json(
    segmenter: Segmenter,
    options: RunOptions,
    threads: ThreadPlan,
    summary: RunSummary,
    *,
    identity: RunIdentity,
    inputs: Inputs,
    status: str,
    started: datetime.datetime,
    scales: Mapping[str, float],
) -> bytes:
    """Content of run.json; ``status``: ``running``, ``finished`` or ``stopped``. Enough to do the run again."""
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
        "task": segmenter.task,
        "operating_point": msgspec.to_builtins(segmenter.params),
        "settings": {
            "scale": MEASURED if segmenter.auto_scale else segmenter.scale,
            "tile_size": spec.tile_size,
            "halo": segmenter.halo,
            "border_cells": segmenter.border_cells,
            "batch_size": segmenter.batch_size,
            **msgspec.to_builtins(options),
            "scales": dict(scales),
        },
        "inputs": {"paths": list(inputs.paths), "follow_links": inputs.follow_links},
        "identity": identity.to_json(),
        "versions": {"python": platform.python_version(), **identity.versions},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "threads": msgspec.to_builtins(threads),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(summary.wall_seconds, 3),
        "engine_busy": round(summary.engine_busy, 4),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in summary.stage_seconds.items()},
        "totals": summary.totals,
        "warnings": summary.warnings,
        EDITED: summary.edited_files,
    }
    # Paths that are no UTF-8 are kept, as escapes.
    return json.dumps(record, indent=2, allow_nan=False).encode("ascii") + b"\n"


def with_edited_files(record: Path, summary: RunSummary) -> bytes | None:
    """Content of ``record``, a run.json that tells of earlier work, with the edited files of now; None if it has them.

    Without a word on them it tells of none.
    """
    content = content_of(record)
    edited = summary.edited_files
    if content.get(EDITED, []) == edited:
        return None
    return json.dumps({**content, EDITED: edited}, indent=2, allow_nan=False).encode("ascii") + b"\n"


def scales_in(record: Path) -> dict[str, float]:
    """The scales that ``record``, a run.json, says were measured, by group of images; none if it is something else."""
    try:
        said = content_of(record)["settings"]["scales"]
        return {str(group): check_scale(float(scale)) for group, scale in said.items()}
    except (KeyError, TypeError, ValueError, AttributeError, UsageError):
        return {}
