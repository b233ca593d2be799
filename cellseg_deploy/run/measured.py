"""Cells that were drawn or edited, measured as a run measures those that it finds: same tables, same files, no network.

Labels are numbered in raster order of their first pixel, as in a run, whatever their numbers in the files.
"""

from __future__ import annotations

import contextlib
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
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.images.find import FoundImage, absolute
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, read_image
from cellseg_deploy.outputs.formats import DEFAULT, NAMES, Format, chosen_formats
from cellseg_deploy.outputs.segmentation import Segmentation, of_labels
from cellseg_deploy.report.groups import grouping
from cellseg_deploy.report.page import About
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.commit import Committer
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import Journal, OutputFile
from cellseg_deploy.run.known_classes import NONE_RECORDED, KnownClasses, RecordedCells, is_edited
from cellseg_deploy.run.output_folder import RUN_JSON, held_folder
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
    ``group_by``, ``report``: as in ``RunOptions``.

    Raises ``UsageError`` for an invalid value, or a kind of file that only a network can give.
    """

    save: tuple[str, ...] = DEFAULT
    reading: ReadOptions = _READ_DEFAULTS
    count_rule: CountRule = DEFAULT_RULE
    field_of_view: Field = "auto"
    classes: tuple[str, ...] | None = None
    mask_foreground: MaskForeground = "auto"
    overwrite: bool = False
    group_by: str = ""
    report: bool = True

    def __post_init__(self) -> None:
        if refused := [name for name in self.save if name in _NO_NETWORK]:
            raise UsageError(f"cannot save {', '.join(refused)}: no network is run on cells that were drawn")
        chosen_formats(self.save)
        check_rule(self.count_rule)
        check_field(self.field_of_view)
        grouping(self.group_by)


def segmentation(
    painted: Painted,
    loaded: LoadedImage,
    *,
    name: str,
    model: str,
    inside: Mask | None,
    classes: Sequence[str],
    recorded: RecordedCells | None = None,
    notes: Sequence[Note] = (),
) -> Segmentation:
    """Return the cells ``painted`` as the result for the image ``loaded``, named ``name``, all to be counted.

    ``inside``: field of view. ``classes``: all classes of the set of images, empty if there are none. ``recorded``:
    cells whose classes these have, instead of those in ``painted``. ``notes``: to add to those made here.
    """
    labels = renumber(painted.labels)
    table = measure(labels)
    notes = [*notes, *(() if inside is None else (field_note(inside),))]
    for number, what in (
        (painted.overlapping, "overlap others by more than half: pixels in common belong to the smaller one"),
        (painted.lost, "have no pixel of their own and are left out"),
    ):
        notes += [Note(f"shapes that {what}: {number:,}", "annotations")] if number else []
    found = None
    if classes:
        if recorded is None:
            old_of = np.zeros(len(table) + 1, np.int64)
            old_of[labels] = painted.labels
            said = [(painted.classes[old - 1], 1.0) for old in old_of[1:].tolist()]
        else:
            said = recorded.match(table)
        index = np.array([classes.index(each or UNKNOWN) for each, _ in said], np.int64)
        found = CellClasses(tuple(classes), tuple(classes), index, np.array([share for _, share in said], np.float64))
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


@dataclass(frozen=True)
class _Classes:
    """``names``: all of the set. ``counting``: those that count. ``origin``: where they come from, for people.
    ``known``: whose cells have them, None for the files' own."""

    names: tuple[str, ...]
    counting: tuple[str, ...]
    origin: str
    known: KnownClasses | None

    @classmethod
    def of(cls, source: LabelSource, options: MeasureOptions, known: KnownClasses | None) -> _Classes:
        names, asked = class_names(source), options.classes
        if names or known is None or not source.has_pixels:
            origin = "the files" if names else "not known: every object is counted, platelets too"
            return cls(names, counting_classes(names, asked), origin, None)
        names = known.names
        if UNKNOWN not in names and _some_are_unknown(source, options, known):
            names = (*names, UNKNOWN)
        counting = counting_classes(names, asked)
        if asked is None and known.counting is not None:
            counting = tuple(name for name in names if name in (*known.counting, UNKNOWN))
        return cls(names, counting, known.origin, known)

    def recorded(self, image: str) -> tuple[RecordedCells | None, tuple[Note, ...]]:
        """Return the cells whose classes those of ``image`` have, None if the files say them, and what to note."""
        if self.known is None:
            return None, ()
        cells = self.known.cells_of(image)
        if cells is not None:
            return cells, ()
        text = f"no image of this name in {self.origin}: its cells are of the class {UNKNOWN}, platelets too"
        return NONE_RECORDED, (Note(text, "annotations"),)


