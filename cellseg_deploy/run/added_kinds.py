"""More kinds of files for a finished run, from its own label images: no network is run.

A run that was saved with label images, and is started again with other kinds in ``save`` but otherwise the same
settings, gets the kinds it lacks. Labels and images must be those of the run (edited ones: ``cellseg-measure``).

The new files are written first, then the journal is replaced as a whole. After a kill in between, the next start writes
them again.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellseg_deploy.cells.classes import CLASS, CLASS_PROBABILITY, CellClasses
from cellseg_deploy.cells.field_of_view import find_field
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.errors import DataError, OutputError
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.files.workspace import remove_abandoned
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.read import read_image, read_labels
from cellseg_deploy.outputs.formats import FORMATS, NAMES, Format
from cellseg_deploy.outputs.segmentation import Segmentation, of_labels
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.journal import JOURNAL, ImageRecord, JournalContent, OutputFile
from cellseg_deploy.run.output_folder import RUN_JSON, make_place
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.run.resume import check_files, look_at, some
from cellseg_deploy.run.streamed import is_streamed
from cellseg_deploy.run.tables import CELL_COLUMNS_WITH_CLASSES
from cellseg_deploy.segmenter import Segmenter, as_read

_LABELS, _NETWORK = "labels", "probabilities"
_log = logging.getLogger(__name__)


def kinds_to_save(out: Path, asked: RunIdentity, *, overwrite: bool) -> tuple[str, ...] | None:
    """Return the kinds of the run in ``out`` together with those ``asked`` for, if it is that run but for its kinds,
    and has label images to make them from; otherwise None."""
    if overwrite or not os.path.isfile(out / JOURNAL):  # noqa: PTH113 - a folder that cannot be used is refused later
        return None
    journal = look_at(out).journal
    if journal is None or journal.identity.saved == asked.saved or _LABELS not in journal.identity.saved:
        return None
    if differences(journal.identity, replace(asked, saved=journal.identity.saved)):
        return None
    if _NETWORK in asked.saved and _NETWORK not in journal.identity.saved:
        return None
    return tuple(name for name in NAMES if name in {*journal.identity.saved, *asked.saved})


def add_kinds(segmenter: Segmenter, images: Sequence[FoundImage], out: Path, options: RunOptions) -> None:
    """Make the files of kinds in ``options.save`` that the run in ``out`` lacks, if it has label images.

    ``options.save``: as returned by ``kinds_to_save``. Raises ``OutputError`` if a finished image is missing from
    ``images``, or its label image or photograph is not as the run left it.
    """
    with exclusive(out):
        remove_abandoned(out)
        content = look_at(out).journal
        assert content is not None
        missing = [name for name in options.save if name not in content.identity.saved]
        if not missing:
            return
        formats = [format for format in FORMATS if format.name in missing and format.folder]
        found = {image.name: image for image in images}
        if formats:
            _log.info("%s: adding %s from its label images", out, ", ".join(missing))
        records = [_with_files(record, found, formats, segmenter, out, options) for record in _records(content)]
        identity = replace(content.identity, saved=options.save)
        journals.rewrite(content, identity, records)
        record = content_of(out / RUN_JSON)
        if record:
            record["settings"] = {**record.get("settings", {}), "save": list(identity.saved)}
            record["identity"] = identity.to_json()
            write_bytes(out / RUN_JSON, json.dumps(record, indent=2, allow_nan=False).encode("ascii") + b"\n")


def _records(content: JournalContent) -> Iterator[ImageRecord]:
    return journals.whole_records(content.path, content.entries.values())


def _with_files(
    record: ImageRecord,
    images: Mapping[str, FoundImage],
    formats: Sequence[Format],
    segmenter: Segmenter,
    out: Path,
    options: RunOptions,
) -> ImageRecord:
    """Return ``record`` with the files of ``formats``, which are written; as it is if the image failed."""
    if record.status != "done" or not formats:
        return record
    again = "measure it with cellseg-measure, or choose another folder"
    if record.image not in images:
        raise OutputError(f"{out}: {record.image} of this run was not given, so its new files cannot be made; give all")
    problem, edited = check_files(record, out)
    if problem or edited:
        said = problem or f"{some(edited)} was edited"
        raise OutputError(f"{out}: {record.image}: {said}, so its new files would not be those of this run; {again}")
    segmented = _segmentation(record, images[record.image].path, segmenter, out, options).segmented
    files = {format.place(record.output_name): format.encode(segmented) for format in formats}
    for place, data in files.items():
        write_bytes(make_place(out, place), data)
    return replace(record, outputs=(*record.outputs, *(OutputFile.of(place, data) for place, data in files.items())))


def _segmentation(
    record: ImageRecord, image: Path, segmenter: Segmenter, out: Path, options: RunOptions
) -> Segmentation:
    if is_streamed(image):
        raise OutputError(
            f"{out}: {record.image} is read by region, and kinds of files cannot be added to such an image; choose "
            "another folder, or start over with `overwrite`"
        )
    loaded = read_image(image, options.reading, with_fingerprint=True)
    if record.input is None or loaded.source is None or loaded.source.sha256 != record.input.sha256:
        raise OutputError(f"{out}: {record.image} was changed since the run; choose another folder")
    (place,) = (file.path for file in record.outputs if file.path.startswith(f"{_LABELS}/"))
    labels = read_labels(out / place, max_pixels=options.reading.max_pixels)
    table = measure(labels)
    if len(table) != record.result["cells"] or labels.shape != loaded.pixels_hwc.shape[:2]:
        raise DataError(f"{out / place}: not the {record.result['cells']} cells of this run; start over")
    inside = find_field(loaded.pixels_hwc) if options.field_of_view == "auto" else None
    scale = float(record.result["scale"])
    found = of_labels(
        *(labels, table, loaded.pixels_hwc),
        field=inside,
        classes=_classes(record, segmenter),
        model=segmenter.backend.spec.name,
        task=segmenter.task,
        scale=scale,
        model_cell_px=segmenter.model_cell_px(scale),
    )
    return as_read(found, loaded, name=record.image, count_rule=options.count_rule)


def _classes(record: ImageRecord, segmenter: Segmenter) -> CellClasses | None:
    """Classes of the cells from their lines in the journal; probabilities have the table's four decimals."""
    names = segmenter.backend.spec.classes
    if not names:
        return None
    rows = [dict(zip(CELL_COLUMNS_WITH_CLASSES, row, strict=True)) for row in csv.reader(record.cells.splitlines())]
    index = np.array([names.index(row[CLASS]) for row in rows], np.int64)
    probability = np.array([float(row[CLASS_PROBABILITY]) for row in rows], np.float64)
    return CellClasses(names, segmenter.counting_classes, index, probability)
