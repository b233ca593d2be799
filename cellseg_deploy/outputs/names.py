"""Names of an image's outputs: its own name plus a suffix, so the outputs of ``a.png`` and ``a.jpg`` never collide."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

LABEL_SUFFIX = ".tif"
OVERLAY_SUFFIX = ".jpg"
LONGEST_SUFFIX_BYTES = len(".geojson")
_MAX_NAME_BYTES = 255  # per path component, on every common file system


def output_names(names: Sequence[str], kept: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map each image name to the name of its outputs without suffix (relative posix path), for all images of a run.

    Usually this is the name itself. Names that differ only in case or Unicode composition would overwrite each other
    on file systems that ignore the difference, so all but the first get ``~2``, ``~3``... A last component too long for
    the suffix is truncated and gets a hash. So that no file needs the name of a folder, ``s.png`` is changed if there
    is an image in a folder ``s.png.tif``. ``kept``: names of existing outputs, of these images or others; they do not
    change, even if images added later would have changed which is first.
    """
    result = {name: kept[name] for name in names if name in kept} if kept else {}
    taken = {_folded(name) for name in (kept or {}).values()} | _blocked_by_folders([*names, *(kept or {}).values()])
    for name in sorted(set(names) - set(result)):
        number, candidate = 1, _shortened(name)
        while _folded(candidate) in taken:
            number += 1
            candidate = _shortened(f"{name}~{number}")
        taken.add(_folded(candidate))
        result[name] = candidate
    return result


def _blocked_by_folders(names: Sequence[str]) -> set[str]:
    """Return case-folded names that, with some suffix, equal a folder of ``names``."""
    folders = {_folded(parent) for name in names for parent in map(str, PurePosixPath(name).parents)}
    return {
        folder[:at] for folder in folders for at, sign in enumerate(folder) if sign == "." and "/" not in folder[at:]
    }


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _shortened(name: str) -> str:
    folder, _, last = name.rpartition("/")
    limit = _MAX_NAME_BYTES - LONGEST_SUFFIX_BYTES
    raw = os.fsencode(last)
    if len(raw) <= limit:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    cut = raw[: limit - len(digest) - 1].decode("utf-8", "ignore")
    return f"{folder}/{cut}~{digest}" if folder else f"{cut}~{digest}"
