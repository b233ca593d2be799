"""Cells drawn in any program, read as label images: the one way in for training, evaluation and measurement.

=====================  =======================================================================================
kind                   files
=====================  =======================================================================================
label images           PNG, TIFF (``images.read.read_labels``), colour-coded masks too; classes: ``classes.csv``
                       beside them, image,label,class
Cellpose               ``NAME_seg.npy``, or an array alone in ``NAME.npy``
ImageJ ROIs            ``NAME.zip`` of the ROI Manager, ``NAME.roi``; class: the property ``class``
QuPath GeoJSON         ``NAME.geojson`` or .json; class: the classification
COCO                   one json for all images, or several; polygons or RLE; class: the category
YOLO polygons          ``NAME.txt``; names of the classes in ``classes.txt`` or ``data.yaml``
=====================  =======================================================================================

The kind follows from the endings in the folder, json from its content. All but COCO pair with images by stem: the
image's own name may stand in the file's (``a.png.zip``), and so may ``images.find.MASK_ENDINGS`` or ``_rois``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cellseg_deploy.annotations import cellpose, imagej, qupath, yolo
from cellseg_deploy.annotations.coco import CocoFile
from cellseg_deploy.annotations.files import yolo_names
from cellseg_deploy.annotations.read import ImageNames
from cellseg_deploy.annotations.shapes import Painted, Shape, paint_shapes
from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.files.text import read_text
from cellseg_deploy.images.find import SUFFIXES, absolute, bare_stem, by_partner, find_images, stem_of
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import read_image, read_numbered_labels
from cellseg_deploy.outputs import label_tiff

Kind = Literal["label images", "Cellpose", "ImageJ ROIs", "QuPath GeoJSON", "COCO", "YOLO polygons"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ENDINGS: dict[str, Kind] = {
    **dict.fromkeys(SUFFIXES, "label images"),
    ".npy": "Cellpose",
    ".zip": "ImageJ ROIs",
    ".roi": "ImageJ ROIs",
    ".geojson": "QuPath GeoJSON",
    ".json": "COCO",
}
_PIXELS = ("label images", "Cellpose")
CLASSES_FILE = "classes.csv"
"""Classes of the cells of the label images beside it: image,label,class."""
_TEXT = ".txt"
_NO_POLYGONS = ("classes.txt", "readme.txt", "license.txt")
_SAID = f"expected label images ({', '.join(SUFFIXES)}), .npy of Cellpose, .zip or .roi of ImageJ, .geojson, COCO json"


@dataclass
class LabelSource:
    """Cells of a set of images, in files of one ``kind``.

    ``path``: as passed. ``images``: those with cells, or marked as having none, by stem. ``unnamed``: other images of
    the folder. ``elsewhere``: images that the files name but the folder lacks. ``remarks``: what was left out.
    ``root``: the folder of images, absolute. ``is_alone``: without images; ``images`` are then the files themselves.
    """

    kind: Kind
    path: Path
    images: dict[str, Path]
    unnamed: tuple[str, ...] = ()
    elsewhere: int = 0
    remarks: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    is_alone: bool = False
    root: Path = Path()
    _files: dict[str, Path] = field(default_factory=dict)
    _coco: dict[str, list[tuple[CocoFile, Any]]] = field(default_factory=dict)
    _classes: dict[str, dict[int, str]] = field(default_factory=dict)

    def read(self, stem: str, image_hw: tuple[int, int] | None, foreground: MaskForeground = "auto") -> Painted:
        """Read the cells of the image ``stem``, of size ``image_hw``, and count them for ``str``. The size may be None
        if the source ``is_alone``.

        ``foreground``: of label images, as in ``read_labels``. Raises ``DataError`` for a file that cannot be read, or
        is of an image of another size.
        """
        image = self.images[stem]
        if image_hw is None or self.has_pixels:
            painted = self.read_pixels(stem, image_hw, foreground)
        else:
            painted = paint_shapes(self._shapes(stem, image_hw), image_hw, image.name)
        self.total.update(images=1, cells=len(painted.classes), overlapping=painted.overlapping)
        self.classes.update(name for name in painted.classes if name)
        self.remarks["shapes without a pixel of their own (tiny, drawn twice, or hidden), left out"] += painted.lost
        self.remarks["outlines through the centres of border pixels, read with these pixels"] += painted.traced
        return painted

    def class_names(self) -> set[str]:
        """Return the classes of all cells, "" if some have none; empty if the kind has no classes. Files that cannot be
        read are passed over: ``read`` names them."""
        if self.has_pixels:
            named = {name for names in self._classes.values() for name in names.values()}
            return {*named, ""} if named else set()  # a cell may be missing in classes.csv
        found = set[str]()
        remarks = self.remarks.copy()
        for stem in self.images:
            with contextlib.suppress(DataError):
                found |= {shape.class_name for shape in self._shapes(stem, (1, 1))}
        self.remarks = remarks  # of the reading that counts
        return found

    @property
    def has_pixels(self) -> bool:
        """Whether the files are label images, of whatever program, rather than shapes."""
        return self.kind in _PIXELS

    def file_of(self, stem: str) -> Path:
        """Return the file with the cells of the image ``stem``; not for COCO, where one file has many images."""
        return self._files[stem]

    def read_pixels(
        self, stem: str, image_hw: tuple[int, int] | None = None, foreground: MaskForeground = "auto"
    ) -> Painted:
        """Read as ``read``, without counting; only if ``has_pixels``, which know their own size."""
        file = self._files[stem]
        if self.kind == "Cellpose":
            values = cellpose.read_masks(file)
            numbers = np.unique(np.append(values, 0))
            labels = np.searchsorted(numbers, values).astype(np.int32)
        else:
            labels, numbers = read_numbered_labels(file, foreground=foreground)
        if image_hw is not None and labels.shape != image_hw:
            raise DataError(
                f"{file} is {labels.shape[1]} x {labels.shape[0]} px (width x height) but its image "
                f"{self.images[stem]} is {image_hw[1]} x {image_hw[0]}; they must be of one size"
            )
        classes = self._classes.get(stem, {})
        if unknown := classes.keys() - set(numbers.tolist()):
            raise DataError(f"{file}: no cell {min(unknown)}, to which {CLASSES_FILE} beside it gives a class")
        return Painted(labels, tuple(classes.get(number, "") for number in numbers[1:].tolist()))

    def _shapes(self, stem: str, image_hw: tuple[int, int]) -> list[Shape]:
        if self.kind == "COCO":
            return [shape for file, image_id in self._coco[stem] for shape in file.shapes(image_id)]
        file = self._files[stem]
        if self.kind == "ImageJ ROIs":
            return imagej.read_rois(file)
        if self.kind == "YOLO polygons":
            return yolo.read_polygons(file, yolo_names(file.parent), image_hw)
        shapes, n_regions = qupath.shapes_of(file, _json_of(file))
        self.remarks["QuPath's annotations around detections, left out"] += n_regions
        return shapes

    def __str__(self) -> str:
        """What was read so far: ``24 images, 1,114 cells from ImageJ ROIs, 3 overlapping by more than half``."""
        images, cells = self.total["images"], self.total["cells"]
        said = f"{images:,} image{'s' * (images != 1)}, {cells:,} cell{'s' * (cells != 1)} from {self.kind}"
        if self.classes:
            said += f" ({', '.join(f'{name} {n:,}' for name, n in self.classes.most_common())})"
        if self.total["overlapping"]:
            said += f", {self.total['overlapping']:,} overlapping by more than half"
        return said

    @property
    def said(self) -> list[str]:
        """``str`` and the remarks, each with its number, one line each."""
        remarks = [f"{what}: {number:,}" for what, number in self.remarks.items() if number]
        if self.elsewhere:
            remarks.append(f"images that the files name but are not here: {self.elsewhere:,}")
        return [f"{self.path}: {self}", *(f"{self.path}: {remark}" for remark in remarks)]


def find_labels(images: Path, given: Path) -> LabelSource:
    """Find the kind of the files in ``given``, a file or a folder, and the images of the folder ``images`` they are of.

    Raises ``DataError`` for files of several kinds or none, files of no image, and two of one image; ``UsageError`` if
    a path does not exist.
    """
    by_stem = _images_of(images)
    if not by_stem:
        raise NothingToDoError(f"{images}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    # In a folder of both, a_masks.png is no image where there is a.png.
    by_stem = {stem: image for stem, image in by_stem.items() if bare_stem(stem) not in by_stem.keys() - {stem}}
    pictures = set(by_stem.values())
    kind, files = _kind_of(given, [file for file in _files_in(given) if absolute(file) not in pictures])
    if kind == "COCO":
        return _of_coco(given, files, by_stem, images)
    root = given if given.is_dir() else given.parent
    named: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        stem = whole if (whole := name.removesuffix(file.suffix)) in by_stem else _stem_of(name)
        if stem in named:
            raise DataError(f"{named[stem]} and {file} share the stem {stem}; annotations pair by stem: rename one")
        named[stem] = file
    partners = by_partner({_without_rois(stem, by_stem): file for stem, file in named.items()}, by_stem)
    lonely = [partners[stem] for stem in sorted(partners.keys() - by_stem.keys())]
    if lonely:
        more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
        raise DataError(
            f"{lonely[0]}{more}: no image of the same name in {images}; expected {_stem_of(lonely[0].name)} with one "
            f"of {', '.join(SUFFIXES)}; add it or take the file out"
        )
    found = {stem: image for stem, image in by_stem.items() if stem in partners}
    unnamed = tuple(sorted(by_stem.keys() - found.keys()))
    source = LabelSource(kind, given, found, unnamed, root=absolute(images), _files=partners)
    if kind in _PIXELS:
        source._classes = _listed_classes(root / CLASSES_FILE, found, source.root)
    return source


def find_labels_alone(given: Path) -> LabelSource:
    """Find label images or files of Cellpose in ``given``, whose sizes need no image.

    Raises ``UsageError`` for other kinds, and as ``find_labels``.
    """
    kind, files = _kind_of(given, _files_in(given))
    if kind not in _PIXELS:
        raise UsageError(f"{given}: {kind} do not say how large the images are; give them as `images=DIR`")
    root = given if given.is_dir() else given.parent
    found: dict[str, Path] = {}
    for file in files:
        stem = bare_stem(_stem_of(file.relative_to(root).as_posix()))
        if stem in found:
            raise DataError(f"{found[stem]} and {file} share the stem {stem}; convert one of them alone")
        found[stem] = file
    source = LabelSource(kind, given, found, is_alone=True, root=absolute(root), _files=found)
    source._classes = _listed_classes(
        root / CLASSES_FILE, {stem: absolute(file) for stem, file in found.items()}, source.root
    )
    return source


@dataclass(frozen=True)
class MadeLabels:
    """``folder``: label images, by stem. ``classes``: CSV image,label,class of their cells, None if there are none.
    ``said``: what was read, one line each; empty for label images, which are used where they are."""

    folder: Path
    classes: Path | None = None
    said: tuple[str, ...] = ()


def as_label_images(
    images: Path,
    given: Path,
    into: Callable[[], Path],
    size_of: Callable[[Path], tuple[int, int]] | None = None,
) -> MadeLabels:
    """Return ``given`` if it is a folder of label images, else write label images of its cells to a folder.

    ``into``: makes the folder; called only if it is needed. ``size_of``: size (h, w) of an image; by default it is
    read. Every image of the folder ``images`` must be named. Raises as ``find_labels`` and ``LabelSource.read``.
    """
    if _is_folder_of_label_images(images, given):
        classes = given / CLASSES_FILE
        return MadeLabels(given, classes if classes.is_file() else None)
    source = find_labels(images, given)
    if source.kind == "label images":
        if given.is_file():
            raise UsageError(f"{given}: a single label image; give the folder that it is in")
        return MadeLabels(given)
    if source.unnamed:
        raise DataError(
            f"{given} does not name {len(source.unnamed)} images of {images} ({', '.join(source.unnamed[:3])}); what "
            "is in them is not known: move them to another folder, or add an empty file if they hold no cell"
        )
    place = into()
    rows = [("image", "label", "class")]
    for stem, image in source.images.items():
        painted = source.read(stem, _size_of(image) if size_of is None else size_of(image))
        labels = painted.labels.astype(np.int64)
        labels[labels >= IGNORED] += 1  # which would mean cells of unknown outline
        target = place / "labels" / f"{stem}.tif"
        make_folder(target.parent)
        write_bytes(target, label_tiff.encode(labels.astype(np.int32)))
        name = image.relative_to(source.root).as_posix()
        numbers = [number + (number >= IGNORED) for number in range(1, len(painted.classes) + 1)]
        rows += [(name, str(n), each) for n, each in zip(numbers, painted.classes, strict=True) if each]
    if len(rows) == 1:
        return MadeLabels(place / "labels", None, tuple(source.said))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(place / "classes.csv", text.getvalue().encode())
    return MadeLabels(place / "labels", place / "classes.csv", tuple(source.said))


def _images_of(folder: Path) -> dict[str, Path]:
    """Images of ``folder`` by stem; a.png and a.jpg, which share one, by their whole names. Raises ``UsageError``."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder; expected one with images")
    found = find_images([folder], follow_links=True, is_silent=True)
    stems = Counter(stem_of(image.name) for image in found)
    return {image.name if stems[stem_of(image.name)] > 1 else stem_of(image.name): image.path for image in found}


