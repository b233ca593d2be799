"""Find image files, name them as in every output, and pair images with masks.

Paths are examined with ``os.path`` instead of ``Path``, whose ``is_dir`` and ``exists`` raise without permission, for a
name that is too long and for a server that does not respond: such a failure must affect only one image.
"""

# ruff: noqa: PTH110, PTH112, PTH114

from __future__ import annotations

import codecs
import logging
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.files import urls

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".tif", ".tiff")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".czi")
"""Endings of scanners' slides, which are read by region, and only if they are passed by name."""
MASK_ENDINGS = ("_cp_masks", "_masks", "_mask", "_seg", "_labels", "_label")
"""What tools append to an image's stem to name its label image: Cellpose, QuPath, napari, people."""
_ENDINGS_SAID = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundImage:
    """An image file and its name in every output: its posix path relative to the folder passed, ``root``.

    ``problem``: why it must not be read, empty if it may; a run reports it as failed with this reason.
    """

    path: Path
    name: str
    problem: str = ""
    root: Path = Path()


@dataclass(frozen=True)
class Pair:
    """A training or test image and its mask; ``stem`` is their common relative path without suffix."""

    stem: str
    image: Path
    mask: Path


def find_images(paths: Iterable[Path], *, follow_links: bool = False, is_silent: bool = False) -> list[FoundImage]:
    """Return the image files under ``paths`` (files and folders, folders recursively), sorted by name.

    In folders the suffix decides (``SUFFIXES``, any case) and hidden files are skipped; all others are left out with
    one warning that counts them by ending. A file passed itself is accepted whatever its ending. Names are relative to
    the folder passed; if there are several, each name starts with its folder's name (see ``input_roots``). A folder in
    a bucket, ``s3://BUCKET/FOLDER``, is passed alone.

    Links out of a passed folder are followed only with ``follow_links`` (a linked folder once, and not if it leads into
    a passed folder); without it a linked file has a ``problem`` and a linked folder is left out with a warning.
    ``is_silent``: without warnings, as for a repeated search. Raises ``UsageError`` for a path that does not exist, a
    folder that cannot be listed, and two folders of one name.
    """
    paths = list(paths)
    if any(map(urls.is_url, paths)):
        return _in_bucket(paths, is_silent=is_silent)
    for path in paths:
        if not os.path.lexists(path):
            hint = "; a pattern in quotes is not expanded: leave out the quotes" if "*" in str(path) else ""
            raise UsageError(f"{path}: no such file or folder; check the path{hint}")
    roots = _roots(paths)
    folders = [root for root, is_folder in roots.items() if is_folder]
    files = {absolute(path) for path in paths if not os.path.isdir(path)}
    named, others = frozenset(files), set[Path]()
    entered, reals = set[str](), [Path(os.path.realpath(folder)) for folder in folders]
    for folder in folders:
        files.update(_walk(folder, reals, entered, others, follow_links=follow_links, is_silent=is_silent))
    if not is_silent:
        _warn_of_others(others - files)
    found = []
    for file in files:
        root = _root_of(file, roots)
        problem = "" if follow_links or file in named else _leads_out(file, root)
        prefix = f"{_folder_name(root)}/" if len(roots) > 1 else ""
        found.append(FoundImage(file, prefix + file.relative_to(root).as_posix(), problem, root))
    return sorted(found, key=lambda image: image.name)


