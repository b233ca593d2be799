"""The only place that reads images: PNG, JPEG and TIFF, distinguished by content and never by name.

Every image returned is complete. A file that is truncated, damaged or ambiguous raises ``DataError``; nothing is filled
in, because a black corner looks exactly like "no cells". Conversions are reported in ``LoadedImage.notes``.

Not detectable: many flipped bits inside a JPEG, and any inside an uncompressed TIFF, because neither format has a
checksum. A JPEG that was cut and then got a new end marker is detected.

The conversions (based on the file format, the file's metadata and the user's settings; never on the brightness of the
pixels, so two photographs of one slide are treated alike):

=====================  =========================================================================================
in the file            becomes
=====================  =========================================================================================
grey, 1-bit, palette   RGB
9 to 16 bit            8 bit by ``value * 255 // (2 ** bits - 1)``, larger values clipped; ``bits`` is ``bit_depth``
                       if set, else the bits used according to the file (OME SignificantBits, TIFF MaxSampleValue of
                       2 ** n - 1, PNG sBIT unless its samples are scaled already), else the samples' size
alpha, transparency    composited on white, the colour of an empty field; dropped if opaque everywhere
TIFF of several pages  the picture at full resolution, wherever it lies; its transparency mask as alpha
CMYK                   RGB, without colour profile
EXIF / TIFF rotation   the upright image; every output has the upright image's size and coordinates
=====================  =========================================================================================
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cells.label_runs import pieces, renumber, row_runs
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.files.fingerprint import Fingerprint
from cellseg_deploy.images.bit_depth import bits_to_scale, scale_to_8
from cellseg_deploy.images.decode import Decoded, declared_pixels, declared_size, decode
from cellseg_deploy.images.find import SUFFIXES, FoundImage, Pair, check_same_size, find_images, pair_by_stem
from cellseg_deploy.images.mask_foreground import MASK_FOREGROUNDS, MaskForeground
from cellseg_deploy.images.mask_polarity import frame_of, within_margin
from cellseg_deploy.images.options import MAX_PIXELS, ReadOptions
from cellseg_deploy.images.resolution import (
    GIVEN,
    UNKNOWN,
    PixelSize,
    Resolution,
    believed_pixel_size,
)

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "FoundImage",
    "LoadedImage",
    "Pair",
    "ReadOptions",
    "check_same_size",
    "declared_pixels",
    "declared_size",
    "find_images",
    "pair_by_stem",
    "read_image",
    "read_labels",
]

_DEFAULTS = ReadOptions()
_log = logging.getLogger(__name__)

_MOST_COLOURS = 20_000  # so that no number is ``IGNORED``
_OBJECT_PX = 20
"""Smaller pieces do not help to decide whether a file is a label image: annotation tools leave crumbs."""


@dataclass(frozen=True)
class LoadedImage:
    """``pixels_hwc``: uint8 RGB (h, w, 3), upright. ``notes``: what was converted or looks odd, one sentence each.

    ``resolution``: pixel sizes stated by the file, in the file's orientation. ``pixel_size``: pixel size in the
    specimen, from the user or else the file. ``source``: fingerprint of exactly the bytes decoded, if requested.
    """

    pixels_hwc: npt.NDArray[np.uint8]
    notes: tuple[str, ...]
    resolution: tuple[Resolution, ...] = ()
    pixel_size: PixelSize = UNKNOWN
    source: Fingerprint | None = None


def read_image(path: Path, options: ReadOptions = _DEFAULTS, *, with_fingerprint: bool = False) -> LoadedImage:
    """Read the image in ``path`` as uint8 RGB, upright.

    ``with_fingerprint``: also return a fingerprint of the bytes read (``source``).

    Raises ``DataError`` for anything but a complete PNG, JPEG or TIFF with one plane of 1 to 16 bit samples.
    """
    return as_rgb(path, decode(path, options.max_pixels, with_fingerprint=with_fingerprint), options)


def as_rgb(path: Path, decoded: Decoded, options: ReadOptions = _DEFAULTS) -> LoadedImage:
    """Convert ``decoded`` to uint8 RGB, upright; ``path``: for messages. Raises ``DataError`` for other samples."""
    if decoded.samples.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{path}: samples of type {decoded.samples.dtype}, whose range is not defined; expected 8 or 16 bit; "
            "scale it yourself (in Fiji: Image > Type > 8-bit) and save it again"
        )
    notes = list(decoded.notes)
    rgb, alpha = _to_rgb8(path, decoded, options.bit_depth, notes)
    if decoded.white_is_zero:
        rgb = 255 - rgb  # after scaling: before it, the unused bits would become ones
        notes.append("white is zero in this TIFF; inverted")
    if alpha is not None:
        rgb = _on_white(rgb, alpha, notes)
    if decoded.orientation != 1:
        rgb = _upright(rgb, decoded.orientation)
        notes.append(f"turned upright as the file's orientation tag {decoded.orientation} says; outputs match that")
    given_um = options.pixel_size_um
    size = believed_pixel_size(decoded.resolution) if given_um is None else PixelSize(given_um, GIVEN)
    notes += [Note(size.note, "pixel size")] if size.note else []
    return LoadedImage(np.ascontiguousarray(rgb), tuple(notes), decoded.resolution, size, decoded.source)


def read_labels(
    path: Path, *, max_pixels: int = MAX_PIXELS, foreground: MaskForeground = "auto", keep_ignored: bool = False
) -> npt.NDArray[np.int32]:
    """Read the mask or label image ``path`` as int32 labels (h, w): 0 background, 1..n in raster order of first pixel.

    The stored numbers count, not how they are displayed: neither a palette nor an inverting TIFF changes them.
    At most two values (0 and one other) make a binary mask, whose 4-connected components become the labels. More
    values make a label image, whose regions are kept; a label may be in several pieces, but if most labels are, the
    values are not labels. A lossy JPEG is read as a binary mask thresholded at 128, if nearly all of its pixels are
    nearly black or white. ``foreground``: which numbers are cells (``mask_foreground``). In an RGB image on black each
    colour is a cell, see ``_colour_numbers``. A label image that this package wrote is taken as it is: its numbers are
    cells, even where there is only one, in several pieces.

    In a label image of 16 bit or more, 65535 next to other numbers, none of them larger, marks foreground of unknown
    instance: background here, or with ``keep_ignored`` the value ``IGNORED``, which no cell then has.

    Raises ``DataError`` if it is unclear whether the file is a mask or a label image, if it looks like a negative, or
    if it is damaged.
    """
    return read_numbered_labels(path, max_pixels=max_pixels, foreground=foreground, keep_ignored=keep_ignored)[0]


def read_numbered_labels(
    path: Path, *, max_pixels: int = MAX_PIXELS, foreground: MaskForeground = "auto", keep_ignored: bool = False
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return labels as ``read_labels`` does, and the number (n + 1,) of each label 0..n in the file, -1 for labels that
    are not a cell (``IGNORED``).

    For a binary mask, the numbers are those of its labels.
    """
    ReadOptions(max_pixels)  # raises if out of range
    if foreground not in MASK_FOREGROUNDS:
        raise UsageError(f"mask foreground must be one of {', '.join(MASK_FOREGROUNDS)}, got {foreground!r}")
    decoded = decode(path, max_pixels)
    values = _label_values(path, decoded)
    if decoded.orientation != 1:
        values = _upright(values, decoded.orientation)
    if decoded.container == "JPEG":
        values = _cut_jpeg_mask(path, values)
    if foreground == "dark":
        values = _negative(values)
    ignored = None if foreground == "dark" else _ignored(values)
    known = values if ignored is None else np.where(ignored, 0, values).astype(values.dtype)
    is_sure = decoded.is_ours and foreground != "dark"
    labels = renumber(known) if is_sure else _labels_of(path, known)
    if foreground != "light" and not is_sure:
        # A negative label image of 16 bit has 65535 around its cells.
        seen = labels if ignored is None else np.where(ignored, labels.max() + 1, labels).astype(np.int32)
        _check_polarity(path, seen, foreground)
    if keep_ignored:
        labels[labels >= IGNORED] += 1  # more cells than numbers below it
        if ignored is not None:
            labels[ignored] = IGNORED
    return labels, _numbers(values, labels, ignored)


