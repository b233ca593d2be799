"""Reading images: what is right, what is refused. Every file is built here."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from corpus import MASK, REDUCED, of_groups, paged_tiff, png, png_chunk, turned_png
from made_images import H, W, encoded, picture, save, tiff, write
from PIL import Image, PngImagePlugin

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images.decode import declared_pixels_in, decode
from cellseg_deploy.images.header import has_header
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import MAX_PIXELS, declared_pixels, read_image, read_labels

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


PICTURES = {
    "below the thumbnail": paged_tiff((4, REDUCED), (1, {}), subifds=1),
    "below the second page": paged_tiff((4, REDUCED), (2, REDUCED), (1, {}), (4, REDUCED)),
    "behind a preview": paged_tiff((4, {}), (1, {})),
    "before a preview": paged_tiff((1, {}), (2, {}), (4, {})),
}


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_the_picture_of_several_pages(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "a.tif", data)
    assert np.array_equal(read_image(path).pixels_hwc, picture())
    assert declared_pixels(path) == declared_pixels_in(path, path.read_bytes()) == H * W
    assert has_header(path)


def test_the_transparency_mask_of_a_tiff_is_its_alpha(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", paged_tiff((1, {}), (1, MASK)))
    inside = picture()[..., :1] > 100
    assert np.array_equal(read_image(path).pixels_hwc, np.where(inside, picture(), 255))


def test_orientation_and_resolution_of_a_picture_below_the_thumbnail(tmp_path: Path) -> None:
    """The thumbnail's orientation holds, its resolution does not."""
    turned = {**REDUCED, "extratags": [(274, 3, 1, 3, True)], "resolution": (10_000, 10_000)}
    below = {"resolution": (100_000, 100_000), "resolutionunit": "CENTIMETER"}
    loaded = read_image(write(tmp_path / "a.tif", paged_tiff((4, turned), (1, below), subifds=1)))
    assert np.array_equal(loaded.pixels_hwc, picture()[::-1, ::-1])
    assert loaded.pixel_size.um == pytest.approx(0.1)


