"""Bytes of a PNG, JPEG or TIFF to its samples; nothing missing, nothing converted.

The underlying decoders silently fill gaps or cut bits (tifffile: missing tiles become zeros; Pillow: 16-bit RGB keeps
only its high bytes; libjpeg: missing data becomes grey, damaged data a smear of colour). So each format is checked
before decoding, JPEGs are decoded with libjpeg's warnings as errors, and a decoder's logs and warnings are collected:
errors fail the image, the rest becomes a note.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import DataError
from cellseg_deploy.files import urls
from cellseg_deploy.files.fingerprint import Fingerprint, of_bytes
from cellseg_deploy.files.regular import NotARegularFileError, opened
from cellseg_deploy.images import bit_depth, resolution, tiff_checks, tiff_pages
from cellseg_deploy.images.bit_depth import SaidBits
from cellseg_deploy.images.decoder_warnings import collected
from cellseg_deploy.images.header import JPEG, PNG, TIFF
from cellseg_deploy.images.jpeg_structure import check_effort, check_whole, decode_strictly, walk
from cellseg_deploy.images.limits import check_pixels
from cellseg_deploy.images.other_formats import what_it_is
from cellseg_deploy.images.resolution import Resolution

OUR_SOFTWARE = "cellseg-deploy"
"""TIFF tag 305 of label images that this package writes."""
_PNG_PALETTE = 3  # colour type
# Chunks of a PNG that neither rotate nor mask its pixels, and contain no compressed data except the pixels.
_PNG_PLAIN = (b"IDAT", b"IEND", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"tIME", b"tEXt")
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_TEXT_TURNS = (b"Raw profile type", b"XML:")  # EXIF and XMP data as text
_MAX_CHUNKS = 500_000  # of a PNG; 4 GB in the usual pieces of 8 kB


@dataclass(frozen=True)
class Decoded:
    """Samples as stored in the file. ``kind``: grey, rgb, cmyk or palette (then ``palette`` is uint8 (n, 3 or 4)).

    ``samples``: (h, w) for grey and palette, else (h, w, channels); ``alpha``: (h, w) or None, same dtype.
    ``bits``: bits per sample declared by the file. ``resolution``: pixel sizes stated by the file.
    ``said_bits``: how many of the ``bits`` are used, if the file states it.
    ``white_is_zero``: samples are displayed as their negative (TIFF 6.0, PhotometricInterpretation 0).
    ``source``: fingerprint of the decoded bytes, if requested. ``is_ours``: a label image of ``outputs.label_tiff``.
    """

    container: str
    kind: str
    samples: npt.NDArray[Any]
    bits: int
    alpha: npt.NDArray[Any] | None = None
    palette: npt.NDArray[np.uint8] | None = None
    orientation: int = 1
    notes: tuple[str, ...] = ()
    resolution: tuple[Resolution, ...] = ()
    said_bits: SaidBits | None = None
    source: Fingerprint | None = None
    white_is_zero: bool = False
    is_ours: bool = False


def decode(path: Path, max_pixels: int, *, with_fingerprint: bool = False) -> Decoded:
    """Decode the samples of ``path`` as stored; every failure of a decoder becomes a ``DataError``."""
    data, mtime_ns = _read_regular_file(path)
    decoded = decode_bytes(path, data, max_pixels)
    return replace(decoded, source=of_bytes(data, mtime_ns)) if with_fingerprint else decoded


def decode_bytes(path: Path, data: bytes, max_pixels: int) -> Decoded:
    """Like ``decode``, for ``data``, the content of a file; ``path``: its name, for messages."""
    reader = _reader_for(path, data)
    with collected() as messages:
        try:
            decoded = reader(path, data, max_pixels)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they please (struct.error, SyntaxError, IndexError ...)
            raise DataError(f"{path}: damaged or incomplete file: {str(error) or type(error).__name__}") from error
    if messages.errors:
        raise DataError(f"{path}: damaged or incomplete file: {messages.errors[0]}")
    if decoded.samples.size == 0:
        raise DataError(f"{path}: image without a pixel ({decoded.samples.shape})")
    return replace(decoded, notes=(*decoded.notes, *(Note(note, "damage") for note in messages.notes)))


def decode_pillow(path: Path, image: Any) -> Decoded:
    """Samples of ``image``, a ``PIL.Image.Image``, as stored; ``path``: its name in messages.

    Raises ``DataError`` for modes other than those of 1, 8 and 16 bit, and Pillow's own errors if it decodes lazily.
    """
    if image.mode.startswith("I;16"):
        return Decoded("PIL", "grey", np.asarray(image).astype(np.uint16), 16, orientation=_orientation_of(image))
    return _from_pillow(path, "PIL image", image)


def declared_pixels(path: Path) -> int:
    """Number of pixels declared by the header of ``path``, without decoding; 0 if unknown."""
    (height, width), _ = declared_size(path)
    return height * width


def declared_size(path: Path) -> tuple[tuple[int, int], float | None]:
    """Size (height, width) in px, (0, 0) if unknown, and side of a pixel in micrometres, None if unknown, from the
    header of ``path``.

    For planning only: no error is raised here, because ``decode`` reports why a file cannot be read.
    """
    try:
        with opened(path) as file:
            return _declared(path, file)
    except Exception:  # as in decode, which will raise it again
        return (0, 0), None


def declared_pixels_in(path: Path, data: bytes) -> int:
    """Like ``declared_pixels``, for ``data``, the content of a file; ``path``: its name."""
    try:
        (height, width), _ = _declared(path, io.BytesIO(data))
    except Exception:  # as in decode_bytes, which will raise it again
        return 0
    return height * width


def _declared(path: Path, file: BinaryIO) -> tuple[tuple[int, int], float | None]:
    um: float | None = None
    with collected():
        head = file.read(26)
        file.seek(0)
        if head.startswith(PNG):
            width, height = struct.unpack_from(">II", head, 16)
        elif head.startswith(JPEG):
            from PIL import JpegImagePlugin

            with JpegImagePlugin.JpegImageFile(file) as image:
                width, height = image.size
        elif head[:4] in TIFF:
            import tifffile

            with tifffile.TiffFile(file) as tiff:
                page = tiff_pages.picture_of(path, tiff).page
                width, height = page.imagewidth, page.imagelength
                um = resolution.believed_pixel_size(resolution.of_tiff(tiff, page)).um
        else:
            return (0, 0), None
    return (int(height), int(width)), um


def _read_regular_file(path: Path) -> tuple[bytes, int]:
    """Read all bytes of ``path`` and its modification time in ns, 0 for an object in a bucket. Detects a file that
    changes while it is read; an object cannot."""
    try:
        if urls.is_url(path):
            return urls.read(path), 0
        with opened(path) as file:
            before = os.fstat(file.fileno())
            data = file.read()
            after = os.fstat(file.fileno())
    except NotARegularFileError as error:
        raise DataError(f"{error}; expected an image file") from error
    except OSError as error:
        is_dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)  # noqa: PTH114  (never raises)
        said = "a link to a file that does not exist" if is_dangling else error.strerror
        raise DataError(f"{path}: cannot be read: {said}") from error
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns or after.st_size != before.st_size:
        raise DataError(f"{path}: the file changed while it was read; wait until it is fully written and run again")
    return data, before.st_mtime_ns


def _reader_for(path: Path, data: bytes) -> Callable[[Path, bytes, int], Decoded]:
    if not data:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if data.startswith(PNG):
        return _decode_png
    if data.startswith(JPEG):
        return _decode_jpeg
    if data[:4] in TIFF:
        return _decode_tiff
    what = what_it_is(data[:200]) or f"it starts with {data[:8]!r}"
    raise DataError(f"{path}: not a PNG, JPEG or TIFF, whatever its name says: {what}")


# ------------------------------------------------------------------------------------------------------ PNG and JPEG


def _decode_png(path: Path, data: bytes, max_pixels: int) -> Decoded:
    from PIL import PngImagePlugin

    head = _check_png(path, data)
    check_pixels(path, head.width, head.height, max_pixels)
    if head.bits == 16 or head.is_plain:
        orientation = _orientation_in(head.turning)
        decoded = _decode_by_libpng(data, head)
        said = bit_depth.of_png(head.significant, head.colour)
        return replace(decoded, orientation=orientation, resolution=resolution.of_png(data), said_bits=said)
    # The class itself instead of Image.open: no format detection, and our own limit instead of a global one.
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
        return replace(_from_pillow(path, "PNG", image), resolution=resolution.of_png(data))


class _PngHead(NamedTuple):
    """``is_plain``: samples of 8 bits and only plain chunks.

    ``turning``: the complete chunks that may state the orientation. ``significant``: content of the sBIT chunk.
    """

    width: int
    height: int
    bits: int
    colour: int
    is_plain: bool
    turning: tuple[memoryview, ...] = ()
    significant: bytes = b""


def _check_png(path: Path, data: bytes) -> _PngHead:
    """Walk all chunks of the PNG and describe it: libpng and Pillow do not notice a missing end marker."""
    head: _PngHead | None = None
    turning: list[memoryview] = []
    position, view = len(PNG), memoryview(data)
    for _ in range(_MAX_CHUNKS):
        if position + 12 > len(data):
            raise DataError(f"{path}: the PNG is cut short: its end marker is missing")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise DataError(f"{path}: the PNG is cut short inside its {_chunk_name(kind)} part")
        # Decoders check the pixels themselves, but ignore a wrong pHYs, sBIT or tRNS.
        if kind != b"IDAT" and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise DataError(f"{path}: the PNG is damaged: wrong checksum in its {_chunk_name(kind)} part")
        if head is None:
            if kind != b"IHDR" or length != 13:
                raise DataError(f"{path}: the PNG is damaged: no header")
            width, height, bits, colour, *_, interlaced = struct.unpack_from(">IIBBBBB", data, position + 8)
            check_pixels(path, width, height, 2**62)
            head = _PngHead(width, height, bits, colour, bits == 8 and colour != _PNG_PALETTE and not interlaced)
        elif kind not in _PNG_PLAIN or data.startswith(_PNG_TEXT_TURNS, position + 8):
            head = head._replace(is_plain=False)
            if kind == b"eXIf" or kind in _PNG_TEXT:
                turning.append(view[position : end + 4])
        elif kind == b"sBIT":
            head = head._replace(significant=data[position + 8 : end])
        if kind == b"IEND":
            return head._replace(turning=tuple(turning))
        position = end + 4
    raise DataError(f"{path}: PNG of more than {_MAX_CHUNKS} parts; save it again with another program")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunk_name(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")


def _orientation_in(parts: tuple[memoryview, ...]) -> int:
    """EXIF orientation 1..8 stated by these chunks of a PNG (EXIF, XMP, either as text); 1 if none does.

    Pillow reads them from a PNG of one pixel, because it would decode 16-bit samples only to lose their low bytes.
    """
    if not parts:
        return 1
    from PIL import PngImagePlugin

    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(b"\0\0")) + _chunk(b"IEND", b"")
    with PngImagePlugin.PngImageFile(io.BytesIO(b"".join([PNG, head, *parts, body]))) as image:
        return _orientation_of(image)


def _orientation_of(image: Any) -> int:
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def _decode_by_libpng(data: bytes, head: _PngHead) -> Decoded:
    """Decode a 16-bit PNG, which Pillow would silently cut to 8, or a plain PNG, in half of Pillow's time."""
    import imagecodecs

    samples = imagecodecs.png_decode(data)
    expected = np.uint16 if head.bits == 16 else np.uint8
    if samples.dtype != expected or samples.shape[:2] != (head.height, head.width):
        raise DataError(f"{head.bits}-bit PNG decoded as {samples.dtype} {samples.shape}")
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    has_alpha = channels in (2, 4)
    alpha = samples[..., -1] if has_alpha else None
    grey = channels <= 2
    colours = samples if not has_alpha else samples[..., 0] if grey else samples[..., :3]
    if grey and colours.ndim == 3:
        colours = colours[..., 0]
    if (head.colour & 2 == 0) != grey:
        raise DataError(f"{head.bits}-bit PNG of colour type {head.colour} decoded with {channels} channels")
    return Decoded("PNG", "grey" if grey else "rgb", colours, head.bits, alpha)