def _numbers(
    values: npt.NDArray[Any], labels: npt.NDArray[np.int32], ignored: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.int64]:
    """Stored value of each label; the labels themselves if several cells share one value."""
    stored = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    stored[labels] = values
    cells = np.unique(labels)
    cells = cells[(cells > 0) & ((cells != IGNORED) | (ignored is None))]
    numbers = np.full(len(stored), -1, np.int64)
    numbers[0] = 0
    numbers[cells] = stored[cells] if len(np.unique(stored[cells])) == len(cells) else cells
    return numbers


def _ignored(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Pixels (h, w) of unknown instance; None if 65535 is absent or means a cell: 0 and 65535 alone are a mask."""
    if values.dtype.itemsize < 2 or values.size == 0 or values.max() != IGNORED:
        return None
    ignored = np.asarray(values == IGNORED)
    return ignored if len(_distinct(values)) > 2 else None


def _negative(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Invert ``values``, counting down from the largest; a single value of 0 becomes 1, any other 0. A black frame of a
    few pixels stays 0."""
    if values.min() == values.max():
        return np.asarray(values == 0).astype(values.dtype)
    inner = within_margin(values)
    result = np.zeros_like(values)
    result[inner] = values.max() - values[inner]
    return result


def _labels_of(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Labels of stored ``values`` (h, w): components of a binary mask, or regions of a label image."""
    present = _distinct(values)
    if len(present) <= 2:
        if len(present) == 2 and present[0] != 0:
            raise DataError(
                f"{path}: mask with the values {present[0]} and {present[1]} and no 0; expected 0 for the background"
            )
        return _components(values != 0)
    if values.dtype == np.uint8 and _is_smoothed_mask(values):
        raise DataError(
            f"{path}: looks like a mask with softened edges ({len(present)} grey values, most of it 255), not like a "
            "label image; save it with hard edges (0 and 255), or give `mask_foreground='dark'` for "
            "labels counted down from 255"
        )
    labels = renumber(values)
    _check_a_value_a_cell(path, labels, len(present))
    return labels


def _check_polarity(path: Path, labels: npt.NDArray[np.int32], foreground: MaskForeground) -> None:
    """Raise ``DataError`` if ``labels`` look like the negative of a mask; warn of a layer that covers the field."""
    frame = frame_of(labels)
    if frame is None:
        return
    seen = f"one object touches all four sides and covers {frame.share:.0%} of the image"
    if not frame.is_background:
        _warn_once(f"{path}: {seen}; taken as a confluent layer. Is it the background? Give `mask_foreground='dark'`")
    elif foreground == "dark":
        raise DataError(
            f"{path}: {seen} around {frame.pieces} pieces shaped like cells: with `mask_foreground='dark'` the "
            "background becomes a cell; leave that argument out, and keep masks of both kinds in separate folders"
        )
    else:
        raise DataError(
            f"{path}: {seen} around {frame.pieces} pieces shaped like cells: is the mask saved as its negative? "
            "Expected 0 for the background; save it so, or give `mask_foreground='dark'` if 0 marks the cells, "
            "`mask_foreground='light'` if the object is a cell"
        )


@cache
def _warn_once(text: str) -> None:
    """Warn only once per text, because training reads masks again in each epoch."""
    _log.warning("%s", text)


# ------------------------------------------------------------------------------------------------------- conversions


def _to_rgb8(
    path: Path, decoded: Decoded, bit_depth: int | None, notes: list[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
    """RGB (h, w, 3) and alpha (h, w) or None, both uint8."""
    if decoded.kind == "palette":
        assert decoded.palette is not None
        if int(decoded.samples.max()) >= len(decoded.palette):
            raise DataError(f"{path}: damaged file: a pixel points behind the end of the colour palette")
        notes.append("colour palette converted to RGB")
        colours = decoded.palette[decoded.samples]
        inside = None if decoded.alpha is None else scale_to_8(decoded.alpha, decoded.bits)
        return colours[..., :3], colours[..., 3] if colours.shape[2] == 4 else inside
    bits = decoded.bits
    if bits > 8:
        bits, said = bits_to_scale(decoded.samples, bits, decoded.said_bits, bit_depth)
        notes += said
    samples = scale_to_8(decoded.samples, bits)
    alpha = None if decoded.alpha is None else scale_to_8(decoded.alpha, decoded.bits)
    if decoded.kind == "cmyk":
        from PIL import Image

        notes.append("CMYK converted to RGB without colour profile")
        return np.asarray(Image.fromarray(np.ascontiguousarray(samples), mode="CMYK").convert("RGB")), alpha
    if decoded.kind == "grey":
        notes.append("1-bit image converted to RGB" if decoded.bits == 1 else "grey image converted to RGB")
        return np.repeat(samples[..., None], 3, axis=2), alpha
    return samples, alpha


def _on_white(rgb: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8], notes: list[str]) -> npt.NDArray[np.uint8]:
    if int(alpha.min()) == 255:
        notes.append("opaque alpha channel dropped")
        return rgb
    notes.append("transparent pixels composited on white")
    weight = alpha[..., None].astype(np.uint16)
    return ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _upright(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn ``pixels`` (h, w, ...) upright according to EXIF/TIFF orientation 1..8 (TIFF 6.0, tag 274)."""
    if orientation >= 5:
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ------------------------------------------------------------------------------------------------------------ labels


def _label_values(path: Path, decoded: Decoded) -> npt.NDArray[Any]:
    """Values (h, w), unsigned integers: palette indices and grey values unchanged, RGB by its colours."""
    samples = decoded.samples
    if decoded.alpha is not None and int(decoded.alpha.min()) != 2**decoded.bits - 1:
        raise DataError(f"{path}: mask with transparent pixels; save it without alpha channel")
    if decoded.kind in ("rgb", "cmyk"):
        if decoded.kind == "cmyk":
            raise DataError(f"{path}: mask in CMYK; expected a grey binary mask or a label image (8 to 32 bit grey)")
        if (samples != samples[..., :1]).any():
            return _colour_numbers(path, decoded)
        samples = samples[..., 0]
    if samples.dtype.kind == "u":
        return samples
    whole = np.isfinite(samples).all() and (samples >= 0).all() and (samples < 2**31).all()
    if not whole or (samples != np.floor(samples)).any():
        raise DataError(
            f"{path}: {samples.dtype} mask with negative, fractional or too large values; expected labels 0, 1, 2 ..."
        )
    return samples.astype(np.uint32)


def _colour_numbers(path: Path, decoded: Decoded) -> npt.NDArray[np.uint16]:
    """Number the colours of an RGB mask (h, w, 3) of 8 bit in ascending order; black is 0, the background.

    Raises ``DataError`` unless it looks like a mask in which each cell has one colour: black is there, colours are few,
    and most of them cover an object, which they do not in a photograph, an overlay or a mask with soft edges.
    """
    expected = "expected black background and one plain colour a cell, or a label image (8 to 32 bit grey)"
    if decoded.container == "JPEG" or decoded.samples.dtype != np.uint8:
        raise DataError(f"{path}: mask in colour as {decoded.bits}-bit {decoded.container}; {expected} in PNG or TIFF")
    red, green, blue = np.moveaxis(decoded.samples.astype(np.uint32), -1, 0)
    colours, index, area = np.unique(red << 16 | green << 8 | blue, return_inverse=True, return_counts=True)
    if colours[0] != 0:
        raise DataError(f"{path}: mask in colour without black; {expected}")
    n_small = int(np.count_nonzero(area[1:] < _OBJECT_PX))
    if len(colours) > _MOST_COLOURS or 2 * n_small > len(colours) - 1:
        raise DataError(
            f"{path}: mask in colour with {len(colours)} colours, {n_small} of them on fewer than {_OBJECT_PX} px: a "
            f"photograph, an overlay or soft edges? {expected}"
        )
    return index.reshape(decoded.samples.shape[:2]).astype(np.uint16)


def _cut_jpeg_mask(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    clear = float(np.mean((values < 64) | (values >= 192)))
    if clear < 0.99:
        raise DataError(
            f"{path}: JPEG is lossy and this one is not a clean mask ({1 - clear:.1%} of it neither black nor white); "
            "save masks and label images as PNG or TIFF"
        )
    return (values >= 128).astype(np.uint8)


def _distinct(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if values.dtype.itemsize <= 2:
        return np.flatnonzero(np.bincount(values.ravel()))
    return np.unique(values).astype(np.int64)


def _is_smoothed_mask(values: npt.NDArray[np.uint8]) -> bool:
    """Whether this is a soft-edged mask: more than 20 grey values, and 255 makes up over half of the foreground."""
    histogram = np.bincount(values.ravel(), minlength=256)
    return bool(np.count_nonzero(histogram) > 20 and histogram[255] * 2 > histogram[1:].sum())


def _check_a_value_a_cell(path: Path, labels: npt.NDArray[np.int32], n_values: int) -> None:
    """Raise ``DataError`` if a few values cover many separate objects: a class mask, a softened or a stained one.

    Only pieces of at least ``_OBJECT_PX`` count, and the labels that have one.
    """
    runs = row_runs(labels)
    piece = pieces(runs)
    is_object = np.bincount(piece, weights=runs.length) >= _OBJECT_PX
    n_objects = int(is_object.sum())
    n_labels = len(np.unique(runs.label[is_object[piece]]))
    if n_objects > 1.5 * n_labels and n_objects - n_labels >= 3:
        raise DataError(
            f"{path}: {n_values} values but {n_objects} separate objects: a class mask or a softened mask? Save it as "
            "0 and 255, or as a label image with one value per cell"
        )


def _components(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """4-connected components, numbered in raster order of their first pixel."""
    import cv2

    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    return renumber(np.asarray(labels))