def test_jpeg_in_tiff(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tiff(picture(), photometric="rgb", compression="jpeg"))
    assert np.abs(read_image(path).pixels_hwc.astype(int) - picture()).mean() < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_and_rgb_are_scaled_by_the_full_range(tmp_path: Path, kind: str) -> None:
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
    assert any("`bit_depth" in note for note in loaded.notes)
    loaded = read_image(tmp_path / "a.tif", ReadOptions(bit_depth=10))
    assert (loaded.pixels_hwc == 1000 * 255 // 1023).all()
    assert not any("`bit_depth" in note for note in loaded.notes)


def test_16_bit_png_with_alpha(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_associated_alpha_is_the_same_picture(tmp_path: Path, dtype: type) -> None:
    """TIFF 6.0, tag 338: 1 is colour that was multiplied by alpha, 2 colour that was not."""
    full = int(np.iinfo(dtype).max)
    rng = np.random.default_rng(1)
    colour, alpha = rng.integers(0, full + 1, (8, 9, 3)), rng.integers(full // 2, full + 1, (8, 9, 1))
    alpha[0, 0] = 0
    for name, stored, kind in (("plain", colour, "unassalpha"), ("multiplied", colour * alpha // full, "assocalpha")):
        pixels = np.concatenate([stored, alpha], axis=2).astype(dtype)
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="rgb", extrasamples=[kind])
    plain, multiplied = (
        read_image(tmp_path / f"{name}.tif").pixels_hwc.astype(int) for name in ("plain", "multiplied")
    )
    assert np.abs(plain - multiplied).max() <= 2
    assert plain[0, 0].tolist() == [255, 255, 255]


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


JPEGS: dict[str, dict[str, Any]] = {
    **{name: {"subsampling": number} for number, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "low quality": {"quality": 20},
    "as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("settings", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("hw", [(1, 1), (9, 7), (H, W)])
def test_jpeg_is_read_as_pillow_reads_it(
    tmp_path: Path, mode: str, settings: dict[str, Any], hw: tuple[int, int]
) -> None:
    image = Image.fromarray(picture()[: hw[0], : hw[1]]).convert(mode)
    path = save(tmp_path / "a.jpg", image, **{"quality": 95, **settings} if mode == "RGB" else {})
    with Image.open(path) as by_pillow:
        expected = np.asarray(by_pillow)
    assert np.array_equal(decode(path, MAX_PIXELS).samples, expected)


@pytest.mark.real
def test_jpeg_photographs_are_read_as_pillow_reads_them(real_data: Path) -> None:
    paths = sorted((real_data / "bbbc041seg").rglob("*.jpg"))[:10]
    assert paths
    for path in paths:
        with Image.open(path) as by_pillow:
            assert np.array_equal(decode(path, MAX_PIXELS).samples, np.asarray(by_pillow))


def test_jpeg_of_an_unusual_sampling(tmp_path: Path) -> None:
    data = bytearray(encoded(Image.fromarray(picture()[:32, :32]), "JPEG", subsampling=0))
    factors = data.index(b"\xff\xc0") + 11
    assert data[factors : factors + 9 : 3] == b"\x11\x11\x11"
    data[factors : factors + 9 : 3] = b"\x12\x12\x12"  # as many blocks in another order
    path = write(tmp_path / "a.jpg", bytes(data))
    with Image.open(path) as by_pillow:
        assert np.array_equal(decode(path, MAX_PIXELS).samples, np.asarray(by_pillow))


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_jpeg_cut_anywhere_and_ended_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    data = encoded(Image.fromarray(picture()), "JPEG", quality=95, **settings)
    for end in range(data.index(b"\xff\xda"), len(data) - 20, 40):
        path = write(tmp_path / "a.jpg", data[:end] + b"\xff\xd9")
        with pytest.raises(DataError, match=r"cut short|damaged"):
            read_image(path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_plain_png_is_read_as_pillow_reads_it(tmp_path: Path, mode: str) -> None:
    """Plain ones take a shorter way; a transparent colour, EXIF or XMP data need the long one."""
    channels = np.random.default_rng(1).integers(0, 256, (H, W, len(mode)), np.uint8)
    image = Image.fromarray(channels.squeeze(), mode)
    decoded = decode(save(tmp_path / "plain.png", image), 10**6)
    samples = decoded.samples if decoded.alpha is None else np.dstack([decoded.samples, decoded.alpha])
    np.testing.assert_array_equal(samples.squeeze(), np.asarray(image))
    for name, part in ("exif", Image.Exif()), ("pnginfo", xmp := PngImagePlugin.PngInfo()):
        if part is xmp:
            xmp.add_text("Raw profile type exif", "turned")
        else:
            part[0x0112] = 1
        again = decode(save(tmp_path / f"{name}.png", image, **{name: part}), 10**6)
        np.testing.assert_array_equal(again.samples, decoded.samples)


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


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_orientation_of_a_png_is_applied_at_any_depth(tmp_path: Path, orientation: int, channels: int) -> None:
    pixels = picture(channels, np.uint8)
    as_8 = read_image(write(tmp_path / "8.png", turned_png(pixels, orientation)))
    as_16 = read_image(write(tmp_path / "16.png", turned_png(pixels * np.uint16(257), orientation)))
    np.testing.assert_array_equal(as_16.pixels_hwc, as_8.pixels_hwc)
    note = [note for note in as_8.notes if f"orientation tag {orientation}" in note]
    assert len(note) == 1
    assert note[0] in as_16.notes


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["exif as text", "xmp"])
def test_orientation_that_a_png_states_as_text(tmp_path: Path, bits: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    text = {
        "exif as text": b"zTXtRaw profile type exif\0\0"
        + zlib.compress(b"\nexif\n  1\n" + exif.tobytes().hex().encode()),
        "xmp": b'iTXtXML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>',
    }[kind]
    data = turned_png(picture(3, np.uint16 if bits == 16 else np.uint8), 1)
    at = data.index(b"IDAT") - 4
    data = data[: data.index(b"eXIf") - 4] + data[-12:]
    loaded = read_image(write(tmp_path / "a.png", data[:at] + png_chunk(text[:4], text[4:]) + data[at:]))
    assert loaded.pixels_hwc.shape == (W, H, 3)
    assert any("orientation tag 6" in note for note in loaded.notes)


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


REFUSED = of_groups("damaged", "ambiguous")
LABELS = ("tiff int16", "tiff uint32")  # label images have such values


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_and_ambiguous_files_are_refused(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "name.png", REFUSED[case].make())
    for read in (read_image, read_labels):
        if read is read_labels and case in LABELS:
            continue
        with pytest.raises(DataError, match=REFUSED[case].words if read is read_image else ".") as caught:
            read(path)
        assert str(caught.value).startswith(str(path))


def test_pixel_limit_names_the_option(tmp_path: Path) -> None:
    assert MAX_PIXELS == 200_000_000
    path = write(tmp_path / "x.png", png(20_000, 20_000))
    with pytest.raises(DataError, match=r"20000 x 20000.*`max_pixels`"):
        read_image(path)
    for data in (encoded(Image.fromarray(picture()), "JPEG"), tiff(picture(), photometric="rgb")):
        with pytest.raises(DataError, match="`max_pixels`"):
            read_image(write(tmp_path / "y", data), ReadOptions(max_pixels=H * W - 1))
        assert read_image(tmp_path / "y", ReadOptions(max_pixels=H * W)).pixels_hwc.shape == (H, W, 3)
    with pytest.raises(UsageError, match="max_pixels"):
        read_image(path, ReadOptions(max_pixels=0))


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
