"""Contact sheets of errors: pages of crops, truth on the left and prediction on the right, one kind per page.

OUT/anatomy/merge-01.jpg, merge-02.jpg, ...: 24 crops per page. Pages are written as they fill, so that any number of
images needs the memory of one page per kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.evaluate.anatomy import Finding
from cellseg_deploy.files import atomic
from cellseg_deploy.outputs import picture_file
from cellseg_deploy.outputs.overlay import OUTLINE_RGB, outlines

FOLDER, SUFFIX = "anatomy", ".jpg"
COLUMNS, ROWS = 4, 6
SIDE_PX = 168
_MARGIN = 0.35  # of the cells' own extent, to show their neighbours
_SMALLEST_PX = 64
_HEADER_PX, _CAPTION_PX, _GAP_PX = 34, 20, 10
_PAPER_RGB, _INK_RGB = (250, 250, 250), (30, 30, 30)
TRUE_RGB, FOUND_RGB = (255, 150, 0), OUTLINE_RGB
TITLES = {
    "merge": "merge: one cell found where the truth has several",
    "split": "split: several cells found where the truth has one",
    "miss": "miss: a true cell that was not found",
    "invention": "invention: a cell found where the truth has none",
    "outline": "outline: found, but too different in outline (IoU below 0.5)",
    "border": "border: an error of any kind at a cell cut by the image border",
    "parted": "parted: a true component that looks like several cells, found as several (no error)",
}

Picture = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer]


class ContactSheets:
    """Collects findings and writes pages into ``out``/anatomy; call ``close`` at the end."""

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER
        self._crops: dict[str, list[Picture]] = {group: [] for group in TITLES}
        self._pages = dict.fromkeys(TITLES, 0)

    def add(self, name: str, image_hwc: Picture, true: Labels, predicted: Labels, finding: Finding) -> str:
        """Put ``finding`` of the image ``name`` on its page; return page and position: ``merge-01.jpg, 5``.

        Raises ``OutputError`` if a page cannot be written.
        """
        group = finding.group
        crops = self._crops[group]
        crops.append(_item(name, image_hwc, true, predicted, finding))
        place = f"{_page_name(group, self._pages[group] + 1)}, {len(crops)}"
        if len(crops) == COLUMNS * ROWS:
            self._flush(group)
        return place

    def close(self) -> None:
        """Write the pages that are not full. Raises ``OutputError``."""
        for group, crops in self._crops.items():
            if crops:
                self._flush(group)

    def _flush(self, group: str) -> None:
        self._pages[group] += 1
        atomic.make_folder(self._folder)
        picture = page(f"{TITLES[group]}   (page {self._pages[group]})", self._crops[group])
        atomic.write_bytes(self._folder / _page_name(group, self._pages[group]), picture_file.encode(picture))
        self._crops[group] = []


def remove_earlier(out: Path) -> None:
    """Remove pages of an earlier evaluation: only files in ``out``/anatomy that match the naming scheme of pages."""
    for group in TITLES:
        for digits in ("[0-9][0-9]", "[0-9][0-9][0-9]"):
            for path in (out / FOLDER).glob(f"{group}-{digits}{SUFFIX}"):
                with atomic.writing(path):
                    path.unlink()


def crop_box(box: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Return left, top and side of a square around ``box`` with a margin; it may extend beyond the image."""
    left, top, width, height = box
    side = max(round(max(width, height) * (1 + 2 * _MARGIN)), _SMALLEST_PX)
    return left + (width - side) // 2, top + (height - side) // 2, side


def page(title: str, items: list[Picture]) -> Picture:
    """Draw up to ``COLUMNS * ROWS`` items under a title and a legend of the colours."""
    item_h, item_w = SIDE_PX + _CAPTION_PX, 2 * SIDE_PX
    n_rows = -(-len(items) // COLUMNS)
    height = _HEADER_PX + n_rows * (item_h + _GAP_PX) + _GAP_PX
    width = COLUMNS * (item_w + _GAP_PX) + _GAP_PX
    sheet = np.full((height, width, 3), _PAPER_RGB, np.uint8)
    _write(sheet, title, (_GAP_PX, 23), 0.6)
    x = width - 330
    for text, colour in (("left: truth", TRUE_RGB), ("right: found", FOUND_RGB)):
        sheet[10:26, x : x + 16] = colour
        _write(sheet, text, (x + 24, 23), 0.5)
        x += 160
    for number, item in enumerate(items):
        row, column = divmod(number, COLUMNS)
        top, left = _HEADER_PX + row * (item_h + _GAP_PX), _GAP_PX + column * (item_w + _GAP_PX)
        sheet[top : top + item_h, left : left + item_w] = item
    return sheet


def _item(name: str, image_hwc: Picture, true: Labels, predicted: Labels, finding: Finding) -> Picture:
    """Draw both crops side by side, the finding's cells with thick lines, above a caption."""
    left, top, side = crop_box(finding.box)
    photo = _enlarged(_window(image_hwc, left, top, side, fill=128), smooth=True)
    item = np.full((SIDE_PX + _CAPTION_PX, 2 * SIDE_PX, 3), _PAPER_RGB, np.uint8)
    for column, labels, numbers, colour in (
        (0, true, finding.true, TRUE_RGB),
        (1, predicted, finding.predicted, FOUND_RGB),
    ):
        window = _window(labels, left, top, side, fill=0).astype(np.int32)
        seen: npt.NDArray[np.int32] = _enlarged(window, smooth=False).astype(np.int32, copy=False)
        picture = photo.copy()
        picture[outlines(seen, thickness=1)] = colour
        picture[outlines(np.where(np.isin(seen, numbers), seen, 0), thickness=3)] = colour
        item[:SIDE_PX, column * SIDE_PX : (column + 1) * SIDE_PX] = picture
    item[:SIDE_PX, SIDE_PX - 1 : SIDE_PX + 1] = _PAPER_RGB
    where = f"x {finding.box[0]} y {finding.box[1]}"
    short = name if len(name) <= 30 else f"{name[:14]}...{name[-13:]}"
    _write(item, f"{short.encode('ascii', 'replace').decode()}  {where}", (2, SIDE_PX + 14), 0.38)
    return item


def _window(array: npt.NDArray[np.generic], left: int, top: int, side: int, *, fill: int) -> npt.NDArray[np.generic]:
    """Return the square of ``side`` px of ``array`` from (``left``, ``top``), with ``fill`` beyond its edges."""
    out = np.full((side, side, *array.shape[2:]), fill, array.dtype)
    y0, x0 = max(top, 0), max(left, 0)
    part = array[y0 : max(top + side, 0), x0 : max(left + side, 0)]
    out[y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]] = part
    return out


def _enlarged(window: npt.NDArray[np.generic], *, smooth: bool) -> npt.NDArray[np.generic]:
    import cv2

    method = cv2.INTER_NEAREST_EXACT
    if smooth:
        method = cv2.INTER_AREA if len(window) > SIDE_PX else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(window, (SIDE_PX, SIDE_PX), interpolation=method))


def _write(picture: Picture, text: str, origin_xy: tuple[int, int], scale: float) -> None:
    import cv2

    cv2.putText(picture, text, origin_xy, cv2.FONT_HERSHEY_SIMPLEX, scale, _INK_RGB, 1, cv2.LINE_AA)


def _page_name(group: str, number: int) -> str:
    return f"{group}-{number:02d}{SUFFIX}"