def require_images(paths: Iterable[Path], *, follow_links: bool = False) -> list[FoundImage]:
    """Return ``find_images`` of the same arguments. Raises ``NothingToDoError`` if there is no image."""
    paths = list(paths)
    if not (images := find_images(paths, follow_links=follow_links)):
        where = ", ".join(map(urls.text_of, paths))
        raise NothingToDoError(f"{where}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    return images


def input_roots(paths: Iterable[Path]) -> list[Path]:
    """Return the absolute folders that names of ``find_images(paths)`` are relative to, sorted.

    A root is a passed folder, or the folder of a passed file; paths inside a passed folder belong to it. Raises
    ``UsageError`` if two roots have the same name, ignoring case: images of the same name would be ambiguous.
    """
    return sorted(_roots(list(paths)))


def paths_in_list(file: Path) -> list[Path]:
    """Return the paths in the text file ``file``, one per line, or NUL-terminated as ``find -print0`` writes them.

    ``-`` is stdin. Empty lines are skipped; names that are not UTF-8 are kept. Raises ``UsageError`` if the file cannot
    be read, is in UTF-16 or contains no path.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: the list cannot be read ({error.strerror or error})") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{file}: the list is in UTF-16; save it as UTF-8 (PowerShell: Out-File -Encoding utf8)")
    data = data.removeprefix(codecs.BOM_UTF8)  # as Notepad and Excel write it
    lines = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    paths = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    if not paths:
        raise UsageError(f"{file}: the list names no path; expected one per line")
    return paths


def pair_by_stem(images_dir: Path, masks_dir: Path) -> list[Pair]:
    """Pair every image of ``images_dir`` with the mask of the same relative path and stem, sorted by stem.

    If no file has the very stem, one of ``MASK_ENDINGS`` is ignored: ``a_cp_masks.png`` is the mask of ``a.tif``. Both
    folders may be the same: files named like this are its masks.

    Raises ``UsageError`` if a path is not a folder, ``NothingToDoError`` if there is no image, ``DataError`` naming the
    files if one has no partner or two share a stem.
    """
    images, masks = images_by_stem(images_dir), images_by_stem(masks_dir)
    if not images:
        raise NothingToDoError(f"{images_dir}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    if images_dir.samefile(masks_dir):
        named = {stem: path for stem, path in images.items() if bare_stem(stem) in images.keys() - {stem}}
        if named:
            images, masks = {stem: path for stem, path in images.items() if stem not in named}, named
    masks = by_partner(masks, images)
    images = by_partner(images, masks)  # label images of a tool may be judged, too
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


def bare_stem(stem: str) -> str:
    """``stem`` without one of ``MASK_ENDINGS``, in any case."""
    ending = next((ending for ending in MASK_ENDINGS if stem.lower().endswith(ending)), "")
    return stem.removesuffix(stem[len(stem) - len(ending) :]) if ending else stem


def by_partner(files: Mapping[str, Path], partners: Collection[str]) -> dict[str, Path]:
    """``files`` by the stem of their partner, or by their own if there is none. Raises ``DataError`` if two share one.

    >>> by_partner({"a_masks": Path("a_masks.png"), "b": Path("b.png")}, ["a", "b"])["a"].name
    'a_masks.png'
    """
    stems: dict[str, Path] = {}
    for stem, path in files.items():
        bare = bare_stem(stem)
        key = bare if stem not in partners and bare in partners else stem
        if key in stems:
            raise _same_stem(stems[key], path, key)
        stems[key] = path
    return stems


def check_same_size(pair: Pair, image_hw: tuple[int, int], mask_hw: tuple[int, int]) -> None:
    """Raise ``DataError`` naming both files if image and mask differ in size."""
    if tuple(image_hw) != tuple(mask_hw):
        raise DataError(
            f"{pair.mask} is {mask_hw[1]} x {mask_hw[0]} px (width x height) but its image {pair.image} is "
            f"{image_hw[1]} x {image_hw[0]}; they must be of one size"
        )


def absolute(path: Path) -> Path:
    """Make ``path`` absolute without resolving links, so that the names passed by the user are kept; a URL is."""
    return path if urls.is_url(path) else Path(os.path.abspath(path))  # noqa: PTH100


def _in_bucket(paths: Sequence[Path], *, is_silent: bool) -> list[FoundImage]:
    """Return ``find_images`` of a folder in a bucket."""
    root = paths[0]
    if len(paths) > 1:
        raise UsageError(
            f"{', '.join(map(urls.text_of, paths))}: a URL must be passed alone; expected one s3:// folder"
        )
    if urls.scheme_of(root) != urls.SCHEME:
        raise UsageError(f"{urls.text_of(root)}: {urls.scheme_of(root)}:// cannot be read; expected s3://BUCKET/FOLDER")
    try:
        names = urls.sizes(root)
    except OSError as error:
        raise UsageError(f"{urls.text_of(root)}: the folder cannot be listed ({error.strerror})") from error
    seen = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    images = [name for name in seen if name.lower().endswith(SUFFIXES)]
    if not is_silent:
        _warn_of_others({Path(name) for name in set(seen) - set(images)})
    return [FoundImage(root / name, name, "", root) for name in sorted(images)]


def _roots(paths: Sequence[Path]) -> dict[Path, bool]:
    """Folders that names are relative to, and whether each was passed itself; see ``input_roots``."""
    if any(map(urls.is_url, paths)):
        return dict.fromkeys(paths, True)
    roots: dict[Path, bool] = {}
    reals = set[Path]()
    folders = {absolute(path): Path(os.path.realpath(path)) for path in paths if os.path.isdir(path)}
    for folder, real in sorted(folders.items(), key=lambda item: (len(item[1].parts), item[0])):
        if reals.isdisjoint((real, *real.parents)):  # otherwise the same folder, or one inside it
            reals.add(real)
            roots[folder] = True
    for file in (absolute(path) for path in paths if not os.path.isdir(path)):
        if not any(roots.get(parent) for parent in file.parents):
            roots[file.parent] = False
    names: dict[str, Path] = {}
    for root in sorted(roots):
        if (other := names.setdefault(unicodedata.normalize("NFC", _folder_name(root)).casefold(), root)) != root:
            raise UsageError(f"{other} and {root} have the same name; pass their common parent, or one at a time")
    return roots


def _root_of(file: Path, roots: Mapping[Path, bool]) -> Path:
    """Passed folder that contains ``file``, or else the file's own folder."""
    return next((place for place in file.parents if roots.get(place)), file.parent)


def _folder_name(folder: Path) -> str:
    return folder.name or "root"


def _walk(
    root: Path, reals: Collection[Path], entered: set[str], others: set[Path], *, follow_links: bool, is_silent: bool
) -> Iterator[Path]:
    """Yield image files under ``root``; all other files are added to ``others``.

    Folders whose real path is in ``entered`` are skipped, the others added to it. Links into one of ``reals``, the real
    paths of all passed folders, are skipped too: an image there is named by its real location.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unlistable, followlinks=follow_links):
        if (here := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(here)
        for name in sorted(folders):
            path = Path(folder, name)
            is_link = os.path.islink(path)
            if name.startswith(".") or (is_link and follow_links and _is_inside(path, reals)):
                folders.remove(name)
            elif is_link and not follow_links:
                _log.log(logging.DEBUG if is_silent else logging.WARNING, "%s: linked folder not followed", path)
            elif name.lower().endswith(SUFFIXES) and not is_silent:
                _log.info("%s: a folder, not an image", path)
        folders.sort(key=lambda name: (os.path.islink(Path(folder, name)), name))  # links last
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                yield Path(folder, name)
            elif name != "classes.csv":  # of label images: see annotations.labels
                others.add(Path(folder, name))


def _is_inside(path: Path, reals: Collection[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(folder) for folder in reals)


def _warn_of_others(files: set[Path]) -> None:
    """Warn of files left out: their ending may be an unexpected image format."""
    if files:
        counts = Counter(file.suffix.lower() for file in files)
        said = [f"{count} {ending or 'without ending'}" for ending, count in sorted(counts.items(), key=_most_first)]
        more = f" and {len(said) - _ENDINGS_SAID} more endings" if len(said) > _ENDINGS_SAID else ""
        _log.warning(
            "not read: %s%s; expected files ending in %s; %sconvert other images to PNG or TIFF",
            ", ".join(said[:_ENDINGS_SAID]),
            more,
            ", ".join(SUFFIXES),
            "pass slides by name; " if any(ending in SLIDES for ending in counts) else "",
        )


def _most_first(ending_and_count: tuple[str, int]) -> tuple[int, str]:
    ending, count = ending_and_count
    return -count, ending


def _leads_out(file: Path, root: Path) -> str:
    """Return why ``file`` must not be read, if it is a link that leads outside the passed folder ``root``, else ""."""
    if not os.path.islink(file) or not os.path.exists(file):
        return ""  # a dangling or inaccessible link is reported when it is read
    if _is_inside(file, [Path(os.path.realpath(root))]):
        return ""
    return f"{file}: a link that leads outside the folder {root}; to read it anyway, give `follow_links=True`"


def _raise_unlistable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")


def stem_of(name: str) -> str:
    """Strip image endings from ``name``; ``a.png.tif``, the label image of ``a.png``, has the stem ``a`` too."""
    stem = name
    while stem.lower().endswith(SUFFIXES) and "." in stem.rpartition("/")[2][1:]:
        stem = stem.rpartition(".")[0]
    return stem


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Images of ``folder`` by relative path and stem.

    Raises ``UsageError`` if it is not a folder, ``DataError`` naming the files if two share a stem.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: not a folder; expected one with images")
    stems: dict[str, Path] = {}
    for found in find_images([folder], follow_links=True):
        stem = stem_of(found.name)
        if stem in stems:
            raise _same_stem(stems[stem], found.path, stem)
        stems[stem] = found.path
    return stems


def _same_stem(first: Path, second: Path, stem: str) -> DataError:
    return DataError(f"{first} and {second} share the stem {stem}; images and masks pair by stem: rename one")
