"""OME-Zarr and OpenSlide: regions, levels and pixel sizes, and the right reader for a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of

RGB = np.random.default_rng(5).integers(0, 256, (300, 420, 3), dtype=np.uint8)


def write_zarr(path: Path, data: np.ndarray, axes: str, *, version: str = "0.4", unit: str = "micrometer") -> Path:
    """An image of two levels, as ome-zarr-py lays it out."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    for level, step in enumerate((1, 2)):
        part = data[..., ::step, ::step]
        array = group.create_array(str(level), shape=part.shape, chunks=(*part.shape[:-2], 64, 64), dtype=part.dtype)
        array[...] = part
    about: dict[str, Any] = {
        "axes": [{"name": axis, "type": "space", **({"unit": unit} if axis in "yx" else {})} for axis in axes],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [{"type": "scale", "scale": [1.0] * (len(axes) - 2) + [0.5 * step] * 2}],
            }
            for level, step in enumerate((1, 2))
        ],
    }
    if version == "0.4":
        group.attrs["multiscales"] = [about | {"version": version}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [about]}
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_regions_of_ome_zarr(tmp_path: Path, version: str) -> None:
    reader = open_image(write_zarr(tmp_path / "a.zarr", RGB.transpose(2, 0, 1), "cyx", version=version))
    assert reader.levels == ((300, 420), (150, 210))
    assert reader.pixel_size.um == 0.5
    assert region_of(reader, 1).pixel_size.um == 1.0
    assert np.array_equal(reader.read(60, 50, 100, 90, 0), RGB[60:160, 50:140])
    assert np.array_equal(reader.read(3, 4, 20, 30, 1), RGB[::2, ::2][3:23, 4:34])
    reader.close()


def test_grey_ome_zarr_of_one_time_and_slice(tmp_path: Path) -> None:
    reader = open_image(write_zarr(tmp_path / "a.zarr", RGB[np.newaxis, np.newaxis, np.newaxis, ..., 0], "tczyx"))
    assert np.array_equal(reader.read(60, 50, 100, 90, 0), np.repeat(RGB[60:160, 50:140, :1], 3, axis=2))
    assert reader.notes == ("grey image converted to RGB",)


def test_other_ome_zarr_is_refused(tmp_path: Path) -> None:
    two = np.stack([RGB[..., 0], RGB[..., 1]])
    with pytest.raises(DataError, match="1 or 3 channels"):
        open_image(write_zarr(tmp_path / "two.zarr", two, "cyx"))
    with pytest.raises(DataError, match="uint16"):
        open_image(write_zarr(tmp_path / "deep.zarr", RGB[np.newaxis, ..., 0].astype(np.uint16), "cyx"))
    with pytest.raises(DataError, match="one time"):
        open_image(write_zarr(tmp_path / "time.zarr", two[:, np.newaxis], "tcyx"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not an OME-Zarr image"):
        open_image(tmp_path / "folder")


def test_a_damaged_chunk_is_an_error(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", RGB.transpose(2, 0, 1), "cyx")
    reader = open_image(path)
    (path / "0" / "0.1.1").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        reader.read(64, 64, 10, 10, 0)


def test_an_svs_like_pyramid_is_read_by_openslide(tmp_path: Path) -> None:
    """The layout of Aperio's files: tiles, a thumbnail, then the smaller level, described in ImageDescription."""
    pytest.importorskip("openslide")
    path = tmp_path / "a.svs"
    smaller = np.ascontiguousarray(RGB[::2, ::2])
    how: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    about = "Aperio Image Library v11.2.1\n420x300 [0,0 420x300] (64x64) RAW|AppMag = 40|MPP = 0.2500"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(RGB, tile=(64, 64), compression="lzw", description=about, **how)
        tiff.write(np.ascontiguousarray(RGB[::4, ::4]), rowsperstrip=75, description="Aperio thumbnail", **how)
        tiff.write(smaller, tile=(64, 64), compression="lzw", description="Aperio Image Library v11.2.1", **how)
    reader = open_image(path)
    assert type(reader).__name__ == "OpenSlideReader"
    assert reader.levels == ((300, 420), (150, 210))
    assert reader.pixel_size.um == 0.25
    assert np.array_equal(reader.read(60, 50, 100, 90, 0), RGB[60:160, 50:140])
    assert np.array_equal(reader.read(60, 50, 40, 50, 1), smaller[60:100, 50:100])
    reader.close()


def test_openslide_refuses_in_words(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    path = tmp_path / "a.svs"
    path.write_bytes(b"no slide")
    with pytest.raises(DataError, match="OpenSlide cannot read it"):
        open_image(path)


def test_png_is_read_whole_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    assert np.array_equal(open_image(path).read(3, 4, 5, 6, 0), RGB[3:8, 4:10])
    with pytest.raises(DataError, match="more than the limit"):
        open_image(path, ReadOptions(max_pixels=1000))
    with pytest.raises(DataError, match="cannot be read"):
        open_image(tmp_path / "none.png")


def test_a_tiff_has_no_limit_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(64, 64), metadata=None)
    reader = open_image(path, ReadOptions(max_pixels=1000))
    assert reader.levels == ((300, 420),)
    reader.close()


def test_a_level_of_ome_zarr_has_the_pixel_size_that_was_given(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", RGB.transpose(2, 0, 1), "cyx", unit="furlong")
    assert open_image(path).pixel_size.um is None
    assert open_image(path, ReadOptions(pixel_size_um=0.3)).pixel_size.um == 0.3
    assert json.loads((path / ".zattrs").read_text(encoding="utf-8"))["multiscales"]
