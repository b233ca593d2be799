"""Label images from boxes or points: a teacher model finds the foreground, the marks assign its pixels to cells.

    RUN/truth/            further folders: labels-2, ...; those of validation images: val-labels, val-labels-2, ...
      labels/STEM.png     16-bit label images: label i is the i-th mark of its image, 65535 foreground of no mark
      classes.csv         image,label,class of each mark with a class, as --classes takes it
      pictures/STEM.jpg   photographs with outlines, for inspection: cells yellow, unknown foreground magenta

Boxes: each foreground pixel goes to the box around it with the smallest elliptic distance (the ellipse inscribed in
the box is 1), so overlapping cells are cut along the line through the crossings of their outlines. Most of that ellipse
is assigned even where the teacher finds no cell. White cells, whose pale cytoplasm teachers miss, get all of it.

Points: each foreground pixel goes to the nearest point in its component, as far as a cell reaches.

Without a teacher (``NO_TEACHER``) each box is its ellipse, and everything else is background.

Foreground that no mark claims is not background: the annotator may have missed a cell.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.annotations.objects import Boxes, Points
from cellseg_deploy.annotations.read import read_annotations
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cells.label_runs import largest_pieces, paint, row_runs
from cellseg_deploy.errors import DataError, UsageError, plural
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.images.find import absolute, images_by_stem
from cellseg_deploy.images.read import read_image
from cellseg_deploy.segmenter import Segmenter

WHOLE_CLASSES = ("white", "wbc", "leuko", "lympho", "neutro", "mono", "eosino", "baso", "granulo")
"""A class whose name contains one of these, in any case, is a class of white cells."""
NO_TEACHER = "none"
FOREGROUND = 0.5
SURE_PART = 0.92
"""Square of the elliptic radius within which a pixel belongs to the cell, whatever the teacher finds."""
REACH = 1.5
"""Square elliptic distance up to which foreground can belong to a box; the corners of the box are at 2."""
POINT_REACH = 0.75
"""Distance from a point, in cell diameters, up to which foreground can belong to it."""

Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TruthSettings:
    """``teacher``: model file, ``NO_TEACHER``, or None for the shipped model. ``whole_classes``: name parts of classes
    whose cells get their whole ellipse. ``left_out_classes``: names of classes whose marks are skipped.
    ``cell_diameter_px``: of the cells in the images, None to use the boxes, or the teacher's own. ``threads``: 0 for
    its default."""

    teacher: Path | str | None = None
    whole_classes: tuple[str, ...] = WHOLE_CLASSES
    left_out_classes: tuple[str, ...] = ()
    cell_diameter_px: float | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if self.cell_diameter_px is not None and not 0 < self.cell_diameter_px < 10_000:
            raise UsageError(f"the marked cells' diameter must be positive, in px, got {self.cell_diameter_px}")


def labels_from_boxes(foreground: Mask, boxes: Boxes, whole_classes: Sequence[str] = WHOLE_CLASSES) -> Labels:
    """Labels int32 (h, w) of ``foreground`` (h, w): i for the i-th box from 1, ``IGNORED`` where no box claims it.

    ``whole_classes``: see ``TruthSettings``; ``("",)`` for all classes.
    """
    height, width = foreground.shape
    nearest = np.full((height, width), np.inf, np.float32)
    owner = np.zeros((height, width), np.int32)
    for number, (box, name) in enumerate(zip(boxes.boxes_xyxy, boxes.classes, strict=True), start=1):
        left, top, right, bottom = _completed([float(value) for value in box], height, width)
        radius_x, radius_y = (right - left) / 2, (bottom - top) / 2
        x0, x1 = max(int(left - 0.1 * radius_x), 0), min(int(np.ceil(right + 0.1 * radius_x)), width)
        y0, y1 = max(int(top - 0.1 * radius_y), 0), min(int(np.ceil(bottom + 0.1 * radius_y)), height)
        x = (np.arange(x0, x1) + 0.5 - (left + right) / 2) / radius_x
        y = (np.arange(y0, y1) + 0.5 - (top + bottom) / 2) / radius_y
        distance = (y[:, None] ** 2 + x[None, :] ** 2).astype(np.float32)
        place = np.s_[y0:y1, x0:x1]
        if _is_whole(name, whole_classes):
            inside = (np.abs(y)[:, None] <= 1) & (np.abs(x)[None, :] <= 1)
            claimed = (distance <= 1) | (foreground[place] & inside)
        else:
            claimed = (distance <= SURE_PART) | (foreground[place] & (distance <= REACH))
        claimed &= distance < nearest[place]
        nearest[place][claimed] = distance[claimed]
        owner[place][claimed] = number
    return _finish(owner, foreground)


def _completed(box: list[float], height: int, width: int) -> list[float]:
    """Extend a box cut by the image border to the square box of the whole round cell."""
    left, top, right, bottom = box
    across, along = right - left, bottom - top
    if across < along and left <= 1:
        left = right - along
    elif across < along and right >= width - 1:
        right = left + along
    elif along < across and top <= 1:
        top = bottom - across
    elif along < across and bottom >= height - 1:
        bottom = top + across
    return [left, top, right, bottom]


def labels_from_points(foreground: Mask, points: Points, cell_diameter_px: float) -> Labels:
    """Labels int32 (h, w) like those of ``labels_from_boxes``; a point outside the foreground gets no pixel."""
    from scipy.spatial import cKDTree

    height, width = foreground.shape
    _, component = cv2.connectedComponents(foreground.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    x, y = np.clip(np.floor(points.points_xy), 0, [width - 1, height - 1]).astype(np.int64).T
    of_point = component[y, x]
    owner = np.zeros((height, width), np.int32)
    for number in np.unique(of_point[of_point > 0]).tolist():
        here = np.flatnonzero(of_point == number)
        pixels = np.argwhere(component == number)
        away, which = cKDTree(points.points_xy[here]).query(pixels[:, ::-1] + 0.5)
        near = away <= POINT_REACH * cell_diameter_px
        owner[tuple(pixels[near].T)] = here[which[near]] + 1
    return _finish(owner, foreground)


def _finish(owner: Labels, foreground: Mask) -> Labels:
    """Keep the largest piece of each cell; other foreground is unknown, or background in an image marked as empty."""
    runs = largest_pieces(row_runs(owner))
    labels = paint(runs, runs.label)
    if labels.any():
        labels[foreground & (labels == 0)] = IGNORED
    return labels


def _is_whole(name: str, whole_classes: Sequence[str]) -> bool:
    return any(part.lower() in name.lower() for part in whole_classes)


@dataclass(frozen=True)
class MadeTruth:
    """Output of ``make_truth``: the folder of the label images, and the file of their classes."""

    labels: Path
    classes: Path


def make_truth(
    images: Path,
    marks: Path,
    kind: str,
    out: Path,
    number: int,
    settings: TruthSettings,
    say: Callable[[str], None],
    *,
    side: str = "",
) -> MadeTruth:
    """Write label images, their classes and pictures of all images of the folder ``images``.

    ``marks``: a file (or YOLO folder) of ``kind`` boxes or points. ``number``: of this folder, from 1. ``side``: start
    of the names of what is written in ``out``. ``say`` is called with what was found and where it is stored.

    Raises ``DataError`` for an image that ``marks`` does not name or in which no mark meets a cell, ``UsageError`` for
    points without a teacher, and what reading and the teacher raise.
    """
    assert kind in ("boxes", "points")
    if kind == "points" and settings.teacher == NO_TEACHER:
        raise UsageError(f"points need a teacher, which finds the cells around them; got --teacher {NO_TEACHER}")
    images = absolute(images)
    files = images_by_stem(images)
    shapes = {stem: read_image(file).pixels_hwc.shape for stem, file in files.items()}
    found = read_annotations(
        marks,
        "boxes" if kind == "boxes" else "points",
        {file.relative_to(images).as_posix(): (shapes[stem][0], shapes[stem][1]) for stem, file in files.items()},
    )
    say(f"{marks}: {found}")
    for remark in found.remarks:
        say(f"{marks}: {remark}")
    by_stem = {stem: found.by_image.get(file.relative_to(images).as_posix()) for stem, file in files.items()}
    unknown = [stem for stem, marked in by_stem.items() if marked is None]
    if unknown:
        raise DataError(
            f"{marks} does not name {plural(len(unknown), 'image')} of {images} ({', '.join(unknown[:3])}); "
            "their cells are unknown: move them to another folder"
        )
    kept = {stem: _without(marked, settings.left_out_classes) for stem, marked in by_stem.items() if marked is not None}
    ending = "" if number == 1 else f"-{number}"
    labels_folder, pictures = out / f"{side}labels{ending}", out / f"{side}pictures{ending}"
    with _Labeller.opened(settings, _median_side(list(kept.values()))) as labeller:
        say(labeller.words)
        missed = 0
        classes = ["image,label,class"]
        for stem, file in files.items():
            image, marked = read_image(file).pixels_hwc, kept[stem]
            labels = labeller(image, marked)
            cells = len(set(np.unique(labels).tolist()) - {0, IGNORED})
            if len(marked) and not cells:
                raise DataError(
                    f"{file}: the teacher finds no cell at any of {len(marked)} marks; give --marked-cell-diameter PX, "
                    "or another --teacher"
                )
            missed += len(marked) - cells
            there = set(np.unique(labels).tolist())
            classes += [
                _csv_line(file.relative_to(images).as_posix(), label, name)
                for label, name in enumerate(marked.classes, start=1)
                if name and label in there
            ]
            _write(labels_folder / f"{stem}.png", ".png", labels.astype(np.uint16))
            _write(pictures / f"{stem}.jpg", ".jpg", picture(image, labels))
    if missed:
        say(f"marks without a cell of their own: {missed}")
    classes_file = out / f"{side}classes{ending}.csv"
    write_bytes(classes_file, ("\n".join(classes) + "\n").encode())
    say(f"labels made from {marks}: {labels_folder}; look at {pictures}")
    return MadeTruth(labels_folder, classes_file)


@dataclass(frozen=True)
class _Labeller:
    """Labels one image after another. ``teacher``: None for no teacher. ``cell_diameter_px``: of the marked cells."""

    settings: TruthSettings
    teacher: Segmenter | None
    cell_diameter_px: float

    @classmethod
    @contextmanager
    def opened(cls, settings: TruthSettings, median_box_px: float | None) -> Iterator[_Labeller]:
        """Load the teacher of ``settings``. ``median_box_px``: side of the median box, None for points."""
        diameter = settings.cell_diameter_px or median_box_px
        if settings.teacher == NO_TEACHER:
            yield cls(settings, None, diameter or 0.0)
            return
        engine, model = EngineOptions(threads=settings.threads or None), settings.teacher
        with Segmenter.load(model, engine=engine, scale=None, cell_diameter_px=diameter) as teacher:
            yield cls(settings, teacher, diameter or teacher.backend.spec.cell_diameter_px / teacher.scale)

    @property
    def words(self) -> str:
        """The teacher and its scale, in a line."""
        if self.teacher is None:
            return "no teacher: each box is its ellipse, everything else is background"
        name, scale = self.teacher.backend.spec.name, self.teacher.scale
        return f"teacher {name}: cells of {self.cell_diameter_px:.0f} px, scale {scale:.3g}"

    def __call__(self, image_hwc: npt.NDArray[np.uint8], marked: Boxes | Points) -> Labels:
        """Labels (h, w) of the cells ``marked`` in ``image_hwc``."""
        if self.teacher is None:
            assert isinstance(marked, Boxes)
            return labels_from_boxes(np.zeros(image_hwc.shape[:2], np.bool_), marked, whole_classes=("",))
        channel = list(self.teacher.backend.spec.channels).index("foreground")
        size_wh = (image_hwc.shape[1], image_hwc.shape[0])
        foreground = cv2.resize(self.teacher.probabilities(image_hwc)[channel], size_wh) >= FOREGROUND
        if isinstance(marked, Boxes):
            return labels_from_boxes(foreground, marked, self.settings.whole_classes)
        return labels_from_points(foreground, marked, self.cell_diameter_px)


def _csv_line(image: str, label: int, class_name: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow((image, label, class_name))
    return line.getvalue()


def picture(image_hwc: npt.NDArray[np.uint8], labels: Labels) -> npt.NDArray[np.uint8]:
    """``image_hwc`` as BGR with the outlines of ``labels`` (h, w): cells yellow, unknown foreground magenta."""
    shown = image_hwc[..., ::-1].copy()
    unknown = labels == IGNORED
    values = labels.astype(np.float32)
    edge = (cv2.erode(values, np.ones((3, 3))) != values) & (labels > 0)
    shown[edge] = (0, 255, 255)
    shown[unknown] = (shown[unknown] * 0.6 + np.array([255, 0, 255]) * 0.4).astype(np.uint8)
    return shown


def _without(marked: Boxes | Points, left_out: Sequence[str]) -> Boxes | Points:
    keep = np.array([name not in left_out for name in marked.classes], np.bool_)
    classes = tuple(name for name in marked.classes if name not in left_out)
    if isinstance(marked, Boxes):
        return Boxes(marked.boxes_xyxy[keep], classes)
    return Points(marked.points_xy[keep], classes)


def _median_side(marked: Sequence[Boxes | Points]) -> float | None:
    """Median over all boxes of the geometric mean of their sides in px; None for points."""
    boxes = [each.boxes_xyxy for each in marked if isinstance(each, Boxes) and len(each)]
    if not boxes:
        return None
    corners = np.concatenate(boxes)
    return float(np.median(np.sqrt((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]))))


def _write(path: Path, ending: str, pixels: npt.NDArray[Any]) -> None:
    make_folder(path.parent)
    _, code = cv2.imencode(ending, pixels)
    write_bytes(path, code.tobytes())
