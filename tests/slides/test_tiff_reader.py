"""Regions of a TIFF are those of the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import read_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.slides.tiff_reader import TiffReader

RNG = np.random.default_rng(5)
RGB = RNG.integers(0, 256, (97, 131, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 4096, (97, 131), dtype=np.uint16)
ALPHA = np.dstack([RGB, RNG.integers(0, 256, (97, 131), dtype=np.uint8)])

KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "tiles": (RGB, {"photometric": "rgb", "tile": (32, 48), "compression": "deflate"}),
    "tiles-jpeg": (RGB, {"photometric": "rgb", "tile": (32, 48), "compression": "jpeg"}),
    "tiles-zstd-predictor": (RGB, {"photometric": "rgb", "tile": (32, 48), "compression": "zstd", "predictor": True}),
    "tiles-plain": (RGB, {"photometric": "rgb", "tile": (32, 48)}),
    "strips-lzw": (RGB, {"photometric": "rgb", "rowsperstrip": 7, "compression": "lzw"}),
    "one-strip": (RGB, {"photometric": "rgb", "rowsperstrip": 97}),
    "bigtiff": (RGB, {"photometric": "rgb", "tile": (64, 64), "bigtiff": True}),
    "big-endian": (GREY16, {"photometric": "minisblack", "rowsperstrip": 97, "byteorder": ">"}),
    "planar": (RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", "tile": (32, 32)}),
    "grey": (RGB[..., 0], {"photometric": "minisblack", "tile": (32, 32), "compression": "deflate"}),
    "white-is-zero": (RGB[..., 0], {"photometric": "miniswhite", "tile": (32, 32)}),
    "16-bit": (GREY16, {"photometric": "minisblack", "tile": (32, 32)}),
    "alpha": (ALPHA, {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (32, 32)}),
    "one-bit": (RGB[..., 0] > 128, {"photometric": "minisblack", "rowsperstrip": 9}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_those_of_the_whole_image(tmp_path: Path, kind: str) -> None:
    data, how = KINDS[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, metadata=None, **how)
    whole = read_image(path).pixels_hwc
    reader = TiffReader(path)
    assert reader.levels == ((97, 131),)
    for y, x, h, w in [
        (0, 0, 97, 131),
        (0, 0, 1, 1),
        (31, 47, 2, 2),
        (30, 5, 40, 100),
        (96, 130, 1, 1),
        (64, 96, 33, 35),
    ]:
        assert np.array_equal(reader.read(y, x, h, w, 0), whole[y : y + h, x : x + w]), (y, x, h, w)
    reader.close()


def test_bit_depth_is_applied_as_to_a_whole_image(tmp_path: Path) -> None:
    path, options = tmp_path / "a.tif", ReadOptions(bit_depth=12)
    tifffile.imwrite(path, GREY16, photometric="minisblack", tile=(32, 32), metadata=None)
    reader = TiffReader(path, options)
    assert np.array_equal(reader.read(3, 4, 50, 60, 0), read_image(path, options).pixels_hwc[3:53, 4:64])
    assert any("12-bit" in note for note in reader.notes)
    reader.close()


@pytest.mark.parametrize("below", [True, False])
def test_levels_and_pixel_size_of_a_pyramid(tmp_path: Path, below: bool) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, bigtiff=True, ome=below) as tiff:
        about = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
        how: dict[str, Any] = {"photometric": "rgb", "tile": (32, 32), "compression": "deflate"}
        tiff.write(RGB, subifds=2 if below else 0, metadata=about if below else None, **how)
        for step in (2, 4):
            tiff.write(np.ascontiguousarray(RGB[::step, ::step]), subfiletype=1, metadata=None, **how)
    reader = TiffReader(path)
    assert reader.levels == ((97, 131), (49, 66), (25, 33))
    assert np.array_equal(reader.read(0, 0, 49, 66, 1), RGB[::2, ::2])
    assert np.array_equal(reader.read(5, 6, 7, 8, 2), RGB[::4, ::4][5:12, 6:14])
    if below:
        assert reader.pixel_size.um == 0.25
        assert region_of(reader, 1).pixel_size.um == pytest.approx(0.25 * 97 / 49)
    part = region_of(reader, 1, (3, 4, 20, 10))
    assert np.array_equal(part.rows(2, 5), RGB[::2, ::2][6:9, 3:23])
    for wrong in [(0, 0, 67, 1), (-1, 0, 2, 2), (0, 0, 0, 5)]:
        with pytest.raises(UsageError, match="does not lie in the 66 x 49 px"):
            region_of(reader, 1, wrong)
    with pytest.raises(UsageError, match="level 3 does not exist"):
        region_of(reader, 3)
    reader.close()


def test_what_cannot_be_read_by_region_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", extratags=[(274, 3, 1, 6, True)], metadata=None)
    with pytest.raises(DataError, match=r"orientation tag 6.*save it upright"):
        TiffReader(path)
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32), metadata=None)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="cut short"):
        TiffReader(path)
    path.write_bytes(b"no TIFF")
    with pytest.raises(DataError, match="cannot be read as a TIFF"):
        TiffReader(path)


def test_a_damaged_tile_is_an_error_not_a_black_corner(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32), compression="deflate", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[-1]  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(DataError, match="strip 19 of the TIFF is damaged"):
        TiffReader(path).read(90, 120, 7, 11, 0)
