"""Which files are images, what they are called in every output, and which mask belongs to which image.

Paths are asked through ``os.path`` and not ``Path``, whose ``is_dir`` and ``exists`` raise where nobody may look, for a
name that is too long and for a server that does not answer: that is one image's trouble.
"""

# ruff: noqa: PTH110, PTH112, PTH114

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cellseg_deploy.errors import DataError, NothingToDoError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".tif", ".tiff")
_ENDINGS_SAID = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundImage:
    """An image file and the name it goes by in every output: its posix path relative to the folder that was given.

    ``problem``: why it must not be read, empty if it may; a run reports it as failed with this reason. ``root``: the
    folder that ``name`` is relative to, where names of several folders begin with the folder's own.
    """

    path: Path
    name: str
    problem: str = ""
    root: Path = Path()


@dataclass(frozen=True)
class Pair:
    """A training or test image and the mask that belongs to it; ``stem`` is the common relative path, no suffix."""

    stem: str
    image: Path
    mask: Path


def find_images(
    paths: Sequence[Path],
    *,
    follow_links: bool = False,
    is_silent: bool = False,
    may_be_missing: Collection[Path] = (),
    roots: Collection[Path] | None = None,
) -> list[FoundImage]:
    """Image files under ``paths`` (files and folders, folders recursively), sorted by name.

    In folders the suffix decides (``SUFFIXES``, any case) and hidden files are passed over; all others are left out
    with one warning that counts them by ending. A file that is named itself is taken as it is. Names are relative
    to the nearest of ``roots``, by default the folders given (for a file: its folder; see ``input_roots``). Where these
    are several, each name starts with its folder's name, numbered if two folders have the same one, so no two images
    share a name. A name depends on the file and on ``roots``, and on nothing else: not on the order of ``paths``, nor
    on what else is there. A file that is reached twice by the same path counts once.

    Links out of a given folder are followed only with ``follow_links`` (a folder only once, by where it lies if that is
    given too, so loops end); without it a linked file has a ``problem`` and a linked folder is left out with a warning.
    ``is_silent``: without warnings, as when they were said before. Raises ``UsageError`` for a path that does not
    exist, unless it is among ``may_be_missing``: those are images that cannot be read; and for a file that lies in none
    of ``roots``.
    """
    for path in paths:
        if not os.path.lexists(path) and path not in may_be_missing:
            raise UsageError(f"{path}: no such file or folder; check the path")
    folders = {absolute(path) for path in paths if os.path.isdir(path)}
    named = {absolute(path) for path in paths} - folders
    others: set[Path] = set()
    files = set(named)
    entered: set[str] = set()
    waiting = sorted(folders, key=lambda folder: (os.path.realpath(folder) != str(folder), folder))
    while waiting:  # linked folders last: an image is called by where it lies, whatever else leads there
        links: list[Path] = []
        for folder in waiting:
            files.update(_walk(folder, entered, links, others, follow_links=follow_links, is_silent=is_silent))
        waiting = links
    if not is_silent:
        _warn_of_others(others - files)
    prefixes = _prefixes(input_roots(paths) if roots is None else sorted(roots))

    @cache  # a folder's files have it in common
    def root_above(folder: Path) -> Path | None:
        return next((place for place in (folder, *folder.parents) if place in prefixes), None)

    found = []
    for file in files:
        root = file if file in prefixes else root_above(file.parent)
        if root is None:
            raise UsageError(
                f"{file}: lies in none of the folders that names begin in ({', '.join(map(str, prefixes))})"
            )
        problem = "" if follow_links or file in named else _leads_out(file, folders)
        found.append(FoundImage(file, _name(file, root, prefixes[root]), problem, root))
    return sorted(found, key=lambda image: image.name)


def input_roots(paths: Iterable[Path], were_folders: Collection[str] = ()) -> list[Path]:
    """The absolute folders that names of ``find_images(paths)`` are relative to, sorted, each once.

    A folder itself, a file's folder. What is not there was a file if it has an ending, as far as one can tell, and is
    not among ``were_folders`` (absolute).
    """
    return sorted({absolute(path if _is_folder(path, were_folders) else path.parent) for path in paths})


def path_of(name: str, roots: Sequence[Path]) -> Path | None:
    """The file that ``find_images`` calls ``name`` where names are relative to ``roots``; see ``input_roots``.

    None if no file can have that name. Whether it is there is another question.
    """
    for root, prefix in _prefixes(sorted(roots)).items():
        if name.startswith(prefix):
            return root / name.removeprefix(prefix)
    return None


def pair_by_stem(images_dir: Path, masks_dir: Path) -> list[Pair]:
    """Every image of ``images_dir`` with the mask of the same relative path and stem, sorted by stem.

    Raises ``UsageError`` if a folder is none, ``NothingToDoError`` if there is no image, ``DataError`` naming the
    files if one has no partner or two share a stem.
    """
    images, masks = images_by_stem(images_dir), images_by_stem(masks_dir)
    if not images:
        raise NothingToDoError(f"{images_dir}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    for here, there, what, folder in (
        (images, masks, "mask", masks_dir),
        (masks, images, "image", images_dir),
    ):
        lonely = [here[stem] for stem in sorted(here.keys() - there.keys())]
        if lonely:
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise DataError(
                f"{lonely[0]}{more}: no {what} of the same name in {folder}; "
                f"expected {stem_of(lonely[0].name)} with one of {', '.join(SUFFIXES)}; add it or take the file out"
            )
    return [Pair(stem, images[stem], masks[stem]) for stem in sorted(images)]


