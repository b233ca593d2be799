"""Regions of TIFF, BigTIFF and OME-TIFF, tiled or in strips, with or without a pyramid.

Only the tiles or strips that a region touches are read and decoded, and the last ones are kept. Pixels are converted by
``images.read.as_rgb``, as those of a whole image. What that cannot do region by region is refused: a file that is to be
turned upright, and a transparency mask in a page of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError
from cellseg_deploy.images import bit_depth, decode, resolution, tiff_checks, tiff_pages
from cellseg_deploy.images.jpeg_structure import check_effort, decode_strictly, walk
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, as_rgb
from cellseg_deploy.images.resolution import GIVEN, PixelSize
from cellseg_deploy.slides.region import Pixels, stamp_of

_KEPT_BYTES = 256 << 20
"""Decoded tiles to keep: a row of tiles is read again for the next band of rows."""
_MOST_SEGMENT_PX = 64_000_000
_SAME_SHAPE = 0.02
_DEFAULTS = ReadOptions()


class TiffReader:
    """Regions of the picture in the TIFF ``path``. Raises ``DataError`` for a file that cannot be read by region."""

    def __init__(self, path: Path, options: ReadOptions = _DEFAULTS) -> None:
        import tifffile

        self.name = path.name
        self._path, self._options = path, options
        try:
            self.stamp = (*stamp_of(path), options.bit_depth or 0)  # a given depth changes every pixel
            self._tiff = tifffile.TiffFile(path)
        except (OSError, tifffile.TiffFileError) as error:
            raise DataError(f"{path}: cannot be read as a TIFF: {error}") from error
        try:
            self._open()
        except BaseException:
            self._tiff.close()
            raise

    def _open(self) -> None:
        picture = tiff_pages.picture_of(self._path, self._tiff)
        if picture.mask is not None:
            raise DataError(
                f"{self._path}: TIFF with a transparency mask, which cannot be read by region; save it without the mask"
            )
        page = picture.page
        tag = page.tags.get(274) or self._tiff.pages[0].tags.get(274)
        if tag is not None and tag.value in range(2, 9):
            raise DataError(
                f"{self._path}: the orientation tag {tag.value} asks to turn the image, which is not possible by "
                "region; save it upright"
            )
        self._pages = [page, *_copies(self._tiff, page)]
        for one in self._pages:
            self._check(one)
        self.levels = tuple((int(one.imagelength), int(one.imagewidth)) for one in self._pages)
        self._said_bits = bit_depth.of_tiff(self._tiff, page)
        given = self._options.pixel_size_um
        said = resolution.of_tiff(self._tiff, page)
        self.pixel_size = resolution.believed_pixel_size(said) if given is None else PixelSize(given, GIVEN)
        self._kept: OrderedDict[tuple[int, int], npt.NDArray[Any]] = OrderedDict()
        self._kept_bytes = 0
        height, width = self.levels[0]
        middle = self._converted(max(0, height // 2 - 128), 0, min(height, 256), min(width, 4096), 0)
        self.notes = tuple(dict.fromkeys((*picture.notes, *middle.notes)))

    def _check(self, page: Any) -> None:
        """Check what ``images.tiff_checks`` checks of a whole file, as far as the tags tell."""
        if int(page.compression) not in tiff_checks._BOUNDED_IN_TIFF or page.samplesperpixel > 4:
            raise DataError(
                f"{self._path}: TIFF with compression {int(page.compression)} and {page.samplesperpixel} channels; "
                "expected LZW, Deflate, Zstd, JPEG or none, and grey, RGB or RGBA"
            )
        expected = int(np.prod(page.chunked))
        offsets, counts = page.dataoffsets, page.databytecounts
        missing = sum(1 for offset, count in zip(offsets, counts, strict=False) if offset == 0 or count == 0)
        if len(offsets) != expected or len(counts) != expected or missing:
            raise DataError(
                f"{self._path}: {expected - len(offsets) + missing} of {expected} strips or tiles of the TIFF are "
                "missing; save it completely"
            )
        size = self._tiff.filehandle.size
        if any(offset + count > size for offset, count in zip(offsets, counts, strict=True)):
            raise DataError(f"{self._path}: the TIFF is cut short: some of its pixels lie behind the end of the file")
        height, width, _, _ = tiff_checks._layout(page)
        if height * width > _MOST_SEGMENT_PX and not _is_plain(page):
            raise DataError(
                f"{self._path}: a compressed strip or tile of the TIFF has {width} x {height} px, so regions cannot be "
                "read without all of it; save it in tiles"
            )

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """As ``RegionReader.read``."""
        return self._converted(y, x, h, w, level).pixels_hwc

    def _converted(self, y: int, x: int, h: int, w: int, level: int) -> LoadedImage:
        page = self._pages[level]
        samples = self._samples(page, level, y, x, h, w)
        decoded = decode._from_tiff_page(self._path, page, samples, self._tiff.pages[0])
        return as_rgb(self._path, replace(decoded, said_bits=self._said_bits), self._options)

    def _samples(self, page: Any, level: int, y: int, x: int, h: int, w: int) -> npt.NDArray[Any]:
        """Samples as ``page.asarray`` has them, of one region."""
        full_h, full_w, down, across = tiff_checks._layout(page)
        planes = page.samplesperpixel if int(page.planarconfig) == 2 else 1
        channels = page.samplesperpixel // planes
        out = np.empty((planes, h, w, channels), page.dtype)
        for plane in range(planes):
            for row in range(y // full_h, (y + h - 1) // full_h + 1):
                for column in range(x // full_w, (x + w - 1) // full_w + 1):
                    index = (plane * down + row) * across + column
                    top, left = row * full_h, column * full_w
                    y0, y1 = max(y, top), min(y + h, top + full_h)
                    x0, x1 = max(x, left), min(x + w, left + full_w)
                    if _is_plain(page) and not page.is_tiled:
                        found = self._plain_rows(page, index, y0 - top, y1 - top)[:, x0 - left : x1 - left]
                    else:
                        found = self._segment(page, level, index)[y0 - top : y1 - top, x0 - left : x1 - left]
                    if found.shape[:2] != (y1 - y0, x1 - x0):
                        raise DataError(f"{self._path}: damaged TIFF: tile {index} is smaller than the file says")
                    out[plane, y0 - y : y1 - y, x0 - x : x1 - x] = found
        if planes > 1:
            return out[..., 0]
        return out[0] if channels > 1 else out[0, ..., 0]

    def _segment(self, page: Any, level: int, index: int) -> npt.NDArray[Any]:
        """Decoded tile or strip ``index``, (h, w, channels)."""
        kept = self._kept.get((level, index))
        if kept is not None:
            self._kept.move_to_end((level, index))
            return kept
        data = self._bytes(page.dataoffsets[index], page.databytecounts[index])
        try:
            if int(page.compression) in tiff_checks.JPEG:
                self._check_jpeg(page, data, index)
            segment = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever they please
            raise DataError(f"{self._path}: tile or strip {index} of the TIFF is damaged: {error}") from error
        if segment is None:
            raise DataError(f"{self._path}: tile or strip {index} of the TIFF is missing; save it completely")
        found = np.asarray(segment[0])
        self._kept[level, index] = found
        self._kept_bytes += found.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _check_jpeg(self, page: Any, data: bytes, index: int) -> None:
        """As for a whole file: tifffile fills what is missing or damaged with grey."""
        found = walk(data)
        check_effort(self._path, found)
        if not found.has_end or found.lacks_scans:
            raise DataError(f"{self._path}: JPEG part {index} of the TIFF is cut short; save it completely")
        if found.is_common and int(page.compression) == 7:
            tables = bytes(page.jpegtables or b"")
            decode_strictly(tables[:-2] + data[2:] if tables else data, "GRAY")

    def _plain_rows(self, page: Any, index: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of an uncompressed strip, which may be as large as the image."""
        channels = 1 if int(page.planarconfig) == 2 else page.samplesperpixel
        row_bytes = page.imagewidth * channels * page.dtype.itemsize
        if stop * row_bytes > page.databytecounts[index]:
            raise DataError(f"{self._path}: damaged TIFF: strip {index} is smaller than the file says")
        data = self._bytes(page.dataoffsets[index] + start * row_bytes, (stop - start) * row_bytes)
        samples = np.frombuffer(data, page.dtype.newbyteorder(self._tiff.byteorder))
        return samples.reshape(stop - start, page.imagewidth, channels)

    def _bytes(self, offset: int, count: int) -> bytes:
        handle = self._tiff.filehandle
        with handle.lock:
            handle.seek(offset)
            data: bytes = handle.read(count)
        if len(data) != count:
            raise DataError(f"{self._path}: the TIFF is cut short, or changed while it was read")
        return data

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


def _is_plain(page: Any) -> bool:
    """Whether samples lie in the file as they are."""
    return int(page.compression) == 1 and int(page.fillorder) == 1 and page.bitspersample in (8, 16)


def _copies(tiff: Any, picture: Any) -> list[Any]:
    """Pages that are smaller copies of ``picture``, largest first: same kind of samples and proportions."""
    ratio = picture.imagewidth / picture.imagelength
    found = [
        page
        for page in tiff_pages._all_pages(tiff)
        if page is not picture
        and page.imagewidth < picture.imagewidth
        and page.samplesperpixel == picture.samplesperpixel
        and page.bitspersample == picture.bitspersample
        and int(page.photometric) == int(picture.photometric)
        and abs(page.imagewidth / page.imagelength / ratio - 1) <= max(_SAME_SHAPE, 1 / page.imagelength)
    ]
    return sorted(found, key=lambda page: -page.imagewidth)
