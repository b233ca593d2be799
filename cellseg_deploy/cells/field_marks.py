"""Marks over the field of view that are not specimen: an eyepiece's pointer, a drawn scale bar, letters.

A pointer is opaque, thin, straight and comes from the edge of the field. It is painted over before segmentation, so
that a cell it crosses stays one. Drawn marks are black or of a pure colour: an object made of such pixels is not a
cell. Stain lets more light through: of 7,648 cells of five laboratories the blackest has 21 % of such black pixels and
the most colourful 7 % of such colours; bars and letters that a network labelled as cells have 37 % and more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.field_of_view import small_picture
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import plural

Mask = npt.NDArray[np.bool_]
Image = npt.NDArray[np.uint8]

_BRIGHT = 80  # least median brightness of a field in bright field
_DARK, _OPAQUE = 0.3, 0.15  # of the field's brightness: pixels of a pointer, and their median
_LENGTH, _ASPECT, _FILL = 0.1, 5.0, 0.4  # of the longest side; length to width; of the box: a needle tapers
_REACH_PX, _DEPTH = 2, 0.5  # from the edge; of the length, how far it reaches in: a dark rim does not
_BLACK, _MOST_BLACK = 0.06, 12  # of the background's brightness, and in grey levels
_PURE, _GREYISH = 200, 80  # between the largest and the smallest channel; the same of a background without a cast
_DRAWN_SHARE = 0.35
_STEP = 3  # drawn marks are searched for in every third row and column


def find_pointer(image_hwc: Image, field: Mask | None = None) -> Mask | None:
    """Find pointers, hairs and the like in ``image_hwc``, uint8 RGB (h, w, 3): bool (h, w), or None.

    ``field``: the field of view, bool (h, w), None for all; a pointer reaches in from its edge or the picture's.
    """
    import cv2

    height, width = image_hwc.shape[:2]
    small = small_picture(image_hwc)
    if small is None:
        return None
    size = small.shape[1], small.shape[0]
    brightness = np.asarray(cv2.max(cv2.max(small[..., 0], small[..., 1]), small[..., 2]))
    inside = np.ones(small.shape[:2], np.bool_)
    if field is not None:
        inside = np.asarray(cv2.resize(field.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0
    if not inside.any() or float(np.median(brightness[inside])) < _BRIGHT:
        return None
    bright = float(np.quantile(brightness[inside], 0.85))
    dark = (inside & (brightness < _DARK * bright)).astype(np.uint8)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(dark, connectivity=8)
    found = np.zeros(small.shape[:2], np.uint8)
    for number in range(1, count):
        w, h, area = (int(value) for value in stats[number][2:])
        if max(w, h) < _LENGTH * max(size) / np.sqrt(2):
            continue
        part = parts == number
        points = np.argwhere(part)[:, ::-1].astype(np.int32)
        short, long = sorted(side + 1 for side in cv2.minAreaRect(points)[1])
        is_needle = long >= max(_LENGTH * max(size), _ASPECT * short) and area >= _FILL * long * short
        if not is_needle:
            continue
        depth = np.asarray(cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 5))[1:-1, 1:-1]
        reaches_in = depth[part].min() <= _REACH_PX and depth[part].max() >= _DEPTH * long
        if reaches_in and float(np.median(brightness[part])) < _OPAQUE * bright:
            found[part] = 1
    if not found.any():
        return None
    found = np.asarray(cv2.dilate(found, np.ones((2 * _REACH_PX + 1,) * 2, np.uint8)))
    return np.asarray(cv2.resize(found, (width, height), interpolation=cv2.INTER_NEAREST)) > 0


def without_pointer(image_hwc: Image, pointer: Mask) -> Image:
    """``image_hwc`` (h, w, 3) with ``pointer`` (h, w) painted over in the colours next to it (Telea, J. Graph. Tools 9
    (2004) 23-34)."""
    import cv2

    return np.asarray(cv2.inpaint(image_hwc, pointer.astype(np.uint8), 3, cv2.INPAINT_TELEA), np.uint8)


def without_drawn(image_hwc: Image, labels: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], int]:
    """Remove drawn objects from ``labels`` (h, w), int32, of ``image_hwc`` (h, w, 3). Returns the labels, renumbered
    1..n in the same order, and the number removed: none on a dark background, no pure colours on a strong cast."""
    red, green, blue = (image_hwc[::_STEP, ::_STEP, channel] for channel in range(3))
    largest, smallest = (both(both(red, green), blue) for both in (np.maximum, np.minimum))
    coarse = largest[::_STEP, ::_STEP]
    if float(np.median(coarse)) < _BRIGHT:
        return labels, 0
    drawn: Mask = largest <= min(_MOST_BLACK, _BLACK * float(np.quantile(coarse, 0.85)))
    spread = largest - smallest
    if float(np.median(spread[::_STEP, ::_STEP])) <= _GREYISH:
        drawn |= spread >= _PURE
    looked_at = labels[::_STEP, ::_STEP]
    some = np.unique(looked_at[drawn])
    some = some[some > 0]
    if not len(some):
        return labels, 0
    count = int(labels.max())
    drawn_px, all_px = (
        np.bincount(values.reshape(-1), minlength=count + 1) for values in (looked_at[drawn], looked_at)
    )
    gone = drawn_px > _DRAWN_SHARE * all_px
    gone[0] = False
    if not gone.any():
        return labels, 0
    kept = ~gone
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(numbers[labels], np.int32), int(gone.sum())


def pointer_note() -> Note:
    """Note for the user on a picture with a pointer."""
    return Note(
        "a dark, thin, straight mark, such as an eyepiece pointer, reaches into the field and was painted over "
        "before the cells were segmented: check the cells next to it; `field='full'` uses the picture as it is",
        "field of view",
    )


def drawn_note(n: int) -> Note:
    """Note for the user on a picture with ``n`` drawn objects."""
    what = plural(n, "object is", "objects are")
    return Note(
        f"{what} black or of a pure colour, like scale bars and letters, and left out; cells under such marks may be "
        "lost or cut: check the overlay; `field='full'` keeps them",
        "field of view",
    )