def _some_are_unknown(source: LabelSource, options: MeasureOptions, known: KnownClasses) -> bool:
    """Whether a cell matches none that is ``known``; the tables of all images need the column then."""
    for name, stem in _by_name(source).items():
        with contextlib.suppress(DataError):  # named when its turn comes
            cells = known.cells_of(name)
            if cells is not None and "" not in cells.classes and not is_edited(source.file_of(stem), cells):
                continue
            table = measure(renumber(source.read_pixels(stem, foreground=options.mask_foreground).labels))
            if len(table) and (cells is None or any(not name for name, _ in cells.match(table))):
                return True
    return False


def _by_name(source: LabelSource) -> dict[str, str]:
    """Stem of each image by its name in the tables."""
    return {image.relative_to(source.root).as_posix(): stem for stem, image in source.images.items()}


def measure_folder(
    source: LabelSource,
    out: Path,
    options: MeasureOptions,
    on_result: Callable[[ImageResult], None] = lambda _: None,
    *,
    known: KnownClasses | None = None,
    on_classes: Callable[[str], None] = lambda _: None,
) -> RunSummary:
    """Measure the cells of ``source`` in its photographs into the folder ``out``.

    ``known``: classes of cells in label images that say none. ``on_classes``: called with where the classes come from,
    in words.

    A folder of an earlier measurement is replaced, unless a file of it was edited since. An image or annotation that
    cannot be read is recorded as failed, and the rest continue. Raises ``OutputError`` for a folder that holds
    something else, and ``UsageError`` if it and an input contain each other.
    """
    check_apart([source.root, source.path], out)
    formats = chosen_formats(options.save)
    classes = _Classes.of(source, options, known)
    on_classes(classes.origin)
    found = _by_name(source)
    items = [FoundImage(source.root / name, name, root=source.root) for name in sorted(found)]
    identity = _identity(source, options, classes)
    about = About(identity.to_json(), None, options.save, options.group_by) if options.report else None
    reporting = Reporting(RunOptions(group_by=options.group_by), about)
    summary = RunSummary(out, classes=classes.names, counting=classes.counting)
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    with held_folder(out):
        begin(out, identity, overwrite=options.overwrite or _is_replaceable(out))
        with Journal.create(out, identity) as journal:
            committer = Committer(out, RunState(), journal, formats, reporting.run_files())
            for item in plan(items, out, "fresh", RunState(), formats).items:
                result = _one_image(item, source, found[item.image.name], options, formats, classes, committer)
                summary.add(result)
                on_result(result)
            for write in committer.writers():
                write()
            summary.warnings = run_tables.warned(committer.state.in_order)
        summary.wall_seconds = time.perf_counter() - clock
        write_bytes(out / RUN_JSON, _run_json(source, options, identity, classes, summary, started))
    return summary


def _one_image(
    item: Planned,
    source: LabelSource,
    stem: str,
    options: MeasureOptions,
    formats: Sequence[Format],
    classes: _Classes,
    committer: Committer,
) -> ImageResult:
    try:
        start = time.perf_counter()
        loaded = read_image(item.image.path, options.reading, with_fingerprint=True)
        image_hw = (loaded.pixels_hwc.shape[0], loaded.pixels_hwc.shape[1])
        painted = source.read(stem, image_hw, options.mask_foreground)
        inside = find_field(loaded.pixels_hwc) if options.field_of_view == "auto" else None
        recorded, notes = classes.recorded(item.image.name)
        cells = segmentation(
            *(painted, loaded),
            name=item.image.name,
            model=_model(source),
            inside=inside,
            classes=classes.names,
            recorded=recorded,
            notes=notes if painted.classes else (),
        )
        if cells.classes is not None:
            cells = replace(cells, classes=replace(cells.classes, counting=classes.counting))
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


def _identity(source: LabelSource, options: MeasureOptions, classes: _Classes) -> RunIdentity:
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
            "classes_from": classes.origin,
            **({"classes": list(classes.counting)} if classes.names else {}),
        },
        saved=tuple(name for name in NAMES if name in options.save),
        versions=library_versions(),
        inputs=(str(source.root),),
    )


def _run_json(
    source: LabelSource,
    options: MeasureOptions,
    identity: RunIdentity,
    classes: _Classes,
    summary: RunSummary,
    started: datetime.datetime,
) -> bytes:
    record: Mapping[str, Any] = {
        "program": PROGRAM,
        "version": version("cellseg-deploy"),
        "status": "finished",
        "labels": {
            "path": str(absolute(source.path)),
            "kind": source.kind,
            "read": source.said,
            "classes": classes.origin,
        },
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
