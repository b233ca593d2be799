"""cells.csv and images.csv from the journal, in the order of the input, whatever the order in which images were done.

Micrometre columns exist if the pixel size of at least one image is known, and are empty for the other images. Class
columns exist if at least one image is done and the model distinguishes classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.cells.classes import CLASS_COLUMNS, CellClasses
from cellseg_deploy.cells.measure import COLUMNS, UM_COLUMNS
from cellseg_deploy.cells.notes import count_warnings, first_warnings
from cellseg_deploy.cells.stain import QUICK_PIXELS, colours
from cellseg_deploy.files.atomic import atomic_file, writing
from cellseg_deploy.files.fingerprint import Fingerprint
from cellseg_deploy.outputs import tables
from cellseg_deploy.outputs.formats import CELLS_CSV
from cellseg_deploy.outputs.segmented import COUNTED, LEFT_OUT_BY, SegmentedImage
from cellseg_deploy.run.journal import Entry, ImageRecord, OutputFile, whole_records

CELL_COLUMNS = (*COLUMNS, COUNTED)
CELL_COLUMNS_WITH_CLASSES = (*COLUMNS, *CLASS_COLUMNS, COUNTED, LEFT_OUT_BY)
_NUMBERS = ("cells", COUNTED, "confluence", "field_of_view_share", "median_cell_area_px", "scale")
IMAGE_UM_COLUMNS = ("pixel_size_um", "pixel_size_source", "median_cell_area_um2", "counted_per_mm2")
_WORDS = ("warning", "error")
WARNINGS = "warnings"
"""In a record's result: kind of warning -> text of the first of that kind. Not a column of the tables."""
FIELD_PX = "field_px"
"""In a record's result: pixels of the field of view. Not a column of the tables."""
COLOURS = "colours"
"""In a record's result: light and stain, see ``cells.stain``; the report compares them. Not columns of the tables."""
BY_CLASS, _COUNT = "by_class", "count_"
"""In a record's result: class -> number of cells. In images.csv one column per class: ``count_red``."""
IMAGE_COLUMNS = ("image", "status", *_NUMBERS, *_WORDS)


def done(
    image: SegmentedImage,
    *,
    source: Fingerprint | None,
    output_name: str,
    outputs: Sequence[OutputFile],
    notes: Iterable[str] = (),
) -> ImageRecord:
    """Return the record of a segmented image whose files ``outputs`` are named ``output_name``; see ``record_of``."""
    record = record_of(
        image.name,
        image.columns,
        image.classes,
        image.by_class,
        covered_px=int(np.count_nonzero(image.labels)),
        field_px=image.field_px,
        image_px=image.labels.size,
        scale=image.scale,
        pixel_size_um=image.pixel_size_um,
        pixel_size_source=image.pixel_size_source,
        colours=_colours(image),
        notes=tuple(notes),
    )
    return replace(record, input=source, output_name=output_name, outputs=tuple(outputs))


def record_of(
    name: str,
    columns: Mapping[str, np.ndarray[Any, Any]],
    classes: CellClasses | None,
    by_class: Mapping[str, int],
    *,
    covered_px: int,
    field_px: int,
    image_px: int,
    scale: float,
    pixel_size_um: float | None,
    pixel_size_source: str,
    colours: Mapping[str, float],
    notes: Sequence[str],
) -> ImageRecord:
    """Return the record of the image ``name``, without its files. ``columns``: those of cells.csv, by name.

    ``warnings`` in its result: the first note of each kind except conversions; see ``notes``.
    """
    areas = columns["area_px"]
    if classes is not None:
        areas = areas[classes.counts]
    median = float(np.median(areas)) if len(areas) else None
    n_counted = int(columns[COUNTED].sum())
    result: dict[str, Any] = {
        "cells": len(columns["area_px"]),
        COUNTED: n_counted,
        "confluence": float(covered_px / field_px),
        "field_of_view_share": float(field_px / image_px),
        "median_cell_area_px": median,
        "scale": float(scale),
        FIELD_PX: field_px,
        "warning": "; ".join(_one_line(note) for note in notes),
        WARNINGS: first_warnings(notes),
        COLOURS: {name: round(value, 5) for name, value in colours.items()},
    }
    if classes is not None:
        result[BY_CLASS] = dict(by_class)
    if pixel_size_um is not None:
        result |= {
            "pixel_size_um": pixel_size_um,
            "pixel_size_source": pixel_size_source,
            "median_cell_area_um2": None if median is None else median * pixel_size_um**2,
            "counted_per_mm2": n_counted / (field_px * pixel_size_um**2) * 1e6,
        }
    names = CELL_COLUMNS if classes is None else CELL_COLUMNS_WITH_CLASSES
    return ImageRecord(
        image=name,
        status="done",
        result=result,
        cells=_lines({name: columns[name] for name in names}),
        cells_um=None if pixel_size_um is None else _lines({name: columns[name] for name in UM_COLUMNS}),
    )


