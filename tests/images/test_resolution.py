"""Pixel sizes that files name: as other programs write them, and as they are when damaged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_images import encoded, picture, tiff, write
from PIL import Image

from cellseg_deploy.images.read import read_image
from cellseg_deploy.images.resolution import Resolution, of_jpeg

RGB = Image.fromarray(picture())
DPI_300 = pytest.approx(25_400 / 300, rel=1e-3)


def tags(tmp_path: Path, data: bytes) -> list[tuple[str, float, float]]:
    return [(tag.source, *tag.um_per_px) for tag in read_image(write(tmp_path / "image", data)).resolution]


def png_chunk(x: int, y: int, unit: int) -> bytes:
    body = b"pHYs" + struct.pack(">IIB", x, y, unit)
    return struct.pack(">I", 9) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("bits", [8, 16])
def test_png(tmp_path: Path, bits: int) -> None:
    image = RGB if bits == 8 else Image.fromarray(picture(1, np.uint16))
    assert tags(tmp_path, encoded(image, "PNG", dpi=(300, 150))) == [("PNG", DPI_300, pytest.approx(169.3, abs=0.1))]
    assert tags(tmp_path, encoded(image, "PNG")) == []


@pytest.mark.parametrize(
    ("chunk", "found"),
    [
        (png_chunk(10_000_000, 10_000_000, 1), [("PNG", 0.1, 0.1)]),
        (png_chunk(3, 4, 0), []),  # a shape of pixels, no size
        (png_chunk(0, 0, 1), []),
    ],
)
def test_png_in_metres(tmp_path: Path, chunk: bytes, found: list[tuple[str, float, float]]) -> None:
    plain = encoded(RGB, "PNG")
    assert tags(tmp_path, plain[:33] + chunk + plain[33:]) == found  # after the header


def test_jpeg(tmp_path: Path) -> None:
    assert tags(tmp_path, encoded(RGB, "JPEG", dpi=(300, 300))) == [("JPEG", DPI_300, DPI_300)]
    assert tags(tmp_path, encoded(RGB, "JPEG")) == []  # Pillow itself would say 72 dpi where there is only EXIF
    exif = Image.Exif()
    exif[282], exif[283], exif[296] = 100_000.0, 50_000.0, 3
    assert tags(tmp_path, encoded(RGB, "JPEG", exif=exif)) == [("EXIF", pytest.approx(0.1), pytest.approx(0.2))]
    del exif[296]  # then it is the inch
    assert tags(tmp_path, encoded(RGB, "JPEG", exif=exif)) == [("EXIF", pytest.approx(0.254), pytest.approx(0.508))]
    exif[296] = 1
    assert tags(tmp_path, encoded(RGB, "JPEG", exif=exif)) == []


@pytest.mark.parametrize(("unit", "um"), [("INCH", 25.4), ("CENTIMETER", 10.0), ("NONE", None)])
def test_tiff(tmp_path: Path, unit: str, um: float | None) -> None:
    data = tiff(picture(), resolution=(1000, 1000), resolutionunit=unit)
    assert tags(tmp_path, data) == ([] if um is None else [("TIFF", pytest.approx(um), pytest.approx(um))])


@pytest.mark.parametrize(
    ("unit", "um"), [("um", 0.1), ("micron", 0.1), ("\\u00B5m", 0.1), ("mm", 100.0), ("pixel", None)]
)
def test_imagej(tmp_path: Path, unit: str, um: float | None) -> None:
    data = tiff(picture(), imagej=True, resolution=(10, 10), metadata={"unit": unit})
    assert tags(tmp_path, data) == ([] if um is None else [("ImageJ", pytest.approx(um), pytest.approx(um))])


@pytest.mark.parametrize(("unit", "factor"), [("µm", 1.0), ("nm", 1e-3), (None, 1.0), ("furlong", None)])
def test_ome_comes_first(tmp_path: Path, unit: str | None, factor: float | None) -> None:
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    settings: dict[str, Any] = {"metadata": {"axes": "YXS", "PhysicalSizeX": 0.065, "PhysicalSizeY": 0.07, **units}}
    data = tiff(picture(), ome=True, resolution=(72, 72), resolutionunit="INCH", **settings)
    found = tags(tmp_path, data)
    assert found[-1] == ("TIFF", pytest.approx(352.8, abs=0.1), pytest.approx(352.8, abs=0.1))
    expected = [] if factor is None else [("OME", pytest.approx(0.065 * factor), pytest.approx(0.07 * factor))]
    assert found[:-1] == expected


def test_damaged_tags_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    assert tags(tmp_path, tiff(picture(), resolution=(0, 0), resolutionunit="INCH")) == []

    class Odd:
        info = {"jfif_unit": 1, "jfif_density": ("what", None)}  # noqa: RUF012

        def __init__(self, *density: Any) -> None:
            self.density = density

        def getexif(self) -> dict[int, Any]:
            return {282: self.density[0], 283: self.density[1], 296: 2}

    for density in (((1, 0), b""), (-300, -300), ((), "300 dpi"), (float("nan"), 300), (float("inf"), 300)):
        assert of_jpeg(Odd(*density)) == ()


def test_said_in_words() -> None:
    assert str(Resolution("OME", (0.065, 0.065))) == "OME 0.065 µm/px"
    assert str(Resolution("OME", (0.065, 0.07))) == "OME 0.065 x 0.07 µm/px"
    screen = Resolution("JPEG", (25_400 / 72, 25_400 / 72))
    assert (str(screen), screen.is_of_print) == ("JPEG 72 dpi", True)
    assert not Resolution("TIFF", (4.9, 4.9)).is_of_print
