"""Reading images: what is right, what is refused. Every file is built here."""

from __future__ import annotations

import functools
import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_images import H, W, encoded, picture, save, tiff, write
from PIL import Image

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images import (
    MAX_PIXELS,
    read_image,
    read_labels,
)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG file with any header: the rows ``data`` must fit only if it is to be read."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


# --- valid


def test_rgb_png_is_read_as_it_is(tmp_path: Path) -> None:
    loaded = read_image(save(tmp_path / "a.png", Image.fromarray(picture())))
    assert np.array_equal(loaded.pixels_hwc, picture())
    assert loaded.pixels_hwc.flags.c_contiguous
    assert loaded.notes == ()


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_content_decides_not_the_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, tiff(picture(), photometric="rgb"))
    assert np.array_equal(read_image(path).pixels_hwc, picture())


TIFFS: dict[str, dict[str, Any]] = {
    "strips": {},
    "one row a strip": {"rowsperstrip": 1},
    "zlib": {"compression": "zlib", "rowsperstrip": 7},
    "zlib predictor": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "packbits": {"compression": "packbits"},
    "zstd": {"compression": "zstd"},
    "tiles": {"tile": (16, 32)},
    "bigtiff tiles": {"tile": (16, 16), "bigtiff": True, "compression": "zlib"},
    "planar": {"planarconfig": "separate"},
    "big endian": {"byteorder": ">"},
}


@pytest.mark.parametrize("settings", TIFFS.values(), ids=TIFFS)
def test_tiff_layouts(tmp_path: Path, settings: dict[str, Any]) -> None:
    pixels = picture().transpose(2, 0, 1) if "planarconfig" in settings else picture()
    path = write(tmp_path / "a.tif", tiff(pixels, photometric="rgb", **settings))
    assert np.array_equal(read_image(path).pixels_hwc, picture())


