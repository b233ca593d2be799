"""results.xlsx in LibreOffice with a German locale, where the decimal sign is a comma: numbers stay numbers."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_workbook import run

OFFICE = shutil.which("soffice") or shutil.which("libreoffice")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OFFICE is None, reason="no LibreOffice: apt-get install libreoffice-calc"),
]
_OFFICE, _TABLE, _TEXT = (
    f"{{urn:oasis:names:tc:opendocument:xmlns:{name}:1.0}}" for name in ("office", "table", "text")
)
GERMAN = """<?xml version="1.0" encoding="UTF-8"?>
<oor:items xmlns:oor="http://openoffice.org/2001/registry">
<item oor:path="/org.openoffice.Setup/L10N"><prop oor:name="ooSetupSystemLocale" oor:op="fuse"><value>de-DE</value></prop></item>
</oor:items>
"""  # noqa: E501


def cells_of(row: ElementTree.Element) -> list[tuple[str, str, str]]:
    """Type, value and shown text of the cells of a row of a flat ODF table, repeated ones one by one."""
    found = []
    for cell in row.iter(f"{_TABLE}table-cell"):
        shown = "".join("".join(text.itertext()) for text in cell.iter(f"{_TEXT}p"))
        one = (cell.get(f"{_OFFICE}value-type", ""), cell.get(f"{_OFFICE}value", ""), shown)
        found += [one] * min(int(cell.get(f"{_TABLE}number-columns-repeated", "1")), 100)
    return found


def test_numbers_stay_numbers_where_the_decimal_sign_is_a_comma(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    profile = tmp_path / "profile" / "user"
    profile.mkdir(parents=True)
    (profile / "registrymodifications.xcu").write_text(GERMAN, encoding="utf-8")
    assert OFFICE is not None
    command = [OFFICE, f"-env:UserInstallation={profile.parent.as_uri()}", "--headless", "--convert-to", "fods"]
    command += ["--outdir", str(tmp_path), str(tmp_path / "out" / "results.xlsx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    book = ElementTree.parse(tmp_path / "results.fods")
    shown_with_comma = 0
    for name in ("images", "cells"):
        with (tmp_path / "out" / f"{name}.csv").open(encoding="utf-8-sig", newline="") as file:
            expected = list(csv.reader(file))
        (table,) = [table for table in book.iter(f"{_TABLE}table") if table.get(f"{_TABLE}name") == name]
        lines = [cells_of(row) for row in table.iter(f"{_TABLE}table-row")]
        for texts, cells in zip(expected[1:], lines[1:], strict=False):
            for column, text, (kind, value, shown) in zip(expected[0], texts, cells, strict=False):
                if text.replace(".", "", 1).replace("-", "", 1).isdecimal():
                    assert kind == "float", (name, column, text, shown)
                    assert float(value) == pytest.approx(float(text)), (name, column)
                    shown_with_comma += "," in shown
    assert shown_with_comma > 10  # the locale was German
