"""How many bits a camera used: what the file says, what the user says, and the warning where nobody says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from corpus import png_chunk, with_bar
from made_images import picture, tiff, write

from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import read_image


def test_white_is_zero_is_inverted_within_the_bits_that_are_used(tmp_path: Path) -> None:
    """A black square on white, 12 bits in 16, white stored as 0."""
    stored = np.zeros((40, 50), np.uint16)
    stored[10:20, 10:20] = 4095
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    image = read_image(tmp_path / "a.tif", ReadOptions(bit_depth=12))
    assert (image.pixels_hwc[10:20, 10:20] == 0).all()
    assert (image.pixels_hwc[:10] == 255).all()
    assert not any("clipped" in note for note in image.notes)


def test_what_lies_above_the_given_depth_is_clipped_and_counted(tmp_path: Path) -> None:
    loaded = read_image(write(tmp_path / "a.tif", tiff(with_bar())), ReadOptions(bit_depth=12))
    assert np.array_equal(loaded.pixels_hwc[..., 0], np.minimum(with_bar(), 4095).astype(int) * 255 // 4095)
    note = next(note for note in loaded.notes if "clipped" in note)
    assert note.startswith(
        "60 of 2400 samples (0.025 of all) are larger than 4095, the largest of 12 bits (`bit_depth`)"
    )
    assert kind_of(note) == "bit depth"
    with pytest.raises(UsageError, match="9 to 16"):
        read_image(tmp_path / "a.tif", ReadOptions(bit_depth=8))


def png_with_sbit(pixels: np.ndarray, content: bytes) -> bytes:
    data = bytes(imagecodecs.png_encode(pixels))
    return data[:33] + png_chunk(b"sBIT", content) + data[33:]


def sample_limit(value: int) -> dict[str, Any]:
    return {"extratags": [(281, 3, 1, value, True)]}


OME_12 = (
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels SizeX="60" SizeY="40" SizeC="1" '
    'SizeZ="1" SizeT="1" Type="uint16" DimensionOrder="XYZCT" SignificantBits="12"><TiffData/></Pixels></Image></OME>'
)
SAY_12 = {
    "OME SignificantBits": lambda: tiff(with_bar(), description=OME_12, metadata=None),
    "TIFF MaxSampleValue": lambda: tiff(with_bar(), **sample_limit(4095)),
    "PNG sBIT": lambda: png_with_sbit(with_bar(), b"\x0c"),
}


@pytest.mark.parametrize("source", SAY_12)
def test_a_file_that_says_its_bits_is_scaled_by_them(tmp_path: Path, source: str) -> None:
    path = write(tmp_path / "a", SAY_12[source]())
    loaded = read_image(path)
    assert np.array_equal(loaded.pixels_hwc[..., 0], np.minimum(with_bar(), 4095).astype(int) * 255 // 4095)
    assert f"12-bit samples ({source}) scaled to 8 bit" in loaded.notes
    assert [note for note in loaded.notes if kind_of(note) == "bit depth" and "were clipped" not in note] == []
    assert np.array_equal(read_image(path, ReadOptions(bit_depth=16)).pixels_hwc[..., 0], with_bar() // 257)


@pytest.mark.parametrize("scaled", ["shifted", "multiplied", "repeated"])
def test_a_png_whose_samples_are_scaled_as_the_standard_asks(tmp_path: Path, scaled: str) -> None:
    values = picture(1, np.uint16) // 16
    pixels = {
        "shifted": values << 4,
        "multiplied": np.rint(values * (65535 / 4095)),
        "repeated": values << 4 | values >> 8,
    }
    data = png_with_sbit(pixels[scaled].astype(np.uint16), b"\x0c")
    loaded = read_image(write(tmp_path / "a.png", data))
    assert np.array_equal(loaded.pixels_hwc[..., 0], pixels[scaled].astype(int) // 257)
    assert "16-bit samples scaled to 8 bit" in loaded.notes


SAY_NOTHING = {
    "nothing": lambda: tiff(with_bar()),
    "a scale bar of all 12 bits shifted": lambda: tiff(with_bar(65520)),
    "colour": lambda: tiff(np.dstack([with_bar()] * 3), photometric="rgb"),
    "the brightest pixel": lambda: tiff(with_bar(), **sample_limit(65535)),
    "the bits of the format": lambda: tiff(with_bar(), description=OME_12.replace('="12', '="16'), metadata=None),
    "how it is shown": lambda: tiff(with_bar(), description="ImageJ=1.54f\nmin=0.0\nmax=4095.0\n", metadata=None),
}


@pytest.mark.parametrize("case", SAY_NOTHING)
def test_the_full_range_with_a_warning_where_the_file_does_not_say(tmp_path: Path, case: str) -> None:
    loaded = read_image(write(tmp_path / "a", SAY_NOTHING[case]()))
    assert np.array_equal(loaded.pixels_hwc[..., 0], (with_bar(65520) if "shifted" in case else with_bar()) // 257)
    (warning,) = (note for note in loaded.notes if kind_of(note) == "bit depth")
    assert "give `bit_depth=12`" in warning
    assert ("ImageJ" in warning) == (case == "how it is shown")


def test_no_warning_of_depth_where_the_range_is_used(tmp_path: Path) -> None:
    half = picture(1, np.uint16) // 16
    half[:, :20] = 50_000  # a third of the picture is no scale bar
    for pixels in (picture(1, np.uint16), picture(1, np.uint16) // 2, half):
        loaded = read_image(write(tmp_path / "a.tif", tiff(pixels)))
        assert [note for note in loaded.notes if kind_of(note) == "bit depth"] == []