def check_same_size(pair: Pair, image_hw: tuple[int, int], mask_hw: tuple[int, int]) -> None:
    """Raise ``DataError`` naming both files if image and mask differ in size."""
    if tuple(image_hw) != tuple(mask_hw):
        raise DataError(
            f"{pair.mask} is {mask_hw[1]} x {mask_hw[0]} px (width x height) but its image {pair.image} is "
            f"{image_hw[1]} x {image_hw[0]}; they must be of one size"
        )


def absolute(path: Path) -> Path:
    """``path`` from the root of the file system, by its words: links stay, and so the names that the user gave."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _is_folder(path: Path, were_folders: Collection[str]) -> bool:
    if os.path.exists(path):
        return os.path.isdir(path)
    no_ending = not path.suffix[1:2].isalpha()  # the day of a folder 2024.11.23 is none
    return no_ending or str(absolute(path)) in were_folders


def _name(file: Path, root: Path, prefix: str) -> str:
    if file == root:  # a folder that is gone
        return prefix.removesuffix("/") or root.name
    return prefix + file.relative_to(root).as_posix()


def _walk(
    root: Path, entered: set[str], links: list[Path], others: set[Path], *, follow_links: bool, is_silent: bool
) -> Iterator[Path]:
    """Image files under ``root``; all other files are added to ``others``, with ``follow_links`` linked folders
    to ``links``. Folders whose real path is among ``entered`` are passed over, the others added to it."""
    for folder, folders, files in os.walk(root, onerror=_raise_unlistable):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += (Path(folder, name) for name in folders if follow_links and os.path.islink(Path(folder, name)))
        for name in folders:
            if is_silent:
                continue
            if not follow_links and os.path.islink(Path(folder, name)):
                _log.warning("%s: linked folder not followed", Path(folder, name))
            elif name.lower().endswith(SUFFIXES):
                _log.info("%s: a folder, not an image", Path(folder, name))
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                yield Path(folder, name)
            else:
                others.add(Path(folder, name))


def _warn_of_others(files: set[Path]) -> None:
    """Say what was left out: an ending nobody thought of may be that of the images."""
    if files:
        counts = Counter(file.suffix.lower() for file in files)
        said = [f"{count} {ending or 'without ending'}" for ending, count in sorted(counts.items(), key=_most_first)]
        more = f" and {len(said) - _ENDINGS_SAID} more endings" if len(said) > _ENDINGS_SAID else ""
        _log.warning(
            "not read: %s%s; expected files ending in %s; convert other images to PNG or TIFF",
            ", ".join(said[:_ENDINGS_SAID]),
            more,
            ", ".join(SUFFIXES),
        )


def _most_first(ending_and_count: tuple[str, int]) -> tuple[int, str]:
    ending, count = ending_and_count
    return -count, ending


def _leads_out(file: Path, folders: Collection[Path]) -> str:
    """Why ``file`` must not be read if it is a link that leads out of the outermost of ``folders`` around it."""
    if not os.path.islink(file) or not os.path.exists(file):
        return ""  # a link to nothing, or to where nobody may look, is reported when it is read
    root = next(place for place in reversed(file.parents) if place in folders)
    if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        return ""
    return f"{file}: a link out of the folder {root}; if that is meant, give --follow-links"


def _raise_unlistable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")


def _prefixes(roots: list[Path]) -> dict[Path, str]:
    """What the names of images in each of the sorted ``roots`` begin with."""
    return _unique_folder_names(roots) if len(roots) > 1 else dict.fromkeys(roots, "")


def _unique_folder_names(folders: list[Path]) -> dict[Path, str]:
    """A prefix ending in / for each folder: its name, with a number where two are alike (also but for case)."""
    taken: set[str] = set()
    prefixes = {}
    for folder in folders:
        base = folder.name or "root"
        name, number = base, 1
        while unicodedata.normalize("NFC", name).casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(unicodedata.normalize("NFC", name).casefold())
        prefixes[folder] = name + "/"
    return prefixes


def stem_of(name: str) -> str:
    """``name`` without image endings; ``a.png.tif``, the label image of ``a.png``, has the stem ``a`` too."""
    stem = name
    while stem.lower().endswith(SUFFIXES) and "." in stem.rpartition("/")[2][1:]:
        stem = stem.rpartition(".")[0]
    return stem


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images of ``folder`` by relative path and stem.

    Raises ``UsageError`` if it is no folder, ``DataError`` naming the files if two share a stem.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: not a folder; expected one with images")
    stems: dict[str, Path] = {}
    for found in find_images([folder], follow_links=True):
        stem = stem_of(found.name)
        if stem in stems:
            raise DataError(
                f"{stems[stem]} and {found.path} share the stem {stem}; images and masks pair by stem: rename one"
            )
        stems[stem] = found.path
    return stems
