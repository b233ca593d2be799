"""Zeiss CZI: the pixels of the file, wherever its coordinates begin; scenes, layers, metadata, and what is refused."""

from __future__ import annotations

import importlib.util
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import DarknessBackend, draw_discs
from czi_files import JPEG, JPEG_XR, NONE, ZSTD0, Subblock, metadata, tiles, write_czi

from cellseg_deploy.errors import BackendUnavailableError, DataError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import read_image
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.streamed import is_streamed
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import czi_reader, files
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.slides.run import run_slide

RGB = np.random.default_rng(5).integers(0, 256, (300, 420, 3), dtype=np.uint8)
CELLS = draw_discs((420, 380), [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(9) for y in range(10)])
"""90 cells."""
PLAIN, ZSTD1 = "uncompressed:", "zstd1:ExplicitLevel=1;PreProcess=HiLoByteUnpack"


@pytest.fixture(autouse=True)
def czi() -> Any:
    """ZEISS's own library, which writes most of these files."""
    return pytest.importorskip("pylibCZIrw.czi")


def written(
    czi: Any,
    path: Path,
    *scenes: tuple[npt.NDArray[Any], int, int],
    compression: str = PLAIN,
    um: tuple[float, float] | None = (0.25, 0.25),
) -> Path:
    """A CZI by ZEISS's library, of scenes (image, x, y) in tiles of 128 px."""
    with czi.create_czi(str(path), compression_options=compression) as file:
        for scene, (image, x, y) in enumerate(scenes):
            stored = image[..., ::-1] if image.ndim == 3 else image[..., np.newaxis]  # BGR
            for top in range(0, image.shape[0], 128):
                for left in range(0, image.shape[1], 128):
                    tile = np.ascontiguousarray(stored[top : top + 128, left : left + 128])
                    file.write(tile, location=(x + left, y + top), scene=scene)
        if um is not None:
            file.write_metadata("slide", scale_x=um[0] * 1e-6, scale_y=um[1] * 1e-6)
    return path


def has_regions_of(reader: Any, image: npt.NDArray[Any], level: int = 0) -> bool:
    """Whether ``level`` of ``reader`` is ``image``, as a whole and in regions at odd places."""
    assert reader.levels[level] == image.shape[:2]
    dice = random.Random(3)
    regions = [(0, 0, *image.shape[:2])]
    for _ in range(40):
        h, w = dice.randint(1, min(140, image.shape[0])), dice.randint(1, min(200, image.shape[1]))
        regions.append((dice.randint(0, image.shape[0] - h), dice.randint(0, image.shape[1] - w), h, w))
    return all(np.array_equal(reader.read(y, x, h, w, level), image[y : y + h, x : x + w]) for y, x, h, w in regions)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (-333, -77), (100_001, 5)])
@pytest.mark.parametrize("compression", [PLAIN, "zstd0:ExplicitLevel=2", ZSTD1])
def test_regions(czi: Any, tmp_path: Path, compression: str, x: int, y: int) -> None:
    reader = open_image(written(czi, tmp_path / "a.CZI", (RGB, x, y), compression=compression))
    assert has_regions_of(reader, RGB)
    assert reader.pixel_size.um == pytest.approx(0.25)
    assert (reader.pixel_size.source, reader.notes) == ("CZI", ())
    reader.close()


@pytest.mark.parametrize("compression", [NONE, ZSTD0, JPEG_XR])
def test_colours_and_grey_of_8_and_16_bit(tmp_path: Path, compression: int) -> None:
    grey = np.repeat(RGB[..., :1], 3, axis=2)
    for image, expected in ((RGB, RGB), (RGB[..., 0], grey)):
        path = tmp_path / f"{image.ndim}.czi"
        reader = open_image(write_czi(path, tiles(image, 100, compression=compression)))
        assert has_regions_of(reader, expected)
        assert reader.notes == (() if image.ndim == 3 else ("grey image converted to RGB",))
        deep = image.astype(np.uint16) * 257
        reader = open_image(write_czi(path, tiles(deep, 100, compression=compression)))
        assert has_regions_of(reader, expected)
        assert reader.notes[0] == "16-bit samples scaled to 8 bit"


def test_scenes_lie_in_one_picture_with_white_between_them(czi: Any, tmp_path: Path) -> None:
    reader = open_image(written(czi, tmp_path / "a.czi", (RGB, -20, -10), (RGB[::-1], 500, 400)))
    expected = np.full((710, 940, 3), 255, np.uint8)
    expected[:300, :420], expected[410:, 520:] = RGB, RGB[::-1]
    assert has_regions_of(reader, expected)


