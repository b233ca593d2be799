"""The tables of a run as one Excel workbook: numbers are numbers whatever the locale, names are text, never formulas.

Written when the run ends, from the finished tables and the first line of the journal. It contains no time: the same
results give the same bytes.
"""

from __future__ import annotations

import csv
import datetime
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cellseg_deploy.files.atomic import writing
from cellseg_deploy.outputs.formats import CELLS_CSV, IMAGES_CSV, SUMMARY_CSV

MAX_ROWS = 1_048_576
"""Of a sheet in Excel, the header included."""
_MAX_TEXT = 32_767  # characters of a cell in Excel
_TEXTS = frozenset(("group", "image", "status", "warning", "error", "class", "left_out_by", "pixel_size_source"))
_BOOLEANS = {"true": True, "false": False}
_CREATED = datetime.datetime(2000, 1, 1)  # fixed, see above
_JOURNAL = "journal.jsonl"

_log = logging.getLogger(__name__)


def write(out: Path, _files: Any, path: Path) -> None:
    """Write the workbook of the tables in ``out`` to ``path``: sheets summary, images, cells and about.

    Cells beyond Excel's last row are left out, which the log and the sheet ``about`` say. Raises ``OutputError``.
    """
    import xlsxwriter
    from xlsxwriter.exceptions import FileCreateError

    with writing(path):
        book = xlsxwriter.Workbook(
            path,
            {
                "constant_memory": True,
                "tmpdir": str(path.parent),
                "strings_to_formulas": False,
                "strings_to_urls": False,
                "strings_to_numbers": False,
                "use_zip64": True,
            },
        )
        book.set_properties({"title": "cellseg-infer", "created": _CREATED})
        left_out = {name: _add_table(book, name.removesuffix(".csv"), out / name) for name in _TABLES}
        about = [
            ("rows left out", f"{number} of {name}, beyond the last row of a sheet")
            for name, number in left_out.items()
            if number
        ]
        for name, number in left_out.items():
            if number:
                _log.warning("results.xlsx: %d rows do not fit in a sheet; all are in %s", number, name)
        _add_about(book, [*about, *_facts(out / _JOURNAL)])
        try:
            book.close()
        except FileCreateError as error:
            raise OSError(str(error)) from error


_TABLES = (SUMMARY_CSV, IMAGES_CSV, CELLS_CSV)


def _add_table(book: Any, name: str, table: Path) -> int:
    """Add the CSV file ``table`` as the sheet ``name``; return the number of rows that did not fit."""
    sheet = book.add_worksheet(name)
    sheet.freeze_panes(1, 1)
    bold, left_out = book.add_format({"bold": True}), 0
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        sheet.set_column(0, 0, 32)
        sheet.set_column(1, len(header) - 1, 14)
        for column, text in enumerate(header):
            sheet.write_string(0, column, text, bold)
        is_text = [name in _TEXTS for name in header]
        for row, values in enumerate(reader, start=1):
            if row >= MAX_ROWS:
                left_out += 1
                continue
            for column, value in enumerate(values):
                if value:
                    _write(sheet, row, column, value, is_text=is_text[column])
    return left_out


def _write(sheet: Any, row: int, column: int, value: str, *, is_text: bool) -> None:
    if is_text:  # an apostrophe keeps a spreadsheet from reading a formula in a CSV file; here text is text
        sheet.write_string(row, column, value.removeprefix("'")[:_MAX_TEXT])
    elif value in _BOOLEANS:
        sheet.write_boolean(row, column, _BOOLEANS[value])
    else:
        sheet.write_number(row, column, float(value))


def _facts(journal: Path) -> Iterator[tuple[str, str]]:
    """Yield name and value of everything the results depend on, from the first line of ``journal``."""
    with journal.open("rb") as file:
        yield from _flat(json.loads(file.readline())["identity"], "")


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            yield f"{prefix}{name}".replace("_", " "), text.encode("utf-8", "backslashreplace").decode()


def _add_about(book: Any, facts: list[tuple[str, str]]) -> None:
    sheet = book.add_worksheet("about")
    sheet.set_column(0, 0, 32)
    sheet.set_column(1, 1, 80)
    for row, (name, value) in enumerate(facts):
        sheet.write_string(row, 0, name)
        sheet.write_string(row, 1, value[:_MAX_TEXT])
