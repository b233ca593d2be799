"""Image files that a run over somebody else's folder will meet, made from nothing: damaged, hostile, ambiguous, valid.

``expected``: ``failed``: the image fails with a reason that ``words`` is found in, and the run goes on; ``done``: it is
read right, and ``words`` is found in its notes ("" for none at all). ``seen``: what a run says that looks for cells.
"""

from __future__ import annotations

import functools
import io
import lzma
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import field_pictures
import imagecodecs
import numpy as np
import tifffile
from made_images import H, W, encoded, picture, tiff
from PIL import Image


@dataclass(frozen=True)
class Case:
    """``group``: heading in the list of what is promised. ``make``: gives the file's bytes."""

    name: str
    group: Literal["damaged", "hostile", "ambiguous", "valid"]
    expected: Literal["done", "failed"]
    make: Callable[[], bytes]
    words: str
    seen: str = ""


# ---------------------------------------------------------------------------------------------------------- builders


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG file with any header: the rows ``data`` must fit only if it is to be read."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def image() -> Image.Image:
    return Image.fromarray(picture())


@functools.cache
def good_png() -> bytes:
    return encoded(image(), "PNG")


@functools.cache
def good_jpg() -> bytes:
    return encoded(image(), "JPEG", quality=95)


def rgb_tiff(**settings: Any) -> bytes:
    return tiff(picture(), photometric="rgb", **settings)


