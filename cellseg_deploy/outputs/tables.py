"""CSV tables: UTF-8, comma, one header row, ``\\n`` line ends, floats with a fixed number of digits.

So two runs over the same images give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ROWS = 10_000
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "'")


def csv_rows(rows: Iterable[Sequence[Any]]) -> bytes:
    """Format ``rows`` as CSV text in UTF-8, each cell by ``format_cell``."""
    return utf8("".join(",".join(_quoted(format_cell(value)) for value in row) + "\n" for row in rows)).encode()


def rows_in_parts(columns: Mapping[str, npt.NDArray[Any]]) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Yield the rows of a table of cells, ten thousand at a time: a Python number takes several times the memory of
    NumPy's."""
    for start in range(0, len(columns["label"]), _ROWS):
        yield zip(*(column[start : start + _ROWS].tolist() for column in columns.values()), strict=True)


def utf8(text: str) -> str:
    """Make ``text`` encodable: file names that are not UTF-8 show their invalid bytes as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def format_cell(value: Any) -> str:
    """Format one cell: None empty, booleans true/false, floats with 4 decimals, text safe from spreadsheets.

    Text that a spreadsheet would run as a formula (first character = + - @ tab CR) gets a leading apostrophe, and so
    does text that begins with one; otherwise two texts could become the same.
    """
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.4f}"
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _quoted(text: str) -> str:
    """Quote by RFC 4180; csv.writer before Python 3.13 leaves a lone carriage return in a file name unquoted."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text
