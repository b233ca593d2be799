"""Cells that were drawn or edited, measured as a run measures those that it finds: same tables, same files, no network.

Labels are numbered in raster order of their first pixel, as in a run, whatever their numbers in the files.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.annotations.labels import LabelSource
from cellseg_deploy.annotations.shapes import Painted
from cellseg_deploy.cells.classes import CellClasses, counting_classes
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.field_of_view import Field, Mask, check_field, find_field
from cellseg_deploy.cells.field_of_view import note as field_note
from cellseg_deploy.cells.label_runs import renumber
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import DataError, OutputError, UsageError, concerns_one_image
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.images.find import FoundImage, absolute
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, read_image
from cellseg_deploy.outputs.formats import DEFAULT, NAMES, Format, chosen_formats
from cellseg_deploy.outputs.segmentation import Segmentation, of_labels
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.commit import Committer
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import Journal, OutputFile
from cellseg_deploy.run.output_folder import RUN_JSON, check_apart, held_folder
from cellseg_deploy.run.plan import Planned, plan
from cellseg_deploy.run.record import ImageResult, RunOptions, RunSummary, library_versions, program
from cellseg_deploy.run.reporting import Reporting
from cellseg_deploy.run.resume import begin, check_files, look_at, some
from cellseg_deploy.run.state import RunState
from cellseg_deploy.segmenter import as_read

PROGRAM, TASK = "cellseg-measure", "measurement"
UNKNOWN = "unknown"
"""Class of cells without one, where others have one."""
_NO_NETWORK = ("probabilities",)
_READ_DEFAULTS = ReadOptions()

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasureOptions:
    """Options as in ``RunOptions``; ``classes``: those that count, None for all but platelets; ``mask_foreground``: of
    label images. ``overwrite``: replace any earlier run in the folder, also one of ``cellseg-infer`` or edited since.

    Raises ``UsageError`` for an invalid value, or a kind of file that only a network can give.
    """

    save: tuple[str, ...] = DEFAULT
    reading: ReadOptions = _READ_DEFAULTS
    count_rule: CountRule = DEFAULT_RULE
    field_of_view: Field = "auto"
    classes: tuple[str, ...] | None = None
    mask_foreground: MaskForeground = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if refused := [name for name in self.save if name in _NO_NETWORK]:
            raise UsageError(f"cannot save {', '.join(refused)}: no network is run on cells that were drawn")
        chosen_formats(self.save)
        check_rule(self.count_rule)
        check_field(self.field_of_view)


def segmentation(
    painted: Painted, loaded: LoadedImage, *, name: str, model: str, inside: Mask | None, classes: Sequence[str]
) -> Segmentation:
    """Return the cells ``painted`` as the result for the image ``loaded``, named ``name``, all to be counted.

    ``inside``: field of view. ``classes``: all classes of the set of images, empty if there are none.
    """
    labels = renumber(painted.labels)
    table = measure(labels)
    notes = [] if inside is None else [field_note(inside)]
    for number, what in (
        (painted.overlapping, "overlap others by more than half: pixels in common belong to the smaller one"),
        (painted.lost, "have no pixel of their own and are left out"),
    ):
        notes += [Note(f"shapes that {what}: {number:,}", "annotations")] if number else []
    found = None
    if classes:
        new_of = np.zeros(len(painted.classes) + 1, np.int64)
        new_of[painted.labels] = labels
        index = np.zeros(len(table), np.int64)
        index[new_of[1:] - 1] = [classes.index(each or UNKNOWN) for each in painted.classes]
        found = CellClasses(tuple(classes), tuple(classes), index, np.ones(len(index)))
    return of_labels(
        *(labels, table, loaded.pixels_hwc),
        field=inside,
        classes=found,
        model=model,
        task=TASK,
        name=name,
        notes=notes,
    )


def class_names(source: LabelSource) -> tuple[str, ...]:
    """Return the classes of all cells of ``source``, sorted; ``UNKNOWN`` too if some have none."""
    found = source.class_names()
    named = sorted(found - {""})
    return tuple([*named, UNKNOWN] if named and "" in found and UNKNOWN not in named else named)


def measure_folder(
    source: LabelSource,
    out: Path,
    options: MeasureOptions,
    on_result: Callable[[ImageResult], None] = lambda _: None,
) -> RunSummary:
    """Measure the cells of ``source`` in its photographs into the folder ``out``.

    A folder of an earlier measurement is replaced, unless a file of it was edited since. An image or annotation that
    cannot be read is recorded as failed, and the rest continue. Raises ``OutputError`` for a folder that holds
    something else, and ``UsageError`` if it and an input contain each other.
    """
    check_apart([source.root, source.path], out)
    formats = chosen_formats(options.save)
    names = class_names(source)
    counting = counting_classes(names, options.classes)
    root = source.root
    found = {image.relative_to(root).as_posix(): stem for stem, image in source.images.items()}
    items = [FoundImage(root / name, name, root=root) for name in sorted(found)]
    identity = _identity(source, options)
    summary = RunSummary(out, classes=names, counting=counting)
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    with held_folder(out):
        begin(out, identity, overwrite=options.overwrite or _is_replaceable(out))
        with Journal.create(out, identity) as journal:
            committer = Committer(out, RunState(), journal, formats, Reporting(RunOptions(), about=None).run_files())
            for item in plan(items, out, "fresh", RunState(), formats).items:
                result = _one_image(item, source, found[item.image.name], options, formats, names, counting, committer)
                summary.add(result)
                on_result(result)
            for write in committer.writers():
                write()
            summary.warnings = run_tables.warned(committer.state.in_order)
        summary.wall_seconds = time.perf_counter() - clock
        write_bytes(out / RUN_JSON, _run_json(source, options, identity, summary, started))
    return summary


def _one_image(
    item: Planned,
    source: LabelSource,
    stem: str,
    options: MeasureOptions,
    formats: Sequence[Format],
    names: tuple[str, ...],
    counting: tuple[str, ...],
    committer: Committer,
) -> ImageResult:
    try:
        start = time.perf_counter()
        loaded = read_image(item.image.path, options.reading, with_fingerprint=True)
        image_hw = (loaded.pixels_hwc.shape[0], loaded.pixels_hwc.shape[1])
        painted = source.read(stem, image_hw, options.mask_foreground)
        inside = find_field(loaded.pixels_hwc) if options.field_of_view == "auto" else None
        cells = segmentation(painted, loaded, name=item.image.name, model=_model(source), inside=inside, classes=names)
        if cells.classes is not None:
            cells = replace(cells, classes=replace(cells.classes, counting=counting))
        cells = as_read(cells, loaded, name=item.image.name, count_rule=options.count_rule)
        segmented = cells.segmented
        files = {format.place(item.output_name): format.encode(segmented) for format in formats if format.folder}
        outputs = [OutputFile.of(path, content) for path, content in files.items()]
        record = run_tables.done(
            segmented, source=loaded.source, output_name=item.output_name, outputs=outputs, notes=cells.notes
        )
        record = replace(record, result={**record.result, "scale": None})  # of a network
        return committer.commit(item, Finished(record, {**files}, {"write": time.perf_counter() - start}))
    except Exception as error:
        if not concerns_one_image(error):
            raise
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, DataError | MemoryError):
            _log.exception("%s: internal error", item.image.name)
            reason = f"internal error, please report it: {reason}"
    with deferred_signals():
        return committer.commit_failure(item, reason.removeprefix(f"{item.image.path}: "))


def _is_replaceable(out: Path) -> bool:
    """Whether ``out`` holds an earlier measurement, which may go. Raises ``OutputError`` if it was edited since."""
    journal = look_at(out).journal
    if journal is None or journal.identity.task != TASK:
        return False
    edited = [file for entry in journal.entries.values() for file in check_files(entry.record, out)[1]]
    if edited:
        raise OutputError(
            f"{out}: an earlier measurement, of which {some(edited)} was edited since; choose another folder, or "
            "replace it with `overwrite=True`"
        )
    return True


def _model(source: LabelSource) -> str:
    return f"measured from {source.kind}"


def _identity(source: LabelSource, options: MeasureOptions) -> RunIdentity:
    classes = {} if options.classes is None else {"classes": list(options.classes)}
    return RunIdentity(
        program=program(),
        model={"name": _model(source), "sha256": None, "given_sha256": None, "identity": None},
        backend={"name": "none", "device": "none", "precision": "none", "form": ""},
        task=TASK,
        operating_point={},
        settings={
            "labels": str(absolute(source.path)),
            "bit_depth": options.reading.bit_depth,
            "pixel_size_um": options.reading.pixel_size_um,
            "count_rule": options.count_rule,
            "field_of_view": options.field_of_view,
            "mask_foreground": options.mask_foreground,
            **classes,
        },
        saved=tuple(name for name in NAMES if name in options.save),
        versions=library_versions(),
        inputs=(str(source.root),),
    )


def _run_json(
    source: LabelSource,
    options: MeasureOptions,
    identity: RunIdentity,
    summary: RunSummary,
    started: datetime.datetime,
) -> bytes:
    record: Mapping[str, Any] = {
        "program": PROGRAM,
        "version": version("cellseg-deploy"),
        "status": "finished",
        "labels": {"path": str(absolute(source.path)), "kind": source.kind, "read": source.said},
        "images_without_labels": len(source.unnamed),
        "settings": {
            **identity.settings,
            "max_pixels": options.reading.max_pixels,
            "save": list(identity.saved),
        },
        "inputs": {"paths": [str(source.root)]},
        "identity": identity.to_json(),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(summary.wall_seconds, 3),
        "totals": summary.totals,
        "warnings": summary.warnings,
    }
    return json.dumps(record, indent=2, allow_nan=False).encode("ascii") + b"\n"