def _decode_jpeg(path: Path, data: bytes, max_pixels: int) -> Decoded:
    """Decode common grey and RGB with simplejpeg, to the same bytes as Pillow; everything else with Pillow.

    Pillow always reads the headers: size, orientation, density.
    """
    from PIL import JpegImagePlugin

    found = walk(data)
    check_effort(path, found)
    check_whole(path, found)
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        check_pixels(path, image.width, image.height, max_pixels)
        said = resolution.of_jpeg(image)
        if image.mode not in ("L", "RGB") or not found.is_common:
            return replace(_from_pillow(path, "JPEG", image), resolution=said)
        samples = decode_strictly(data, "GRAY" if image.mode == "L" else "RGB")
        kind = "grey" if image.mode == "L" else "rgb"
        return Decoded("JPEG", kind, samples, 8, orientation=_orientation_of(image), resolution=said)


def _from_pillow(path: Path, container: str, image: Any) -> Decoded:
    image.load()
    orientation = _orientation_of(image)
    transparent = "transparency" in image.info
    mode = image.mode
    if mode == "P":
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        if transparent:
            palette = np.column_stack([palette, _palette_alpha(image.info["transparency"], len(palette))])
        return Decoded(container, "palette", np.asarray(image), 8, None, palette, orientation)
    if mode == "1":
        return Decoded(container, "grey", np.asarray(image).astype(np.uint8), 1, None, None, orientation)
    if transparent and mode in ("L", "RGB"):
        image, mode = image.convert("RGBA"), "RGBA"
    samples = np.asarray(image)
    if mode == "L":
        return Decoded(container, "grey", samples, 8, None, None, orientation)
    if mode == "LA":
        return Decoded(container, "grey", samples[..., 0], 8, samples[..., 1], None, orientation)
    if mode in ("RGB", "CMYK"):
        return Decoded(container, mode.lower(), samples, 8, None, None, orientation)
    if mode == "RGBA":
        return Decoded(container, "rgb", samples[..., :3], 8, samples[..., 3], None, orientation)
    raise DataError(f"{path}: {container} of the unusual pixel format {mode}; save it as 8-bit RGB")