def _size_of(image: Path) -> tuple[int, int]:
    height, width = read_image(image).pixels_hwc.shape[:2]
    return height, width


def _files_in(given: Path) -> list[Path]:
    """Files at ``given``: itself, or all in the folder and its subfolders that are not hidden."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UsageError(f"{given}: no such file or folder; check the path")
    found = []
    for folder, folders, names in os.walk(given, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _kind_of(given: Path, files: Iterable[Path]) -> tuple[Kind, list[Path]]:
    """Return the kind of ``files``, and those of them that are of this kind."""
    of_kind: dict[Kind, list[Path]] = {}
    texts = []
    for file in files:
        ending = file.suffix.lower()
        if ending == _TEXT and file.name.lower() not in _NO_POLYGONS:
            texts.append(file)
        elif (kind := _ENDINGS.get(ending)) is not None:
            of_kind.setdefault(kind, []).append(file)
    if "label images" in of_kind:  # as ever, whatever lies beside them
        return "label images", of_kind["label images"]
    if not of_kind and texts:
        return "YOLO polygons", texts
    if "COCO" in of_kind and _is_geojson(_json_of(of_kind["COCO"][0])):
        of_kind.setdefault("QuPath GeoJSON", []).extend(of_kind.pop("COCO"))
    if not of_kind:
        raise DataError(f"{given}: no file with cells; {_SAID}, or .txt of YOLO")
    if len(of_kind) > 1:
        some = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in of_kind.items())
        raise DataError(f"{given} holds {some}; which are meant? Put one kind into a folder of its own")
    ((kind, paths),) = of_kind.items()
    return kind, paths


def _is_geojson(content: Any) -> bool:
    if isinstance(content, list):
        return True
    return isinstance(content, dict) and content.get("type") in ("FeatureCollection", "Feature")


def _json_of(file: Path) -> Any:
    text = read_text(file, "json")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged json: {error}") from error


def _stem_of(name: str) -> str:
    """Strip the annotation's ending from ``name``, then those of images: ``a.png.zip`` has the stem ``a``."""
    ending = Path(name).suffix
    return stem_of(name.removesuffix(ending)) if ending.lower() not in SUFFIXES else stem_of(name)


