"""Counts by hand in a CSV file: a header with ``image`` and ``count``, one row per image.

Separated by commas, semicolons (which Excel writes if the comma is the decimal sign) or tabs; UTF-8 with or without
BOM, or UTF-16 with BOM. A count is an integer, 0 or more. Anything else is refused with its line number: an omitted or
misread count would become an error of the method being judged.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import DataError, NothingToDoError
from cellseg_deploy.images.find import images_by_stem, stem_of

COLUMNS = ("image", "count")
_WHOLE = re.compile(r"[0-9]{1,9}")
_NAMED = 5  # files named in an error


@dataclass(frozen=True)
class CountedImage:
    """An image with name ``stem`` (see ``images.pair_by_stem``) and its cell count by hand."""

    stem: str
    path: Path
    count: int


@dataclass(frozen=True)
class _Row:
    line: int
    name: str
    count: int


def pair_with_counts(folder: Path, table: Path) -> list[CountedImage]:
    """Pair every image of ``folder`` with its count in ``table``, sorted by stem; names may lack the suffix.

    Raises ``UsageError`` if ``folder`` is not a folder, ``NothingToDoError`` if it holds no images, ``DataError`` for
    an unreadable table, an image without a count, or a count without an image.
    """
    rows = _read(table)
    images = images_by_stem(folder)
    if not images:
        raise NothingToDoError(f"{folder}: no image found; expected those that {table} lists")
    uncounted = [str(images[stem]) for stem in sorted(images.keys() - rows.keys())]
    missing = [f"{row.name} (line {row.line})" for stem, row in rows.items() if stem not in images]
    if uncounted or missing:
        what = [
            f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}"
            for names, kind in ((uncounted, "without a count"), (missing, f"not found as an image in {folder}"))
            if names
        ]
        raise DataError(f"{table}: images and counts do not pair; {'; '.join(what)}. Add them or take them out")
    return [CountedImage(stem, images[stem], rows[stem].count) for stem in sorted(images)]


def _read(table: Path) -> Mapping[str, _Row]:
    """Return rows by stem of the image."""
    reader = csv.reader(io.StringIO(text := _text(table), newline=""), delimiter=_separator(text), strict=True)
    rows: dict[str, _Row] = {}
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        _check_header(table, columns)
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if not any(values):
                continue
            row = _row(table, reader.line_num, columns, values)
            stem = stem_of(row.name)
            if stem in rows:
                raise DataError(
                    f"{table}: lines {rows[stem].line} and {row.line} both count image {stem}; expected one "
                    "count per image"
                )
            rows[stem] = row
    except csv.Error as error:
        raise DataError(f"{table}: line {reader.line_num}: not valid CSV ({error})") from error
    if not rows:
        raise DataError(f"{table}: lists no image; expected one row per image below the header")
    return rows


def _check_header(table: Path, columns: list[str]) -> None:
    here = ", ".join(columns) or "nothing"
    for name in COLUMNS:
        if columns.count(name) != 1:
            raise DataError(f"{table}: line 1 must name the columns image and count once each, found {here}")
    others = [name for name in columns if name not in COLUMNS and name]
    if others:
        raise DataError(
            f"{table}: column {others[0]}: expected image and count alone; give the count of all cells, or for each "
            "class of the model a table of its own with `classes=NAME`, and remove the other columns"
        )


def _row(table: Path, line: int, columns: list[str], values: list[str]) -> _Row:
    if len(values) < len(columns) or any(values[len(columns) :]):
        raise DataError(
            f"{table}: line {line} has {len(values)} cells, the header {len(columns)}; expected as many (a decimal "
            "comma, or a comma in a name that is not quoted?)"
        )
    named = dict(zip(columns, values, strict=False))
    name, count = named["image"].replace("\\", "/"), named["count"]
    if not name:
        raise DataError(f"{table}: line {line} names no image")
    if not _WHOLE.fullmatch(count):
        raise DataError(
            f"{table}: line {line}: the count of {name} is {count!r}; expected a whole number, 0 or more, without "
            "decimals and thousands separators"
        )
    return _Row(line, name, int(count))


def _separator(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _text(table: Path) -> str:
    try:
        data = table.read_bytes()
    except OSError as error:
        raise DataError(f"{table}: the counts cannot be read ({error.strerror or error})") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f'{table}: line {line} is not UTF-8; save the file as "CSV UTF-8"') from error