def _not_multiplied(samples: npt.NDArray[Any], alpha: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Divide ``samples`` (h, w) or (h, w, C), stored multiplied by ``alpha`` (h, w) ("associated", TIFF 6.0, tag 338),
    by it; arbitrary where ``alpha`` is 0."""
    full = 2**bits - 1
    weight = np.maximum(alpha, 1).astype(np.float32)
    weight = weight[..., None] if samples.ndim == 3 else weight
    colours: npt.NDArray[Any] = np.minimum(np.rint(samples * (full / weight)), full).astype(samples.dtype)
    return colours


def _palette_alpha(transparency: int | bytes, size: int) -> npt.NDArray[np.uint8]:
    """Alpha of each palette colour. PNG's tRNS lists those that are not opaque; Pillow gives a single one as index."""
    alpha = np.full(size, 255, np.uint8)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    else:
        alpha[: len(transparency)] = np.frombuffer(transparency, np.uint8)[:size]
    return alpha


# -------------------------------------------------------------------------------------------------------------- TIFF


def _decode_tiff(path: Path, data: bytes, max_pixels: int) -> Decoded:
    import tifffile

    # tifffile's objects form cycles: closing the buffer frees the file's bytes before they are garbage-collected.
    with io.BytesIO(data) as buffer, tifffile.TiffFile(buffer) as tiff:
        picture = tiff_pages.picture_of(path, tiff)
        page = picture.page
        tiff_checks.check_page(path, page, data, max_pixels)
        decoded = _from_tiff_page(path, page, page.asarray(maxworkers=1), tiff.pages[0])
        if picture.mask is not None and decoded.alpha is None and decoded.samples.dtype.kind == "u":
            tiff_checks.check_page(path, picture.mask, data, max_pixels)
            inside = picture.mask.asarray(maxworkers=1) != 0  # TIFF 6.0, photometric interpretation 4
            decoded = replace(decoded, alpha=inside.astype(decoded.samples.dtype) * (2**decoded.bits - 1))
        said = resolution.of_tiff(tiff, page)
        notes = (*decoded.notes, *picture.notes)
        # Our label images have no description, which every other program that keeps the name of ours would add.
        is_ours = page.software == OUR_SOFTWARE and not page.description
        return replace(decoded, notes=notes, resolution=said, said_bits=bit_depth.of_tiff(tiff, page), is_ours=is_ours)


def _from_tiff_page(path: Path, page: Any, samples: npt.NDArray[Any], first: Any) -> Decoded:
    """Describe ``page``. ``first``: the file's first page, whose orientation is used if the page (DNG) has none."""
    photometric = int(page.photometric)
    tag = page.tags.get(274) or first.tags.get(274)
    orientation = int(tag.value) if tag is not None and tag.value in range(1, 9) else 1
    if samples.dtype == np.bool_:
        samples = samples.astype(np.uint8)
    count, alpha = int(page.samplesperpixel), None
    if count > 1 and int(page.planarconfig) == 2:
        samples = np.moveaxis(samples, 0, -1)
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}.get(photometric)
    if colours is None or count not in (colours, colours + 1) or samples.ndim != (2 if count == 1 else 3):
        raise DataError(
            f"{path}: TIFF with {count} channels of colour kind {page.photometric}; expected grey, palette, RGB, RGBA "
            "or CMYK; save it as RGB"
        )
    if photometric == 6 and int(page.compression) not in tiff_checks.JPEG:
        raise DataError(f"{path}: TIFF in YCbCr without JPEG compression; save it as RGB")
    notes: list[str] = []
    bits = int(page.bitspersample)
    if count == colours + 1:
        alpha, samples = samples[..., -1], samples[..., :-1]
        samples = samples[..., 0] if colours == 1 else samples
        if page.extrasamples and int(page.extrasamples[0]) == 1:
            samples = _not_multiplied(samples, alpha, bits)
        if page.extrasamples and int(page.extrasamples[0]) == 0:
            alpha = None
            notes.append("a channel of unknown meaning was dropped")
    if photometric == 3:
        # 16 bit by the standard; writers multiply 8 bit by 256 or 257. Some keep 8 bit (this is libtiff's own test).
        colours16 = np.asarray(page.colormap).T
        palette = (colours16 if int(colours16.max()) < 256 else colours16 >> 8).astype(np.uint8)
        return Decoded("TIFF", "palette", samples, bits, alpha, palette, orientation, tuple(notes))
    kind = {1: "grey", 3: "rgb", 4: "cmyk"}[colours]
    return Decoded(
        *("TIFF", kind, samples, bits, alpha, None, orientation, tuple(notes)), white_is_zero=photometric == 0
    )