def flipped_png() -> bytes:
    data = bytearray(good_png())
    data[len(data) // 2] ^= 1
    return bytes(data)


def lzw_garbage() -> bytes:
    return rgb_tiff(compression="lzw", rowsperstrip=H)[:-500] + b"\0" * 500


def _changed_tag(data: bytes, name: str, index: int, change: Callable[[int], int]) -> bytes:
    """The TIFF with one value of a tag changed."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags[name]  # type: ignore[union-attr]
        code = {3: "<H", 4: "<I"}[int(tag.dtype)]
        offset = tag.valueoffset + index * struct.calcsize(code)
        struct.pack_into(code, changed, offset, change(struct.unpack_from(code, changed, offset)[0]))
    return bytes(changed)


def sparse_tiff() -> bytes:
    """A tiled TIFF whose second tile has byte count 0."""
    return _changed_tag(rgb_tiff(tile=(16, 16)), "TileByteCounts", 1, lambda _: 0)


def cut_jpeg_tiff() -> bytes:
    """A TIFF of JPEG tiles, the first of which says it has half its bytes: decoders fill the rest with grey."""
    return _changed_tag(rgb_tiff(tile=(32, 32), compression="jpeg"), "TileByteCounts", 0, lambda count: count // 2)


def half_jpeg_tiff() -> bytes:
    """A TIFF whose only strip is half of a JPEG with an end marker behind it."""
    y, x = np.mgrid[:64, :64]
    whole = encoded(Image.fromarray(((x * 7 + y * 13) % 256).astype(np.uint8)), "JPEG", quality=95)
    return payload_tiff(whole[: len(whole) // 2] + b"\xff\xd9", 7)


def few_scans_jpg() -> bytes:
    """A progressive JPEG whose last two scans are missing, well ended."""
    data = encoded(image(), "JPEG", progressive=True, quality=95)
    starts = [index for index in range(len(data)) if data.startswith(b"\xff\xda", index)]
    return data[: starts[-2]] + b"\xff\xd9"


def short_raw_tiff() -> bytes:
    """An uncompressed TIFF that says it has half its bytes: what follows would be taken for pixels."""
    return _changed_tag(rgb_tiff(rowsperstrip=H), "StripByteCounts", 0, lambda count: count // 2) + b"\7" * H * W * 3


def paged_tiff(*pages: tuple[int, dict[str, Any]], subifds: int = 0) -> bytes:
    """A TIFF of the picture at one ``step``-th of its size, for each page (step, settings of tifffile's writer).

    ``subifds``: so many pages lie below the first one.
    """
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for index, (step, settings) in enumerate(pages):
            below = {"subifds": subifds} if subifds and not index else {}
            kind = {"photometric": "rgb", "metadata": None, **below, **settings}
            pixels = picture()[::step, ::step]
            writer.write(pixels if kind["photometric"] == "rgb" else pixels[..., 0] > 100, **kind)
    return buffer.getvalue()


REDUCED, MASK = {"subfiletype": 1}, {"subfiletype": 4, "photometric": "mask"}


def stack_of_one_page(description: str) -> bytes:
    """Three planes behind the directory of one, as ImageJ writes a stack above 4 GB."""
    return tiff(np.zeros((H, W), np.uint8), metadata=None, description=description) + bytes(2 * H * W)


def metamorph_stack() -> bytes:
    tags = [(33629, 5, 3, (0, 1) * 3, True)]  # a time stamp for each plane
    return tiff(np.zeros((H, W), np.uint8), metadata=None, extratags=tags)


def lying_tiff(width: int, height: int) -> bytes:
    data = bytearray(tiff(picture(1)))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]
        for name, value in (("ImageWidth", width), ("ImageLength", height)):
            offset = tags[name].valueoffset
            data[offset - 6 : offset - 4] = struct.pack("<H", 4)
            data[offset : offset + 4] = struct.pack("<I", value)
    return bytes(data)


def cyclic_tiff(pages: int = 2) -> bytes:
    """The last page's "next page" points at the first."""
    data = bytearray(tiff(np.zeros((pages, H, W), np.uint8), photometric="minisblack", metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        offsets = [page.offset for page in file.pages]  # type: ignore[union-attr]
        entries = struct.unpack_from("<H", data, offsets[-1])[0]
        struct.pack_into("<I", data, offsets[-1] + 2 + 12 * entries, offsets[0])
    return bytes(data)


def plain_tiff(entries: list[tuple[int, int, int, int]], before: bytes) -> bytes:
    """A TIFF with these tags (number, type, count, value), behind ``before``, which begins at byte 8."""
    before += b"\0" * (len(before) % 2)
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(before)) + before + body + b"\0" * 4


def many_tiles_tiff() -> bytes:
    """1 x 1 px that claims 2 ** 20 tiles."""
    offsets = b"\0" * 8 + np.full(2**20, 8, "<u4").tobytes()
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    return plain_tiff([*tags, (322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 2**20, 16), (325, 4, 2**20, 16)], offsets)


def payload_tiff(payload: bytes, compression: int, *, colours: int = 1) -> bytes:
    """A TIFF of 64 x 64 px whose only strip is ``payload``, which may hold something else."""
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, compression), (278, 4, 1, 64)]
    tags += [(262, 3, 1, 2 if colours == 3 else 1), (277, 3, 1, colours), (273, 4, 1, 8), (279, 4, 1, len(payload))]
    return plain_tiff(tags, payload)


def half_tiff(compress: Callable[[bytes], bytes], compression: int) -> bytes:
    """A TIFF whose strip is intact but holds half of the rows."""
    return payload_tiff(compress(bytes(range(64)) * 32), compression)


@functools.cache
def bomb() -> bytes:
    """A gigabyte of zeros, deflated."""
    compressor, block = zlib.compressobj(1), bytes(1 << 24)
    return b"".join([*(compressor.compress(block) for _ in range(64)), compressor.flush()])


def tiny_png(extra: bytes) -> bytes:
    """1 x 1 px with another part before its pixel."""
    return png(1, 1, data=b"\0\0", extra=extra)


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose scans are repeated for ever; each costs a pass over the pixels."""
    data = encoded(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    return data[:first] + data[first:-2] * 100 + data[-2:]


def wide_png(hw: tuple[int, int], bits: int = 1) -> bytes:
    """A blank PNG of any size, black, of a few kilobytes."""
    row = bytes(1 + -(-hw[1] * bits // 8))
    compressor = zlib.compressobj(1)
    data = b"".join([*(compressor.compress(row) for _ in range(hw[0])), compressor.flush()])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", hw[1], hw[0], bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def with_exif_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image(), "JPEG", quality=95, exif=exif)


def turned_png(pixels: np.ndarray, orientation: int) -> bytes:
    """A PNG of any depth, with EXIF data behind its pixels, where it may stand too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = bytes(imagecodecs.png_encode(pixels))
    return data[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]


def saying_bits(pixels: np.ndarray, bits: int) -> bytes:
    """A TIFF whose MaxSampleValue is that of ``bits``."""
    return tiff(pixels, extratags=[(281, 3, 1, 2**bits - 1, True)])


def with_bar(bar: int = 65535) -> np.ndarray:
    """12 bits in 16 with a saturated scale bar and hot pixels."""
    pixels: np.ndarray = picture(1, np.uint16) // 16
    pixels[-2:, 5:34], pixels[3, 4:6] = bar, 40_000
    return pixels


def alpha(values: int) -> Image.Image:
    pixels = picture(4)
    pixels[..., 3] = values
    return Image.fromarray(pixels)


# -------------------------------------------------------------------------------------------------------------- cases

DAMAGED = [
    ("empty", lambda: b"", "empty"),
    ("text", lambda: b"sample 1: 42 cells\n", "not a PNG"),
    ("html", lambda: b"<!DOCTYPE html><html>404</html>", "not a PNG.*a web page"),
    ("heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "this is a HEIC photograph; convert"),
    ("webp", lambda: encoded(image(), "WEBP"), "this is a WebP image; convert"),
    ("png signature only", lambda: good_png()[:8], "cut short"),
    ("png cut in its data", lambda: good_png()[: len(good_png()) // 2], "cut short"),
    ("png without end", lambda: good_png()[:-12], "end marker"),
    ("png flipped bit", flipped_png, "check"),
    ("png too few rows", lambda: png(W, H, data=b"\0" * 10), "damaged|truncated"),
    ("png width 0", lambda: png(0, H), "0 x 40"),
    ("png two headers", lambda: good_png()[:8] + good_png()[33:], "no header"),
    ("jpg cut in its data", lambda: good_jpg()[: len(good_jpg()) // 2], "cut short"),
    ("jpg cut, then an end marker", lambda: good_jpg()[:-200] + b"\xff\xd9", "[Cc]orrupt JPEG"),
    ("jpg progressive without its last scans", few_scans_jpg, "scans that hold its detail"),
    ("jpg without end", lambda: good_jpg()[:-2], "end marker"),
    ("jpg header only", lambda: good_jpg()[:20], "cut short"),
    ("tiff cut", lambda: rgb_tiff()[:-100], "cut short|damaged"),
    ("tiff zlib cut", lambda: rgb_tiff(compression="zlib")[:-100], "cut short|damaged"),
    ("tiff header only", lambda: rgb_tiff()[:8], "damaged|without an image"),
    ("tiff lzw garbage", lzw_garbage, "damaged"),
    ("tiff sparse tile", sparse_tiff, "missing"),
    ("tiff jpeg tile cut", cut_jpeg_tiff, "JPEG parts"),
    ("tiff jpeg tile of half its data", half_jpeg_tiff, "[Cc]orrupt JPEG"),
    ("tiff raw of half its bytes", short_raw_tiff, "bytes; expected"),
    ("tiff zlib of half its rows", lambda: half_tiff(zlib.compress, 8), "damaged"),
    ("tiff lzw of half its rows", lambda: half_tiff(imagecodecs.lzw_encode, 5), "damaged"),
    ("tiff packbits of half its rows", lambda: half_tiff(imagecodecs.packbits_encode, 32773), "damaged"),
    ("tiff zstd of half its rows", lambda: half_tiff(imagecodecs.zstd_encode, 50000), "damaged"),
    ("tiff lzma of half its rows", lambda: half_tiff(lzma.compress, 34925), "damaged"),
]
HOSTILE = [
    ("png header 60k", lambda: png(60_000, 60_000), "`max_pixels`"),
    ("png header 12k without data", lambda: png(12_000, 12_000), "damaged|truncated"),
    ("png 30k blank", lambda: wide_png((30_000, 30_000)), "`max_pixels`"),
    ("png zTXt bomb", lambda: tiny_png(png_chunk(b"zTXt", b"k\0\0" + bomb())), "too large"),
    ("png iCCP bomb", lambda: tiny_png(png_chunk(b"iCCP", b"k\0\0" + bomb())), "too large"),
    ("png of a million parts", lambda: tiny_png(png_chunk(b"tEXt", b"k\0") * 1_000_000), "parts"),
    ("jpg of 65500 px", lambda: good_jpg().replace(struct.pack(">HH", H, W), b"\xff\xdc" * 2, 1), "`max_pixels`"),
    ("jpg of many scans", jpeg_of_many_scans, "scans"),
    ("jpg of a million segments", lambda: b"\xff\xd8" + b"\xff\xe9\0\2" * 1_000_000 + good_jpg()[2:], "segments"),
    ("tiff 400k", lambda: lying_tiff(400_000, 400_000), "`max_pixels`"),
    ("tiff 10k without data", lambda: lying_tiff(10_000, 10_000), "damaged"),
    ("tiff cyclic", lambda: cyclic_tiff(2), "2 planes"),
    ("tiff cyclic on its first page", lambda: cyclic_tiff(pages=1), "circular"),
    ("tiff with a million tiles", many_tiles_tiff, "damaged"),
    ("tiff deflate bomb", lambda: payload_tiff(bomb(), 8), "damaged"),
    (
        "tiff jpeg larger than declared",
        lambda: payload_tiff(encoded(Image.new("L", (8000, 8000)), "JPEG"), 7),
        "8000 x 8000",
    ),
    (
        "tiff jpeg taller than declared",
        lambda: payload_tiff(encoded(Image.new("L", (64, 60_000)), "JPEG"), 7),
        "64 x 60000",
    ),
    ("tiff png inside", lambda: payload_tiff(good_png(), 34933), "compression 34933"),
    ("tiff jpeg 2000 inside", lambda: payload_tiff(b"\0", 34712), "compression 34712"),
    ("tiff webp inside", lambda: payload_tiff(b"\0", 50001, colours=3), "compression 50001"),
    ("eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
]
HARMLESS = [  # what is too much is never unpacked
    ("png data bomb", lambda: png(1, 1)[:33] + png_chunk(b"IDAT", bomb()) + png_chunk(b"IEND", b""), "grey"),
    ("tiff lzma bomb", lambda: payload_tiff(lzma.compress(bytes(1 << 26), preset=0), 34925), "grey"),
]
AMBIGUOUS = [
    ("tiff two planes", lambda: tiff(np.zeros((2, H, W), np.uint8), photometric="minisblack"), "2 planes"),
    ("tiff all pages reduced", lambda: paged_tiff((2, REDUCED), (4, REDUCED)), r"1 of 30 x 20 px 8-bit RGB, marked as"),
    ("tiff only page reduced", lambda: paged_tiff((2, REDUCED)), "without a full-size picture"),
    (
        "tiff reduced copy larger",
        lambda: paged_tiff((2, {}), (1, REDUCED)),
        "2 planes.*60 x 40 px.*marked as a reduced",
    ),
    ("tiff two pictures", lambda: paged_tiff((1, {}), (1, {})), "2 planes.*2 of 60 x 40 px 8-bit RGB"),
    ("tiff two pictures below", lambda: paged_tiff((4, REDUCED), (1, {}), (1, {}), subifds=2), "3 planes"),
    ("tiff imagej stack of one page", lambda: stack_of_one_page("ImageJ=1.54f\nimages=3\nslices=3\n"), "3 planes"),
    ("tiff shaped stack of one page", lambda: stack_of_one_page('{"shape": [3, 40, 60]}'), "3 planes"),
    ("tiff metamorph stack", metamorph_stack, "3 planes"),
    ("tiff float nan", lambda: tiff(np.full((H, W), np.nan, np.float32)), "float32"),
    ("tiff float inf", lambda: tiff(np.full((H, W), np.inf, np.float64)), "float64"),
    ("tiff int16", lambda: tiff(np.zeros((H, W), np.int16)), "int16"),
    ("tiff uint32", lambda: tiff(np.zeros((H, W), np.uint32)), "uint32"),
    (
        "tiff five channels",
        lambda: tiff(np.zeros((H, W, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
        "5 channels",
    ),
    ("tiff ome channels", lambda: tiff(np.zeros((3, H, W), np.uint8), ome=True, metadata={"axes": "CYX"}), "3 planes"),
]
VALID = [
    ("png rgb", good_png, ""),
    ("png 16 bit", lambda: imagecodecs.png_encode(picture(1, np.uint16)), "16-bit"),
    ("png 16 bit rgb", lambda: imagecodecs.png_encode(picture(3, np.uint16)), "16-bit"),
    ("png 16 bit turned", lambda: turned_png(picture(3, np.uint16), 6), "upright"),
    ("png 1 bit", lambda: encoded(Image.fromarray(picture(1) > 100), "PNG"), "1-bit"),
    ("png palette", lambda: encoded(image().quantize(7), "PNG"), "palette"),
    ("png rgba", lambda: encoded(alpha(255), "PNG"), "opaque alpha"),
    ("png rgba clear", lambda: encoded(alpha(7), "PNG"), "composited on white"),
    ("png grey alpha", lambda: encoded(alpha(255).convert("LA"), "PNG"), "grey"),
    ("jpg", good_jpg, ""),
    ("jpg cmyk", lambda: encoded(Image.new("CMYK", (W, H), (255, 0, 0, 0)), "JPEG"), "CMYK"),
    ("jpg turned", lambda: with_exif_orientation(6), "upright"),
    ("jpg progressive", lambda: encoded(image(), "JPEG", progressive=True), ""),
    ("tiff rgb", rgb_tiff, ""),
    ("tiff 12 bits in 16 with a scale bar", lambda: tiff(with_bar()), "give `bit_depth=12`"),
    ("tiff 12 bits in 16 that says so", lambda: saying_bits(with_bar(), 12), "12-bit samples .*60 of 2400 samples"),
    ("tiff picture below", lambda: paged_tiff((4, REDUCED), (1, {}), subifds=1), ""),
    ("tiff preview first", lambda: paged_tiff((4, {}), (1, {})), "a preview was left out .15 x 10 px 8-bit RGB"),
    ("tiff preview behind", lambda: paged_tiff((1, {}), (2, {}), (4, REDUCED)), "a preview was left out .30 x 20 px"),
    ("tiff mask", lambda: paged_tiff((1, {}), (1, MASK)), "composited on white"),
    ("tiff mask not marked", lambda: paged_tiff((1, {}), (1, {**MASK, "subfiletype": 0})), "composited on white"),
    ("tiff bigtiff tiles", lambda: rgb_tiff(tile=(16, 16), bigtiff=True, compression="zlib"), ""),
    ("tiff jpeg strips", lambda: rgb_tiff(compression="jpeg", rowsperstrip=16), ""),
    ("tiff jpeg tiles", lambda: rgb_tiff(compression="jpeg", tile=(32, 32)), ""),
    ("tiff 1 bit", lambda: encoded(Image.fromarray(picture(1) > 100), "TIFF"), "1-bit"),
    ("tiff 1 bit fax", lambda: encoded(Image.fromarray(picture(1) > 100), "TIFF", compression="group4"), "1-bit"),
    ("1 x 1", lambda: encoded(Image.new("RGB", (1, 1), (240, 235, 245)), "PNG"), ""),
    ("13 x 5000", lambda: encoded(Image.new("RGB", (5000, 13), (200, 100, 50)), "PNG"), ""),
    ("5000 x 13", lambda: encoded(Image.new("RGB", (13, 5000), (200, 100, 50)), "TIFF"), ""),
]
SEEN = [  # files that are read without a remark, and what is said of what they show
    ("eyepiece", field_pictures.eyepiece, "the field of view is 4.%"),
    ("oval eyepiece", field_pictures.oval, "the field of view is 5.%"),
    ("eyepiece with glare", field_pictures.glare, "the field of view is 4.%"),
    ("rounded grey frame", field_pictures.rounded_frame, "the field of view is 5.%"),
    ("white letterbox", field_pictures.letterbox, "the field of view is 7.%"),
    ("turned photograph", field_pictures.turned, "the field of view is 9.%"),
    ("information band", field_pictures.band, "the field of view is 90%"),
    ("pointer", field_pictures.pointer, "an eyepiece pointer, reaches into the field"),
    ("scale bar", field_pictures.scale_bar, "1 object is black"),
    ("black plate in a corner", field_pictures.plate, "1 object is black"),
    ("fluorescence", field_pictures.fluorescence, "dark field, fluorescence or a negative"),
    ("dark field", field_pictures.dark_field, "dark field, fluorescence or a negative"),
]

BY_REGION = {"tiff 400k": "strips or tiles of the TIFF are missing"}
"""Of the hostile ones, what a run says that reads a TIFF of more than ``max_pixels`` by region."""

CASES = [
    *(Case(name, "damaged", "failed", make, words) for name, make, words in DAMAGED),
    *(Case(name, "hostile", "failed", make, words, BY_REGION.get(name, "")) for name, make, words in HOSTILE),
    *(Case(name, "hostile", "done", make, words) for name, make, words in HARMLESS),
    *(Case(name, "ambiguous", "failed", make, words) for name, make, words in AMBIGUOUS),
    *(Case(name, "valid", "done", make, words) for name, make, words in VALID),
    *(Case(name, "valid", "done", make, "", seen) for name, make, seen in SEEN),
]


def of_groups(*groups: str) -> dict[str, Case]:
    """Cases of these groups by name."""
    return {case.name: case for case in CASES if case.group in groups}
