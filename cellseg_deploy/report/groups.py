"""Groups of images whose results are summed: folders, or what the user says."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from cellseg_deploy.errors import UsageError

UNGROUPED = "(none)"
"""Group of images that neither the pattern nor the table knows."""

_COLUMNS = ("image", "group")


def grouping(group_by: str) -> Callable[[str], str]:
    """Return the function that maps the name of an image, relative to the input folder, to its group.

    ``group_by``: "" for the image's folder (``.`` for images that lie in no subfolder); the path of a CSV file, ending
    in ``.csv``, with the columns ``image`` (name as in images.csv, or only the file's own name) and ``group``;
    otherwise a regular expression that is searched in the name: its first group, or all that it matches, is the
    image's group.

    Raises ``UsageError`` for an invalid expression or table.

    >>> grouping("patient[0-9]+")("ward/patient07_field3.png")
    'patient07'
    >>> grouping("")("ward/patient07_field3.png")
    'ward'
    """
    if not group_by:
        return lambda name: str(PurePosixPath(name).parent)
    if group_by.lower().endswith(".csv"):
        return _by_table(Path(group_by))
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UsageError(
            f"`group_by={group_by!r}` is not a regular expression ({error}); "
            "expected one such as 'patient[0-9]+', or a .csv file with the columns image,group"
        ) from error

    def of(name: str) -> str:
        found = pattern.search(name)
        return UNGROUPED if found is None else found.group(1 if pattern.groups else 0) or UNGROUPED

    return of


def _by_table(path: Path) -> Callable[[str], str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
        lines = text.splitlines()
        separator = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","  # Excel's, in half of Europe
        rows = list(csv.DictReader(text.splitlines(keepends=True), delimiter=separator, strict=True))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); expected columns image,group") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a CSV file in UTF-8 ({error}); expected columns image,group") from error
    if not rows or not set(_COLUMNS) <= set(rows[0]):
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise UsageError(f"{path}: has {found}; expected rows with the columns image and group")
    groups = dict[str, str]()
    for number, row in enumerate(rows, start=2):
        image, group = ((row[column] or "").strip() for column in _COLUMNS)
        if not image or not group:
            raise UsageError(
                f"{path}: row {number} has no {'group' if image else 'image'}; fill it in, or delete the row"
            )
        if groups.setdefault(image, group) != group:
            raise UsageError(f"{path}: {image} is in the groups {groups[image]} and {group}; give it one")
    return lambda name: groups.get(name) or groups.get(name.rpartition("/")[2]) or UNGROUPED