def _without_rois(stem: str, images: Mapping[str, Path]) -> str:
    for ending in ("_rois", "_roiset", "-rois", "-roiset"):
        if stem not in images and stem.lower().endswith(ending):
            return stem[: -len(ending)]
    return stem


def _is_folder_of_label_images(images: Path, given: Path) -> bool:
    """Whether the label images of ``given`` are used as they are: ``find.pair_by_stem`` reads such a folder."""
    if not given.is_dir():
        return False
    endings = {file.suffix.lower() for file in _files_in(given)}
    if images.is_dir() and images.samefile(given):
        return not endings & _ENDINGS.keys() - set(SUFFIXES)
    return bool(endings & set(SUFFIXES)) or not endings & {*_ENDINGS, _TEXT}


def _listed_classes(file: Path, images: Mapping[str, Path], root: Path) -> dict[str, dict[int, str]]:
    """Class by label of each image, by stem, from ``file``, a ``CLASSES_FILE``; empty if there is none."""
    if not file.is_file():
        return {}
    reader = csv.DictReader(read_text(file, "CSV image,label,class").splitlines())
    if not {"image", "label", "class"} <= set(reader.fieldnames or ()):
        raise DataError(f"{file}, line 1: the columns are {reader.fieldnames}; expected image,label,class")
    names = {image.relative_to(root).as_posix(): stem for stem, image in images.items()}
    known = ImageNames(names)
    found: dict[str, dict[int, str]] = {}
    for row in reader:
        place = f"{file}, line {reader.line_num}"
        if not (row["image"] and row["label"] and row["label"].strip().isdecimal()):
            raise DataError(f"{place}: {row}; expected image,label,class with a whole number as label")
        image = known.find(row["image"].strip(), place)
        if image is not None and (name := (row["class"] or "").strip()):
            found.setdefault(names[image], {})[int(row["label"])] = name
    return found


def _of_coco(given: Path, files: Iterable[Path], by_stem: Mapping[str, Path], images: Path) -> LabelSource:
    names = {image.relative_to(absolute(images)).as_posix(): stem for stem, image in by_stem.items()}
    known = ImageNames(names)
    found: dict[str, list[tuple[CocoFile, Any]]] = {}
    elsewhere, crowds = 0, 0
    for file in files:
        coco = CocoFile.of(file, _json_of(file))
        crowds += coco.crowds
        for image_id, name in coco.images.items():
            image = known.find(name, str(file))
            if image is None:
                elsewhere += 1
            else:
                found.setdefault(names[image], []).append((coco, image_id))
    if not found:
        raise DataError(f"{given} names none of the {len(by_stem)} images of {images}; are they the right images?")
    source = LabelSource(
        "COCO",
        given,
        {stem: image for stem, image in by_stem.items() if stem in found},
        tuple(sorted(by_stem.keys() - found.keys())),
        elsewhere,
        root=absolute(images),
        _coco=found,
    )
    source.remarks["crowds, which are no single cells, left out"] += crowds
    return source