def _colours(image: SegmentedImage) -> dict[str, float]:
    return colours(image.pixels_hwc, image.labels > 0, seen_hw=image.field, pixels=QUICK_PIXELS)


def warned(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Return ``count_warnings`` of the images ``entries``; journals of 0.1.0 have none."""
    return count_warnings((entry.record.image, entry.record.result.get(WARNINGS, {})) for entry in entries)


def failed(name: str, error: str) -> ImageRecord:
    """Return the record of an image that failed, with the reason."""
    return ImageRecord(name, "failed", {"warning": "", "error": _one_line(error)})


def write(path: Path, table: str, journal: Path, entries: Sequence[Entry]) -> None:
    """Write ``table`` (cells.csv or images.csv) of the images ``entries``, in this order, to ``path``.

    Whole or not at all; one image's rows are in memory at a time. Raises ``OutputError``.
    """
    with_um = any("pixel_size_um" in entry.record.result for entry in entries)
    classes = _classes_of(entries)
    with atomic_file(path) as file, writing(path):
        file.write(_header(table, with_um, classes))
        for rows in _rows(table, journal, entries, with_um, classes):
            file.write(rows)


def _classes_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Names of the classes in the tables; all images come from one model."""
    return next((tuple(entry.record.result[BY_CLASS]) for entry in entries if BY_CLASS in entry.record.result), ())


def cell_columns(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Columns of cells.csv without the image's name and micrometres: those of ``ImageRecord.cells``."""
    return CELL_COLUMNS_WITH_CLASSES if _classes_of(entries) else CELL_COLUMNS


def _header(name: str, with_um: bool, classes: tuple[str, ...]) -> bytes:
    if name == CELLS_CSV:
        columns = CELL_COLUMNS_WITH_CLASSES if classes else CELL_COLUMNS
        return tables.csv_rows([["image", *columns, *(UM_COLUMNS if with_um else ())]])
    return tables.csv_rows([_image_columns(with_um, classes)])


def _rows(
    table: str, journal: Path, entries: Iterable[Entry], with_um: bool, classes: tuple[str, ...]
) -> Iterator[bytes]:
    """Yield the rows of each of ``entries`` that has any."""
    if table == CELLS_CSV:
        for record in whole_records(journal, (entry for entry in entries if entry.record.result.get("cells"))):
            yield _cell_rows(record, with_um)
        return
    columns = _image_columns(with_um, classes)
    for entry in entries:
        yield tables.csv_rows([[_value(entry.record, column) for column in columns]])


def _image_columns(with_um: bool, classes: tuple[str, ...]) -> tuple[str, ...]:
    counts = (_COUNT + name for name in classes)
    return (*IMAGE_COLUMNS[: -len(_WORDS)], *counts, *(IMAGE_UM_COLUMNS if with_um else ()), *_WORDS)


def _cell_rows(record: ImageRecord, with_um: bool) -> bytes:
    name = tables.csv_rows([[record.image]]).rstrip(b"\n").decode()
    lines = record.cells.splitlines()
    ends: Iterator[str] | list[str] = [""] * len(lines)
    if with_um:
        um = ["," * (len(UM_COLUMNS) - 1)] * len(lines) if record.cells_um is None else record.cells_um.splitlines()
        ends = (f",{line}" for line in um)
    return "".join(f"{name},{line}{end}\n" for line, end in zip(lines, ends, strict=True)).encode()


def _lines(columns: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """One CSV line per cell; only numbers, booleans and printable words, so that no value contains a line break."""
    return tables.csv_rows(zip(*(column.tolist() for column in columns.values()), strict=True)).decode()


def _value(record: ImageRecord, column: str) -> Any:
    if column in ("image", "status"):
        return getattr(record, column)
    if column.startswith(_COUNT):
        return record.result.get(BY_CLASS, {}).get(column.removeprefix(_COUNT))
    value = record.result.get(column, "" if column in _WORDS else None)
    # Four decimals are too few for a pixel size that others will multiply with.
    return f"{value:.6g}" if column == "pixel_size_um" and value is not None else value


def _one_line(text: str) -> str:
    return " ".join(text.split())