def test_jpeg_in_tiff(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tiff(picture(), photometric="rgb", compression="jpeg"))
    assert np.abs(read_image(path).pixels_hwc.astype(int) - picture()).mean() < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_and_rgb_are_scaled_by_the_full_range(tmp_path: Path, kind: str) -> None:
    import imagecodecs

    for channels in (1, 3):
        pixels = picture(channels, np.uint16)
        data = imagecodecs.png_encode(pixels) if kind == "PNG" else tiff(pixels)
        loaded = read_image(write(tmp_path / "a", data))
        expected = (pixels // 257).astype(np.uint8)
        assert np.array_equal(loaded.pixels_hwc, expected if channels == 3 else np.dstack([expected] * 3))
        assert "16-bit samples scaled to 8 bit" in loaded.notes


def test_16_bit_scale_does_not_depend_on_the_pixels(tmp_path: Path) -> None:
    dark = tiff(np.full((4, 4), 1000, np.uint16))
    loaded = read_image(write(tmp_path / "a.tif", dark))
    assert (loaded.pixels_hwc == 1000 // 257).all()
    assert any("--bit-depth" in note for note in loaded.notes)
    loaded = read_image(tmp_path / "a.tif", bit_depth=10)
    assert (loaded.pixels_hwc == 1000 * 255 // 1023).all()
    assert not any("--bit-depth" in note for note in loaded.notes)


def test_bit_depth_too_small_for_the_pixels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tiff(np.full((4, 4), 5000, np.uint16)))
    with pytest.raises(DataError, match=r"5000.*12 bit"):
        read_image(path, bit_depth=12)
    with pytest.raises(UsageError, match="9 to 16"):
        read_image(path, bit_depth=8)


def test_16_bit_png_with_alpha(tmp_path: Path) -> None:
    import imagecodecs

    pixels = picture(4, np.uint16)
    loaded = read_image(write(tmp_path / "a.png", imagecodecs.png_encode(pixels)))
    alpha = (pixels[..., 3:] // 257).astype(int)
    expected = ((pixels[..., :3] // 257) * alpha + 255 * (255 - alpha) + 127) // 255
    assert np.array_equal(loaded.pixels_hwc, expected)
    grey = np.dstack([pixels[..., 0], np.full((H, W), 65535, np.uint16)])
    loaded = read_image(write(tmp_path / "b.png", imagecodecs.png_encode(grey)))
    assert np.array_equal(loaded.pixels_hwc[..., 1], pixels[..., 0] // 257)


def test_grey_one_bit_and_palette(tmp_path: Path) -> None:
    grey = Image.fromarray(picture(1))
    assert np.array_equal(read_image(save(tmp_path / "g.png", grey)).pixels_hwc, np.dstack([picture(1)] * 3))
    bits = picture(1) > 100
    for name in ("b.png", "b.tif"):
        loaded = read_image(save(tmp_path / name, Image.fromarray(bits)))
        assert np.array_equal(loaded.pixels_hwc[..., 0], bits * np.uint8(255)), name
    palette = Image.fromarray(picture()).quantize(7)
    for name in ("p.png", "p.tif"):
        loaded = read_image(save(tmp_path / name, palette))
        assert np.array_equal(loaded.pixels_hwc, np.asarray(palette.convert("RGB"))), name
        assert "colour palette converted to RGB" in loaded.notes


def test_white_is_zero_tiff_is_inverted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tiff(picture(1), photometric="miniswhite"))
    loaded = read_image(path)
    assert np.array_equal(loaded.pixels_hwc[..., 0], 255 - picture(1))
    assert any("inverted" in note for note in loaded.notes)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_alpha(tmp_path: Path, suffix: str) -> None:
    pixels = picture(4)
    pixels[..., 3] = 255
    opaque = read_image(save(tmp_path / f"o.{suffix}", Image.fromarray(pixels)))
    assert np.array_equal(opaque.pixels_hwc, pixels[..., :3])
    assert opaque.notes == ("opaque alpha channel dropped",)
    pixels[:20, :, 3] = 0
    clear = read_image(save(tmp_path / f"c.{suffix}", Image.fromarray(pixels)))
    assert (clear.pixels_hwc[:20] == 255).all()
    assert np.array_equal(clear.pixels_hwc[20:], pixels[20:, :, :3])
    assert "transparent pixels composited on white" in clear.notes


def test_grey_with_alpha_and_transparent_colour(tmp_path: Path) -> None:
    pixels = picture(2)
    pixels[..., 1] = 255
    loaded = read_image(save(tmp_path / "la.png", Image.fromarray(pixels, mode="LA")))
    assert np.array_equal(loaded.pixels_hwc[..., 2], pixels[..., 0])
    palette = Image.fromarray(picture()).quantize(7)
    loaded = read_image(save(tmp_path / "p.png", palette, transparency=0))
    assert (loaded.pixels_hwc[np.asarray(palette) == 0] == 255).all()
    assert np.array_equal(
        loaded.pixels_hwc[np.asarray(palette) != 0], np.asarray(palette.convert("RGB"))[np.asarray(palette) != 0]
    )


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (W, H), (255, 0, 0, 0)))
    loaded = read_image(path)
    assert np.abs(loaded.pixels_hwc.astype(int) - (0, 255, 255)).max() < 8
    assert any("CMYK" in note for note in loaded.notes)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", image, exif=exif)
    loaded = read_image(path)
    upright = image.copy()
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright))
    assert loaded.pixels_hwc.shape == expected.shape
    assert np.abs(loaded.pixels_hwc.astype(int) - expected).mean() < 5
    assert any("upright" in note for note in loaded.notes)


def test_jpeg_with_a_film_behind_it_is_complete(tmp_path: Path) -> None:
    """Phones append the seconds before the shot; Pillow's own preview in EXIF has an end marker too."""
    exif = Image.Exif()
    exif[0x010F] = "phone"
    preview = encoded(Image.fromarray(picture()), "JPEG")
    for settings in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = encoded(Image.fromarray(picture()), "JPEG", quality=95, exif=exif, comment=preview, **settings)
        expected = read_image(write(tmp_path / "a.jpg", data)).pixels_hwc
        film = np.arange(200_000, dtype=np.uint32).tobytes().replace(b"\xff\xd9", b"\0\0")
        assert np.array_equal(read_image(write(tmp_path / "b.jpg", data + film)).pixels_hwc, expected)
        with pytest.raises(DataError, match="cut short"):
            read_image(write(tmp_path / "c.jpg", data[:-2]))


@pytest.mark.parametrize("hw", [(1, 1), (13, 5000), (5000, 13)])
def test_odd_sizes(tmp_path: Path, hw: tuple[int, int]) -> None:
    for suffix in ("png", "jpg", "tif"):
        path = save(tmp_path / f"a.{suffix}", Image.new("RGB", hw[::-1], (200, 100, 50)))
        assert read_image(path).pixels_hwc.shape == (*hw, 3)


def test_more_than_pillows_own_limit_is_read_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / "a.png", Image.fromarray(picture()))
    assert read_image(path).pixels_hwc.shape == (H, W, 3)