def test_of_tiles_that_overlap_the_later_one_is_seen(tmp_path: Path) -> None:
    """As in a mosaic of a microscope's camera, whatever the order in the file."""
    blocks = [
        Subblock(RGB[:, ::-1], 370, place={"M": 1}),
        Subblock(RGB, place={"M": 0}),
        Subblock(RGB[::-1], 0, 280, place={"M": 2}),
    ]
    expected = np.full((580, 790, 3), 255, np.uint8)
    expected[:300, :420], expected[:300, 370:], expected[280:, :420] = RGB, RGB[:, ::-1], RGB[::-1]
    assert has_regions_of(open_image(write_czi(tmp_path / "a.czi", blocks)), expected)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_layers_of_the_pyramid(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(czi_reader, "_PIECE", 64)
    smaller = np.ascontiguousarray(255 - RGB[::step, ::step])  # another picture, to know one from the other
    blocks = tiles(RGB, 100, -33, 5) + tiles(smaller, 64, -33, 5, step=step)
    reader = open_image(write_czi(tmp_path / "a.czi", blocks, metadata((0.25, 0.25))))
    assert reader.levels == ((300, 420), (300 // step, 420 // step))
    assert has_regions_of(reader, RGB)
    assert has_regions_of(reader, smaller, 1)
    assert region_of(reader, 1).pixel_size.um == pytest.approx(0.25 * step)


def test_a_level_has_all_scenes_or_is_none(tmp_path: Path) -> None:
    smaller = np.ascontiguousarray(255 - RGB[::2, ::2])
    expected = np.full((300, 470, 3), 255, np.uint8)
    expected[:150, :210], expected[150:, 260:] = smaller, smaller
    scenes = [
        [*tiles(RGB, 100, x, y, place=place), *tiles(smaller, 64, x, y, step=2, place=place)]
        for x, y, place in ((-20, -10, {"S": 0}), (500, 290, {"S": 1}))
    ]
    reader = open_image(write_czi(tmp_path / "a.czi", scenes[0] + scenes[1]))
    assert has_regions_of(reader, expected, 1)
    reader = open_image(write_czi(tmp_path / "b.czi", scenes[0] + tiles(RGB, 100, 500, 290, place={"S": 1})))
    assert reader.levels == ((600, 940),)


def test_a_layer_that_lacks_a_tile_is_no_level(tmp_path: Path) -> None:
    smaller = tiles(np.ascontiguousarray(RGB[::2, ::2]), 64, step=2)
    assert len(open_image(write_czi(tmp_path / "all.czi", tiles(RGB, 100) + smaller)).levels) == 2
    del smaller[4]
    assert open_image(write_czi(tmp_path / "a.czi", tiles(RGB, 100) + smaller)).levels == ((300, 420),)


def test_a_pixel_of_a_level_does_not_depend_on_the_region(tmp_path: Path) -> None:
    """libCZI alone gives a pixel next to the edge of a tile for some regions."""
    image = np.random.default_rng(0).integers(0, 256, (600, 840, 3), dtype=np.uint8)
    smaller = np.ascontiguousarray(image[::2, ::2])
    reader = open_image(write_czi(tmp_path / "a.czi", tiles(image, 128) + tiles(smaller, 100, step=2)))
    assert has_regions_of(reader, reader.read(0, 0, 300, 420, 1), 1)
    for y, x, h, w in ((103, 142, 53, 140), (186, 116, 82, 75), (145, 22, 101, 37)):
        assert np.array_equal(reader.read(y, x, h, w, 1), smaller[y : y + h, x : x + w])


def test_the_size_of_a_pixel(czi: Any, tmp_path: Path) -> None:
    assert open_image(written(czi, tmp_path / "none.czi", (RGB, 0, 0), um=None)).pixel_size.um is None
    unequal = written(czi, tmp_path / "unequal.czi", (RGB, 0, 0), um=(0.25, 0.3))
    reader = open_image(unequal)
    assert reader.pixel_size.um is None
    assert "not square (0.25 x 0.3 micrometres)" in reader.pixel_size.note
    given = open_image(unequal, ReadOptions(pixel_size_um=0.5)).pixel_size
    assert (given.um, given.source) == (0.5, "given")
    reader = open_image(write_czi(tmp_path / "zen.czi", tiles(RGB, 100), metadata((0.11, 0.11))))
    assert reader.pixel_size.um == 0.11
    for wrong in ("", "none", "nan", "0"):
        about = metadata((0.11, 0.11)).replace("0.11E-06", wrong)
        assert open_image(write_czi(tmp_path / "wrong.czi", tiles(RGB, 100), about)).pixel_size.um is None


def test_the_bits_of_the_camera(tmp_path: Path) -> None:
    """12 of 16 bits: as the metadata or the user say, and white stays white."""
    deep = ((RGB.astype(np.uint32) * 4095 + 254) // 255).astype(np.uint16)
    blocks = [*tiles(deep, 128), Subblock(deep[:50, :50], 500, 0)]
    expected = np.full((300, 550, 3), 255, np.uint8)
    expected[:, :420], expected[:50, 500:] = RGB, RGB[:50, :50]
    path = write_czi(tmp_path / "a.czi", blocks, metadata(bits=12))
    reader = open_image(path)
    assert has_regions_of(reader, expected)
    assert reader.notes == ("12-bit samples (CZI ComponentBitCount) scaled to 8 bit",)
    write_czi(path, blocks, metadata(bits=16))
    given = open_image(path, ReadOptions(bit_depth=12))
    assert has_regions_of(given, expected)
    assert given.stamp != open_image(path).stamp


def test_threads_may_share_a_reader(tmp_path: Path) -> None:
    reader = open_image(write_czi(tmp_path / "a.czi", tiles(RGB, 64, compression=JPEG_XR)))

    def is_right(place: int) -> bool:
        return np.array_equal(reader.read(place, 2 * place, 90, 100, 0), RGB[place : place + 90, 2 * place :][:, :100])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_right, range(150)))


def test_a_slide_is_counted_as_the_same_pixels_in_a_tiff(czi: Any, tmp_path: Path) -> None:
    written(czi, tmp_path / "slide.czi", (CELLS, -1000, -500), compression=ZSTD1, um=(0.1, 0.1))
    unit = {"resolution": (1e5, 1e5), "resolutionunit": 3}
    tifffile.imwrite(tmp_path / "slide.tif", CELLS, photometric="rgb", tile=(64, 64), metadata=None, **unit)
    for name in ("slide.czi", "slide.tif"):
        with closing(open_image(tmp_path / name)) as reader:
            result = run_slide(Segmenter(DarknessBackend(), scale=1.0), region_of(reader), tmp_path / f"out {name}")
        assert result.cells == 90
    of_czi, of_tiff = tmp_path / "out slide.czi", tmp_path / "out slide.tif"
    assert np.array_equal(tifffile.imread(of_czi / files.LABELS), tifffile.imread(of_tiff / files.LABELS))
    said = [(out / slides.CELLS).read_text().replace("slide.czi", "slide.tif") for out in (of_czi, of_tiff)]
    assert said[0] == said[1]


def test_a_run_takes_a_slide_that_is_passed_by_name(czi: Any, tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    good = written(czi, place / "good.czi", (CELLS, 0, 0))
    cut = written(czi, place / "cut.czi", (CELLS, 0, 0))
    cut.write_bytes(cut.read_bytes()[:-3000])
    assert is_streamed(good)
    assert not find_images([place])  # in a folder, the ending decides
    summary = run_folder(
        Segmenter(DarknessBackend(), scale=1.0), find_images([good, cut]), tmp_path / "out", options=RunOptions()
    )
    assert (summary.done, summary.failed, summary.cells) == (1, 1, 90)
    assert "damaged or incomplete CZI" in summary.images["cut.czi"].error
    whole = Segmenter(DarknessBackend(), scale=1.0)(CELLS, field="full")
    assert np.array_equal(tifffile.imread(tmp_path / "out/labels/good.czi.tif"), whole.labels)


def test_every_cut_is_refused(czi: Any, tmp_path: Path) -> None:
    data = written(czi, tmp_path / "whole.czi", (RGB, 0, 0), compression=ZSTD1).read_bytes()
    used = data.rindex(b"</ImageDocument>")
    path = tmp_path / "a.czi"
    for size in [*range(0, used, 5003), used]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"damaged or incomplete CZI|not a CZI file"):
            open_image(path)


def test_damaged_sizes_are_refused_before_libczi_opens_the_file(tmp_path: Path) -> None:
    """It ended the process for a damaged size of the pixels, or number of dimensions, of a subblock."""
    data = write_czi(tmp_path / "a.czi", tiles(RGB, 200, compression=ZSTD0), metadata()).read_bytes()
    first = data.index(b"ZISRAWSUBBLOCK")
    path = tmp_path / "b.czi"
    for place, value, said in (
        (first + 32 + 14, 127, "its tile lies behind the end of the file"),
        (first + 32 + 16 + 31, 200, "the description of a tile is not readable"),
        (first + 32 + 16 + 30, 1, "the description of a tile is not readable"),
        (first + 3, 0, "its tile is not where the file says"),
        (32 + 48, 1, "CZI in several files"),
        (data.index(b"ZISRAWMETADATA") + 34, 127, "its metadata lies behind the end of the file"),
        (data.index(b"ZISRAWDIRECTORY") + 34, 127, "the directory lists"),
    ):
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        with pytest.raises(DataError, match=said):
            open_image(path)


@pytest.mark.parametrize(("place", "value"), [(-1, 0x11), (11, 0xDB), (16, 0xB7), (0, 0)])
def test_a_jpeg_xr_of_other_pixels_is_refused_before_it_is_decoded(tmp_path: Path, place: int, value: int) -> None:
    """Its decoder ended the process for these. Places: the pixel format's last byte, and from the image's header on."""
    data = write_czi(tmp_path / "a.czi", tiles(RGB, 200, compression=JPEG_XR)).read_bytes()
    image = data.rindex(b"WMPHOTO")
    start = image + place if place >= 0 else data.rindex(b"\x24\xc3\xdd\x6f") + 15
    path = tmp_path / "b.czi"
    path.write_bytes(data[:start] + bytes([value]) + data[start + 1 :])
    with pytest.raises(DataError, match="the JPEG XR of a tile has other pixels than Bgr24"):
        open_image(path)


def test_a_tile_with_too_few_pixels_is_refused(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi", [Subblock(RGB[:50, :50]), Subblock(RGB[:50, :50], 50)])
    data = path.read_bytes()
    first = data.index(b"ZISRAWSUBBLOCK") + 32 + 8
    path.write_bytes(data[:first] + struct.pack("<q", 7499) + data[first + 8 :])
    with pytest.raises(DataError, match="a tile has 7499 bytes of pixels instead of 7500"):
        open_image(path)


def test_damaged_pixels_are_an_error_where_they_are_read(tmp_path: Path) -> None:
    """Of the lower tile, of which the middle of the image is no part."""
    plain = np.zeros((100, 100, 3), np.uint8)
    path = write_czi(tmp_path / "a.czi", tiles(np.vstack([plain] * 8), 100, compression=ZSTD0))
    data = path.read_bytes()
    last = data.rindex(b"\x28\xb5\x2f\xfd")
    path.write_bytes(data[:last] + b"damage" + data[last + 6 :])
    reader = open_image(path)
    assert not reader.read(0, 0, 700, 100, 0).any()
    with pytest.raises(DataError, match="the region at 7,750 of level 0 cannot be read"):
        reader.read(750, 7, 10, 10, 0)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([Subblock(RGB, place={"C": 0}), Subblock(RGB, place={"C": 1})], r"several planes \(C 2\)"),
        ([Subblock(RGB, place={"Z": z, "T": z}) for z in (3, 4, 9)], r"several planes \(T 3, Z 3\)"),
        ([Subblock(RGB[..., 0].astype(np.float32))], "pixels of type Gray32Float; expected one of Gray8"),
        ([Subblock(RGB), Subblock(RGB[..., 0], 420)], "pixels of type Gray8, Bgr24"),
        ([Subblock(RGB, compression=JPEG)], "compression 1; expected none"),
        ([Subblock(RGB, file_part=1)], "CZI in several files"),
        ([], "without a tile at full resolution"),
        ([Subblock(RGB, step=2)], "without a tile at full resolution"),
    ],
)
def test_what_is_refused(tmp_path: Path, blocks: list[Subblock], said: str) -> None:
    path = write_czi(tmp_path / "a.czi", blocks)
    with pytest.raises(DataError, match=said):
        open_image(path)


def test_the_only_channel_may_have_any_number(tmp_path: Path) -> None:
    reader = open_image(write_czi(tmp_path / "a.czi", tiles(RGB, 200, place={"C": 2, "Z": 7, "S": 4})))
    assert has_regions_of(reader, RGB)


def test_other_files_of_that_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    path.write_text("a list of slides")
    with pytest.raises(DataError, match="not a CZI file, whatever its name says: it starts with b'a list o'"):
        open_image(path)
    with pytest.raises(DataError, match=r"none\.czi: cannot be read: No such file"):
        open_image(tmp_path / "none.czi")
    (tmp_path / "folder.czi").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        open_image(tmp_path / "folder.czi")


def test_a_czi_of_another_ending_is_told_what_to_do(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.tif", tiles(RGB, 200))
    for read in (open_image, read_image):
        with pytest.raises(DataError, match=r"this is a Zeiss CZI file; .* ending \.czi .* cellseg-slide"):
            read(path)


def test_the_package_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_czi(tmp_path / "a.czi", tiles(RGB, 200))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pylibCZIrw" else found(name))
    with pytest.raises(BackendUnavailableError, match=r"pylibCZIrw; run: pip install 'cellseg-deploy\[czi\]'"):
        open_image(path)
