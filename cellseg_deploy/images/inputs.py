"""Paths as people give them: patterns that the shell left alone, and lists in a text file."""

from __future__ import annotations

import codecs
import glob
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import absolute, input_roots


@dataclass(frozen=True)
class GivenPaths:
    """Files and folders to look for images in, as ``image_files.find_images`` takes them.

    ``roots``: the absolute folders that names are relative to, sorted. ``may_be_missing``: those of ``paths`` that were
    written down earlier, and may be gone by now.
    """

    paths: tuple[Path, ...]
    roots: tuple[Path, ...]
    may_be_missing: frozenset[Path] = frozenset()


def expanded(paths: Iterable[Path]) -> GivenPaths:
    """``paths``, with those that do not exist and hold ``*``, ``?`` or ``[`` replaced by what matches, sorted.

    ``**`` stands for any number of folders, but for linked ones, which may lead round in a circle. Names of matches
    begin in the folder before the first wildcard, so that an image is called the same whatever else matches. A shell
    that expands patterns itself leaves nothing to do here; Windows has none. Raises ``UsageError`` for a pattern that
    nothing matches.
    """
    found, roots = list[Path](), set[Path]()
    for path in paths:
        if os.path.lexists(path) or not glob.has_magic(str(path)):
            found.append(path)
            roots.update(input_roots([path]))
            continue
        root = absolute(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)))
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if "**" in path.parts:
            matches = _not_through_links(matches, root)
        if not matches:
            raise UsageError(f"{path}: nothing matches this pattern; check the path")
        found += matches
        outside = [match for match in matches if not absolute(match).is_relative_to(root)]  # of a pattern with ..
        roots.update([root], input_roots(outside))
    return GivenPaths(tuple(found), tuple(sorted(roots)))


def _not_through_links(matches: list[Path], root: Path) -> list[Path]:
    """Those of ``matches`` to which no linked folder below ``root`` leads."""

    @cache  # a folder's files have it in common
    def is_linked(folder: Path) -> bool:
        if folder == root or not folder.is_relative_to(root):
            return False
        return (os.path.islink(folder) and os.path.isdir(folder)) or is_linked(folder.parent)  # noqa: PTH112, PTH114

    return [match for match in matches if not is_linked(absolute(match))]


def listed(file: Path) -> list[Path]:
    """Paths in the text file ``file``, one a line, or NUL-terminated as ``find -print0`` writes them; ``-`` is stdin.

    Empty lines are passed over, names that are no UTF-8 are kept. UTF-16 is understood by the mark that it begins with,
    as PowerShell writes it. Relative paths are relative to the current folder. Raises ``UsageError`` if the file cannot
    be read or decoded, or names nothing.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: the list cannot be read ({error.strerror or error})") from error
    try:
        data = _unmarked(data)
        lines = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
        paths = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    except UnicodeError as error:
        raise UsageError(f"{file}: the list cannot be decoded ({error}); save it as UTF-8") from error
    if not paths:
        raise UsageError(f"{file}: the list names no path; expected one a line")
    return paths


def _unmarked(data: bytes) -> bytes:
    """``data`` as names are on disk, without the mark of its encoding. Raises ``UnicodeError``."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the former begins as UTF-16 does
        raise UnicodeError("it is in UTF-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return os.fsencode(data.decode("utf-16"))
    return data.removeprefix(codecs.BOM_UTF8)  # as Notepad and Excel write it
