"""Choose the page of a TIFF that is the picture, from the tags of its pages; ``tiff`` is a ``tifffile.TiffFile``.

A TIFF may contain the picture, reduced copies of it and its transparency mask, as separate pages or below another page
(SubIFDs), in any order: a camera's DNG begins with the thumbnail. The tag NewSubfileType tells them apart if the writer
set it. Pages that differ in more than size are several pictures, and only the user knows which one is wanted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import DataError

_MAX_PAGES = 64  # a picture and its reduced copies
_REDUCED, _PART, _MASK = 1, 2, 4  # bits of NewSubfileType (TIFF 6.0, tag 254); DNG has more, for other things
_MASK_KIND = 4  # photometric interpretation
_PREVIEW = 0.5  # an unmarked copy is at most this part of the picture's width
_SAVE = "save the plane you want as an image of its own (in Fiji: Image > Duplicate, or Stack to RGB)"


@dataclass(frozen=True)
class Picture:
    """``page``: the tifffile page that is the picture. ``mask``: page of the same size with its transparency.

    ``notes``: pages that were left out although not marked as copies.
    """

    page: Any
    mask: Any | None = None
    notes: tuple[Note, ...] = ()


def picture_of(path: Path, tiff: Any) -> Picture:
    """Find the picture at full resolution, wherever it is in the file.

    Raises ``DataError`` describing the pages if there is no picture, or several.
    """
    if len(tiff.pages) == 0:
        raise DataError(f"{path}: TIFF without an image")
    n_pages = len(tiff.pages)
    pages = list(islice(_all_pages(tiff), _MAX_PAGES + 1))
    if len(pages) > _MAX_PAGES:
        raise DataError(f"{path}: TIFF with {max(n_pages, len(pages))} planes or more; expected one; {_SAVE}")
    full = [page for page in pages if not page.subfiletype & ~_PART and int(page.photometric) != _MASK_KIND]
    if not full:
        raise DataError(
            f"{path}: TIFF without a full-size picture: {_listed(pages)}; expected one that is not marked as a reduced "
            "copy or a mask; save the picture itself"
        )
    page = max(full, key=_area)  # the first one in a tie
    previews = [one for one in full if one is not page]
    larger = [one for one in pages if one.subfiletype & _REDUCED and _area(one) > _area(page)]
    if larger or not all(_is_preview(one, page) for one in previews):
        raise DataError(
            f"{path}: TIFF with {len(pages)} planes (stack, time series or channels): {_listed(pages)}; expected one "
            f"picture; {_SAVE}"
        )
    _check_one_plane(path, page)
    masks = [one for one in pages if one.subfiletype & _MASK or int(one.photometric) == _MASK_KIND]
    mask = next((one for one in masks if _size(one) == _size(page) and one.samplesperpixel == 1), None)
    notes = [f"a preview was left out ({_described(one)})" for one in previews]
    if masks and mask is None:
        notes.append(f"a transparency mask of another size was left out ({_described(masks[0])})")
    return Picture(page, mask, tuple(Note(note, "pages") for note in notes))


def _all_pages(tiff: Any) -> Iterator[Any]:
    for page in tiff.pages:
        yield page
        yield from page.pages or ()


def _check_one_plane(path: Path, page: Any) -> None:
    """Check for a stack in one page: tifffile, ImageJ above 4 GB and MetaMorph append other planes to its pixels."""
    if page.imagedepth != 1:
        raise DataError(f"{path}: TIFF volume of {page.imagedepth} slices; expected one plane; save the slice you want")
    planes = _planes_said(page)
    if planes > 1:
        raise DataError(
            f"{path}: TIFF of one page that holds {planes} planes of {_described(page)}; expected one; {_SAVE}"
        )


def _planes_said(page: Any) -> int:
    """Number of planes that the metadata of the only page of a stack state; 1 if none is stated."""
    from tifffile.tifffile import imagej_description_metadata, shaped_description_metadata

    said: list[int] = []
    if page.imagej_description:
        said.append(imagej_description_metadata(page.imagej_description).get("images", 1))
    if page.shaped_description:
        shape = tuple(shaped_description_metadata(page.shaped_description)["shape"])
        if _size(page) in (shape[-2:], shape[-3:-1]):  # a shape of another size is left over from another picture
            said.append(math.prod(shape) // (_area(page) * page.samplesperpixel))
    if 33629 in page.tags:  # UIC2 of MetaMorph: a time stamp for each plane
        said.append(page.tags[33629].count)
    return max(said, default=1)


def _is_preview(page: Any, picture: Any) -> bool:
    """Whether an unmarked page can only be a smaller copy: at most half as wide, same proportions within a pixel."""
    (height, width), (full_h, full_w) = _size(page), _size(picture)
    return bool(
        0 < width <= _PREVIEW * full_w
        and 0 < height <= _PREVIEW * full_h
        and abs(height - width * full_h / full_w) <= max(1.0, full_h / full_w)
    )


def _size(page: Any) -> tuple[int, int]:
    return page.imagelength, page.imagewidth


def _area(page: Any) -> int:
    return int(page.imagelength * page.imagewidth)


def _listed(pages: list[Any]) -> str:
    return ", ".join(f"{count} of {what}" for what, count in Counter(map(_described, pages)).items())


def _described(page: Any) -> str:
    kind = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "RGB", 32803: "raw", 34892: "raw"}
    what = kind.get(int(page.photometric), "unknown")
    marks = ", marked as a reduced copy" if page.subfiletype & _REDUCED else ""
    marks += ", marked as a mask" if page.subfiletype & _MASK else ""
    return f"{page.imagewidth} x {page.imagelength} px {page.bitspersample}-bit {what}{marks}"
