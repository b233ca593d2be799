"""Count one image in bounded memory into a folder of its own: cells, then files; resumed where a killed run ended.

region --counting--> cells --strip by strip--> files
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.batching import alone
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.image_tiles import StageClock
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.apart import foreign_names
from cellseg_deploy.files.atomic import make_folder, move, remove_stale, write_bytes, writing
from cellseg_deploy.files.json_record import was_written_by
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.outputs import geojson, parquet
from cellseg_deploy.outputs.segmented import classifications
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank, files
from cellseg_deploy.slides.counting import (
    IDENTITY,
    PROGRAM,
    SILENT,
    CountedImage,
    Progress,
    SlideElsewhere,
    count_cells,
    identity_of,
    prepare,
)
from cellseg_deploy.slides.memory import half_of_free_memory
from cellseg_deploy.slides.region import Region
from cellseg_deploy.slides.zarr_labels import ZarrLabels

CELLS, IMAGES, OVERVIEW, RECORD = "cells.csv", "images.csv", "overview.png", "slide.json"
DEFAULT_KINDS = ("labels",)
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class SlideResult:
    """``cells``: labelled, ``counted``: those that count. ``row``: of images.csv. ``notes``: for the user."""

    cells: int
    counted: int
    row: dict[str, Any]
    notes: tuple[str, ...]
    out: Path


def run_slide(
    segmenter: Segmenter,
    region: Region,
    out: Path,
    *,
    save: Sequence[str] = DEFAULT_KINDS,
    memory: int | None = None,
    count_rule: CountRule = DEFAULT_RULE,
    skip_blank: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    elsewhere: SlideElsewhere | None = None,
) -> SlideResult:
    """Count the cells of ``region`` into the folder ``out``; a run that was stopped is resumed.

    ``save``: kinds of files, some of ``slides.files.KINDS``; tables, overview and record are always written.
    ``memory``: bytes that windows may take, None for half of what is free. It changes no result.
    ``skip_blank``: do not ask the network about tiles without contrast (``slides.blank``); it may change results.
    ``overwrite``: replace an earlier result, once its cells are counted, or an unfinished run of other settings.
    ``elsewhere``: runs the network, None for this process; it changes no result.

    Raises ``OutputError`` for the folder, ``DataError`` for the image, or if touching cells do not fit into memory.
    """
    check_rule(count_rule)
    save = files.checked_kinds(save)
    memory = half_of_free_memory() if memory is None else memory
    make_folder(out)
    with exclusive(out):
        remove_stale(out)
        work = out / UNFINISHED
        _check_ours(out, work)
        if (out / RECORD).exists() and not overwrite:
            raise OutputError(f"{out}: holds a finished result ({RECORD}); choose another folder, or give `overwrite`")
        contrast = blank.SKIP if skip_blank else blank.EXACT
        prepare(work, segmenter, region, contrast, overwrite=overwrite)
        clock = StageClock()
        counted = count_cells(
            *(segmenter, region, work, alone(segmenter.backend.predict, segmenter.batch_size)),
            contrast=contrast,
            memory=memory,
            count_rule=count_rule,
            with_outlines="geojson" in save,
            clock=clock,
            progress=progress,
            elsewhere=None if elsewhere is None else elsewhere(out, segmenter, region, contrast),
        )
        files.remove(out / RECORD)  # from here on the folder holds no finished result
        for name, (file, _, _) in files.KINDS.items():  # an earlier result may have had kinds that this one lacks
            if name not in save:
                files.remove(out / file)
        with clock("write"):
            notes = _write(counted, segmenter, out, work, save, progress)
        row = _row(counted, notes)
        files.write_row(out / IMAGES, row)
        result = SlideResult(len(counted.table), int(counted.counts.sum()), row, tuple(notes), out)
        about = {
            **identity_of(segmenter, region, contrast),
            "scale": counted.scale,
            "count_rule": count_rule,
            "counting_classes": list(segmenter.counting_classes),
            "save": list(save),
            "result": row,
            "seconds": clock.seconds,
        }
        write_bytes(out / RECORD, json.dumps(about, indent=1).encode())
        with writing(work):
            shutil.rmtree(work)
        return result


def _check_ours(out: Path, work: Path) -> None:
    """Raise ``OutputError`` if ``out`` holds something, and no result or unfinished run of this program."""
    if any(was_written_by(PROGRAM, record) for record in (out / RECORD, work / IDENTITY)):
        return
    found = (path for folder in (out, work) if folder.is_dir() for path in folder.iterdir() if path != work)
    if strangers := foreign_names(path.name for path in found):
        raise OutputError(
            f"{out}: holds {strangers[0]!r}, and no result of {PROGRAM}; choose a new or empty folder (nothing in this "
            "one was changed)"
        )


def _write(
    counted: CountedImage, segmenter: Segmenter, out: Path, work: Path, save: Sequence[str], progress: Progress
) -> list[str]:
    """Write all files but the row of images.csv and the record; return the notes on the image."""
    region, um, samples = counted.region, counted.size.um, counted.samples
    unfinished, zarr = work / files.ZARR, None
    if "zarr" in save:
        files.remove(unfinished)  # of a run that was killed
        zarr = ZarrLabels(unfinished, region.hw, pixel_size_um=um, image=region.reader.name)

    def strips() -> Iterator[Labels]:
        for labels in counted.strips(progress):
            if zarr is not None:
                zarr.add(labels)
            yield labels

    if "labels" in save:
        files.write_labels(out / files.LABELS, region.hw, strips(), pixel_size_um=um)
    else:
        deque(strips(), maxlen=0)
    if zarr is not None:
        zarr.finish()
        files.remove(out / files.ZARR)
        move(unfinished, out / files.ZARR)
    files.write_overview(out / OVERVIEW, *samples.overview(), counted.blank_on_overview())
    files.write_cells(out / CELLS, region.reader.name, counted.columns)
    if "parquet" in save:
        parquet.write(out / CELLS, out / files.PARQUET)
    if "geojson" in save:
        files.write_pieces(out / files.GEOJSON, geojson_of(counted, segmenter, region.reader.name))
    return [*counted.notes, *filter(None, samples.notes())]


def geojson_of(counted: CountedImage, segmenter: Segmenter, name: str) -> Iterator[bytes]:
    """Yield the GeoJSON of the cells ``counted`` with outlines, in the image ``name``, piece by piece."""
    spec = segmenter.backend.spec
    source = geojson.source_of(name, counted.region.hw, counted.size.um, spec.name, segmenter.task)
    groups = classifications(counted.counts, counted.classes, counted.by_rule)
    return geojson.pieces(source, geojson.features(name, counted.columns, groups, counted.found.geometries()))


def _row(counted: CountedImage, notes: Sequence[str]) -> dict[str, Any]:
    """The row of images.csv, with the columns of a folder run."""
    region, size, area = counted.region, counted.size, counted.table.columns["area_px"]
    if counted.classes is not None:
        area = area[counted.classes.counts]
    median = float(np.median(area)) if len(area) else None
    n_counted = int(counted.counts.sum())
    row: dict[str, Any] = {
        "image": region.reader.name,
        "status": "done",
        "cells": len(counted.table),
        "counted": n_counted,
        "confluence": counted.share,
        "field_of_view_share": 1.0,
        "blank_share": counted.blank_share,
        "median_cell_area_px": median,
        "scale": float(counted.scale),
        **{f"count_{name}": number for name, number in counted.by_class.items()},
    }
    if size.um is not None:
        row |= {
            "pixel_size_um": size.um,
            "pixel_size_source": size.source,
            "median_cell_area_um2": None if median is None else median * size.um**2,
            "counted_per_mm2": n_counted / (region.height * region.width * size.um**2) * 1e6,
        }
    return row | {"warning": "; ".join(" ".join(note.split()) for note in notes), "error": ""}


def warnings_of(result: SlideResult) -> list[str]:
    """Notes of ``result`` that are warnings."""
    return [note for note in result.notes if kind_of(note) != "conversion"]
