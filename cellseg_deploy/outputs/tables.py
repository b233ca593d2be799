"""CSV tables: UTF-8, comma, one header row, ``\\n`` line ends, floats with a fixed number of digits.

So two runs over the same images give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "'")


def csv_rows(rows: Iterable[Sequence[Any]]) -> bytes:
    """``rows`` as CSV text in UTF-8, each cell formatted by ``format_cell``."""
    return utf8("".join(",".join(_quoted(format_cell(value)) for value in row) + "\n" for row in rows)).encode()


def utf8(text: str) -> str:
    """``text`` that any encoder takes: file names that are no UTF-8 show their odd bytes as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def format_cell(value: Any) -> str:
    """Text of one cell: None empty, booleans true/false, floats with 4 decimals, text safe from spreadsheets.

    Text that a spreadsheet would run as a formula (first sign = + - @ tab CR) gets an apostrophe in front, and so does
    what begins with one, or two texts could become the same.
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
    """RFC 4180; not csv.writer, which before Python 3.13 leaves a lone carriage return in a file name unquoted."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text