# --- refused


@functools.cache
def damaged() -> dict[str, tuple[bytes, str]]:
    """Name -> bytes, words of the reason."""
    image = Image.fromarray(picture())
    ok_png, ok_jpg = encoded(image, "PNG"), encoded(image, "JPEG", quality=95)
    raw, deflated = tiff(picture(), photometric="rgb"), tiff(picture(), photometric="rgb", compression="zlib")
    flipped = bytearray(ok_png)
    flipped[len(ok_png) // 2] ^= 1
    lzw = bytearray(tiff(picture(), photometric="rgb", compression="lzw", rowsperstrip=H))
    return {
        "empty": (b"", "empty"),
        "text": (b"sample 1: 42 cells\n", "not a PNG"),
        "html": (b"<!DOCTYPE html><html>404</html>", "not a PNG"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
        "png signature only": (ok_png[:8], "cut short"),
        "png cut in its data": (ok_png[: len(ok_png) // 2], "cut short"),
        "png without end": (ok_png[:-12], "end marker"),
        "png flipped bit": (bytes(flipped), "checksum"),
        "png too few rows": (png(W, H, data=b"\0" * 10), "damaged|truncated"),
        "png width 0": (png(0, H), "0 x 40"),
        "png two headers": (ok_png[:8] + ok_png[33:], "no header"),
        "png zTXt bomb": (
            png(1, 1, data=b"\0\0", extra=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 8_000_000))),
            "damaged",
        ),
        "jpg cut in its data": (ok_jpg[: len(ok_jpg) // 2], "cut short"),
        "jpg cut, then an end marker": (ok_jpg[: len(ok_jpg) // 2] + b"\xff\xd9", "damaged|missing"),
        "jpg without end": (ok_jpg[:-2], "end marker"),
        "jpg header only": (ok_jpg[:20], "cut short"),
        "tiff cut": (raw[:-100], "cut short|damaged"),
        "tiff zlib cut": (deflated[:-100], "cut short|damaged"),
        "tiff header only": (raw[:8], "damaged|without an image"),
        "tiff lzw garbage": (bytes(lzw[:-500]) + b"\0" * 500, "damaged"),
        "tiff sparse tile": (sparse_tiff(), "missing"),
        "tiff jpeg tile cut": (cut_jpeg_tiff(), "JPEG parts"),
        "tiff two planes": (tiff(np.zeros((2, H, W), np.uint8), photometric="minisblack"), "2 planes"),
        "tiff float": (tiff(np.full((H, W), np.nan, np.float32)), "float32"),
        "tiff int16": (tiff(np.zeros((H, W), np.int16)), "int16"),
        "tiff uint32": (tiff(np.zeros((H, W), np.uint32)), "uint32"),
        "tiff five channels": (
            tiff(np.zeros((H, W, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
            "5 channels",
        ),
        "tiff ome channels": (tiff(np.zeros((3, H, W), np.uint8), ome=True, metadata={"axes": "CYX"}), "3 planes"),
    }


def sparse_tiff() -> bytes:
    """A tiled TIFF whose second tile has byte count 0."""
    data = bytearray(tiff(picture(), photometric="rgb", tile=(16, 16)))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tag = file.pages[0].tags["TileByteCounts"]  # type: ignore[union-attr]
        size = struct.calcsize({3: "H", 4: "I"}[int(tag.dtype)])
        data[tag.valueoffset + size : tag.valueoffset + 2 * size] = b"\0" * size
    return bytes(data)


def cut_jpeg_tiff() -> bytes:
    """A TIFF of JPEG tiles, the first of which says it has half its bytes: decoders fill the rest with grey."""
    data = bytearray(tiff(picture(), photometric="rgb", tile=(32, 32), compression="jpeg"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        page: Any = file.pages[0]
        tag = page.tags["TileByteCounts"]
        code = {3: "<H", 4: "<I"}[int(tag.dtype)]
        struct.pack_into(code, data, tag.valueoffset, page.databytecounts[0] // 2)
    return bytes(data)


@pytest.mark.parametrize("case", damaged())
def test_damaged_and_ambiguous_files_are_refused(tmp_path: Path, case: str) -> None:
    data, words = damaged()[case]
    path = write(tmp_path / "name.png", data)
    for read in (read_image, read_labels):
        if read is read_labels and case in ("tiff int16", "tiff uint32"):
            continue
        with pytest.raises(DataError, match=words if read is read_image else ".") as caught:
            read(path)
        assert str(caught.value).startswith(str(path))


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


def many_tiles_tiff() -> bytes:
    """1 x 1 px that claims 2 ** 20 tiles."""
    offsets = np.full(2**20, 8, "<u4").tobytes()
    entries = [
        (256, 3, 1, 1),
        (257, 3, 1, 1),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 3, 1, 16),
        (323, 3, 1, 16),
        (324, 4, 2**20, 16),
        (325, 4, 2**20, 16),
    ]
    ifd = 16 + len(offsets)
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", ifd) + b"\0" * 8 + offsets + body + b"\0" * 4


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png header 60k": lambda: png(60_000, 60_000),
    "png header 12k without data": lambda: png(12_000, 12_000),
    "tiff 400k": lambda: lying_tiff(400_000, 400_000),
    "tiff 10k without data": lambda: lying_tiff(10_000, 10_000),
    "tiff cyclic": lambda: cyclic_tiff(2),
    "tiff cyclic on its first page": lambda: cyclic_tiff(pages=1),
    "tiff with a million tiles": many_tiles_tiff,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_quickly(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "x.png", HOSTILE[case]())
    start = time.monotonic()
    with pytest.raises(DataError):
        read_image(path)
    assert time.monotonic() - start < 5


def test_pixel_limit_names_the_option(tmp_path: Path) -> None:
    assert MAX_PIXELS == 200_000_000
    path = write(tmp_path / "x.png", png(20_000, 20_000))
    with pytest.raises(DataError, match=r"20000 x 20000.*--max-pixels"):
        read_image(path)
    for data in (encoded(Image.fromarray(picture()), "JPEG"), tiff(picture(), photometric="rgb")):
        with pytest.raises(DataError, match="--max-pixels"):
            read_image(write(tmp_path / "y", data), max_pixels=H * W - 1)
        assert read_image(tmp_path / "y", max_pixels=H * W).pixels_hwc.shape == (H, W, 3)
    with pytest.raises(UsageError, match="max_pixels"):
        read_image(path, max_pixels=0)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, words in {
        "fifo.png": "regular file",
        "folder.png": "regular file|directory",
        "dangling.png": "link",
        "loop.png": "link",
        "vanished.png": "No such file",
    }.items():
        with pytest.raises(DataError, match=words):
            read_image(tmp_path / name)


def test_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(picture()))
    real = os.fstat

    def fstat(descriptor: int) -> Any:
        if os.lseek(descriptor, 0, os.SEEK_CUR) > 0:  # it was read
            path.write_bytes(b"something else")
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(DataError, match="changed"):
        read_image(path)
