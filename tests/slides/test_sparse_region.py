"""Bare glass is found on a small level of the pyramid: it is not decoded, and every cell elsewhere is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import make_spec
from PIL import Image
from stopping import StopAfter
from test_run_slide import BoundaryBackend, mosaic

from cellseg_deploy.cells.row_resize import RowResizer
from cellseg_deploy.errors import DataError
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank, files
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.network import bands_of
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import ArrayReader, Region, region_of
from cellseg_deploy.slides.run import run_slide
from cellseg_deploy.slides.sparse_region import SparseRegion, sparse_region
from cellseg_deploy.slides.tiff_reader import TiffReader

GLASS = (236, 230, 228)
TOP, LEFT = 430, 610
"""Of the smear, which is 220 x 260 px."""
TILE = 32
Pixels = npt.NDArray[np.uint8]


def sparse(hw: tuple[int, int] = (1003, 1402)) -> Pixels:
    """A smear on noisy glass. Its background is that of the glass, so that only cells tell where it is."""
    image = np.full((*hw, 3), GLASS, np.uint8)
    cells = mosaic(1, 1)
    image[TOP : TOP + 220, LEFT : LEFT + 260] = np.where((cells < 190).any(axis=2, keepdims=True), cells, GLASS)
    shift = np.random.default_rng(7).integers(-5, 6, image.shape)
    return np.clip(image + shift, 0, 255).astype(np.uint8)


def smaller(image: Pixels) -> Pixels:
    """Half the size, rounded up, so that levels are no exact halves of odd sizes."""
    import cv2

    height, width = image.shape[:2]
    return np.asarray(cv2.resize(image, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA), np.uint8)


def pyramid(image: Pixels, n_levels: int = 4) -> list[Pixels]:
    levels = [image]
    while len(levels) < n_levels:
        levels.append(smaller(levels[-1]))
    return levels


def write(path: Path, levels: list[Pixels]) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            below = {"subfiletype": 1} if number else {"subifds": len(levels) - 1}
            tiff.write(level, photometric="rgb", tile=(TILE, TILE), compression="zlib", metadata=None, **below)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("slide") / "slide.tif", pyramid(sparse()))


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with single cells far from the smear, too, some at its border."""
    image = sparse()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    for cx, cy in [(18, 20), (300, 7), (205, 300), (221, 704), (440, 905), (1010, 160), (1185, 640), (1399, 850)]:
        image[(x - cx) ** 2 + (y - cy) ** 2 <= 20**2] = (120, 40, 90)
    return write(tmp_path_factory.mktemp("scattered") / "slide.tif", pyramid(image))


@pytest.fixture
def opened() -> Iterator[Callable[..., Region]]:
    """Opens a region of a file, which is closed after the test."""
    readers = []

    def region(path: Path, *part: Any) -> Region:
        readers.append(open_image(path))
        return region_of(readers[-1], *part)

    yield region
    for reader in readers:
        reader.close()


def model(scale: float = 0.5, **changes: Any) -> Segmenter:
    """Tiles of 112 px of the image, and cells of 40 px, at a scale of 0.5."""
    return Segmenter(BoundaryBackend(make_spec(variant="boundary", **changes)), scale=scale)


def made(region: Region, scale: float = 0.5, contrast: int = blank.SKIP) -> SparseRegion | None:
    return sparse_region(model(scale), region, scale, contrast)


@pytest.mark.parametrize(
    ("scale", "level", "expected"),
    [
        (0.5, 0, 2),  # cells of 40 px: 10 px on level 2
        (0.62, 0, 2),  # 32.3 px: 8.06
        (0.63, 0, 1),  # 31.7 px: 7.94 on level 2
        (0.2, 0, 3),  # 100 px: 12.5 on level 3, the last one
        (0.5, 1, 3),  # 40 px of level 1: 10 px on level 3
        (1.3, 0, None),  # 15.4 px: too small on any other level
        (0.1, 3, None),  # no smaller level
    ],
)
def test_the_smallest_level_that_shows_cells_judges(scale: float, level: int, expected: int | None) -> None:
    reader = ArrayReader(np.zeros((1600, 1200, 3), np.uint8))
    reader.levels = tuple((1600 >> n, 1200 >> n) for n in range(4))
    found = made(region_of(reader, level), scale)
    assert (None if found is None else found.level) == expected
    assert made(region_of(reader, level), scale, blank.EXACT) is None


@pytest.mark.parametrize(
    ("scale", "part"),
    [
        (0.5, (0, None)),
        (0.43, (0, None)),
        (0.37, (0, (301, 203, 777, 555))),
        (0.9, (1, None)),
        (0.8, (1, (101, 47, 500, 401))),
    ],
)
def test_every_cell_is_kept(
    scattered: Path, tmp_path: Path, opened: Callable[..., Region], scale: float, part: tuple[int, Any]
) -> None:
    """At seams of tiles, next to glass, on another level, in a part, and if levels are no exact halves."""
    results = [
        run_slide(model(scale), opened(scattered, *part), tmp_path / name, skip_blank=name == "skip")
        for name in ("all", "skip")
    ]
    assert results[0].cells == results[1].cells >= 7
    assert results[0].row["blank_share"] == 0
    assert 0.3 < results[1].row["blank_share"] < 1
    for name in (files.LABELS, slides.CELLS):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "skip" / name).read_bytes(), name
    assert any("taken for blank on level" in note for note in results[1].notes)


@pytest.mark.parametrize(
    ("scale", "part"), [(0.5, (0, None)), (0.43, (0, (301, 203, 777, 555))), (1.25, (1, (21, 7, 600, 481)))]
)
def test_the_network_sees_the_pixels_of_the_image(
    scattered: Path, opened: Callable[..., Region], scale: float, part: tuple[int, Any]
) -> None:
    """In all of a tile, context included; and a tile is not blank if a cell lies in its context only."""
    region, spec = opened(scattered, *part), make_spec(cell_diameter_px=50.0)
    found = sparse_region(model(scale, cell_diameter_px=50.0), region, scale, blank.SKIP)
    assert found is not None
    whole, seen = (RowResizer(read, region.hw, scale) for read in (region.rows, found.rows))
    height, width = whole.out_hw
    image, other = whole.rows(0, height), seen.rows(0, height)
    across = bands_of((width, 1), spec.tile_size, 8)
    n_asked, n_context = 0, 0
    for band in bands_of((height, width), spec.tile_size, 8):
        for colour, tile in zip(found.colours(band), across, strict=True):
            window = band.read[0], tile.read[0]
            dark = image[window].mean(axis=2) < 150
            if colour is not None:
                assert not dark.any(), window
                continue
            assert np.array_equal(other[window], image[window]), window
            n_asked += 1
            n_context += bool(dark.any()) and not dark[band.crop[0], tile.crop[0]].any()
    assert 10 < n_asked < 0.7 * len(across) * len(bands_of((height, width), spec.tile_size, 8))
    assert n_context


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """Numbers of the TIFF's tiles that were decoded, by level."""
    found: dict[int, set[int]] = {}
    segment = TiffReader._segment

    def counting(self: TiffReader, page: Any, level: int, index: int) -> npt.NDArray[Any]:
        found.setdefault(level, set()).add(index)
        return segment(self, page, level, index)

    monkeypatch.setattr(TiffReader, "_segment", counting)
    return found


def test_glass_is_not_decoded(
    slide: Path,
    tmp_path: Path,
    opened: Callable[..., Region],
    decoded: dict[int, set[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    region = opened(slide)
    decoded.clear()  # opening reads a few rows
    monkeypatch.setattr(SparseRegion, "check", lambda _: None)
    resized, resize = list[int](), RowResizer.rows

    def recording(self: RowResizer, start: int, stop: int) -> Pixels:
        resized.extend((start, stop))
        return resize(self, start, stop)

    monkeypatch.setattr(RowResizer, "rows", recording)
    run_slide(model(), region, tmp_path, skip_blank=True)
    assert set(decoded) == {0, 2}
    across = -(-region.width // TILE)
    tops, lefts = (TILE * np.array([divmod(index, across)[k] for index in decoded[0]]) for k in (0, 1))
    # A tile that shows a cell reads 112 px, and one more px of each level at most; the file has whole tiles of its own.
    most = 112 + 4 + 1 + TILE
    assert TOP - most < tops.min()
    assert tops.max() < TOP + 220 + most - TILE
    assert LEFT - most < lefts.min()
    assert lefts.max() < LEFT + 260 + most - TILE
    assert TOP - most < 2 * min(resized)
    assert 2 * max(resized) < TOP + 220 + most
    assert len(decoded[0]) < 0.25 * across * -(-region.height // TILE)


def test_a_run_checks_a_few_blank_tiles(
    slide: Path, opened: Callable[..., Region], decoded: dict[int, set[int]]
) -> None:
    found = made(opened(slide))
    assert found is not None
    decoded.clear()
    found.check()
    assert 32 <= len(decoded[0]) < 0.5 * 32 * 44


def test_pixels_do_not_depend_on_who_asks(slide: Path, opened: Callable[..., Region]) -> None:
    """A worker that starts with any band reads what the process sees that reads from the top."""
    region = opened(slide, 0, (203, 101, 1101, 803))
    image = region.rows(0, region.height)
    first = made(region)
    assert first is not None
    whole = first.rows(0, region.height)
    rng = np.random.default_rng(2)
    for start in rng.integers(0, region.height - 90, 12).tolist():
        other = made(opened(slide, 0, (203, 101, 1101, 803)))
        assert other is not None
        assert np.array_equal(other.rows(start, start + 90), whole[start : start + 90])
    is_own = (whole == image).all(axis=2)
    assert is_own[TOP - 101 : TOP - 101 + 220, LEFT - 203 : LEFT - 203 + 260].all()
    assert 0.1 < is_own.mean() < 0.4
    blurred = np.abs(whole.astype(int) - GLASS)[~is_own]
    assert blurred.max() <= 5


def test_a_stopped_run_is_resumed(slide: Path, tmp_path: Path, opened: Callable[..., Region]) -> None:
    run_slide(model(), opened(slide), tmp_path / "whole", skip_blank=True)
    with pytest.raises(KeyboardInterrupt):
        run_slide(model(), opened(slide), tmp_path / "out", skip_blank=True, progress=StopAfter(6).progress)
    run_slide(model(), opened(slide), tmp_path / "out", skip_blank=True)
    for name in (files.LABELS, slides.CELLS, slides.IMAGES, slides.OVERVIEW):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_overview_shows_the_glass_in_blue(slide: Path, tmp_path: Path, opened: Callable[..., Region]) -> None:
    result = run_slide(model(), opened(slide), tmp_path, skip_blank=True)
    overview = np.asarray(Image.open(tmp_path / slides.OVERVIEW)).astype(int)
    blue = (np.array(GLASS) + files.BLANK_RGB) // 2
    is_blue = (np.abs(overview - blue) <= 4).all(axis=2)
    assert is_blue[:250].all()
    assert is_blue[-150:].all()
    assert is_blue[:, :400].all()
    assert not is_blue[TOP : TOP + 220, LEFT : LEFT + 260].any()
    assert is_blue.mean() == pytest.approx(result.row["blank_share"], abs=0.05)


def test_without_a_pyramid_tiles_are_judged_by_their_own_pixels(tmp_path: Path, opened: Callable[..., Region]) -> None:
    path = write(tmp_path / "flat.tif", [sparse()])
    result = run_slide(model(), opened(path), tmp_path / "out", skip_blank=True)
    assert result.row["blank_share"] > 0.5
    (note,) = (note for note in result.notes if "taken for blank" in note)
    assert "pyramid" not in note


@pytest.mark.parametrize("small", ["white", "of another picture"])
def test_a_level_that_hides_cells_is_refused(tmp_path: Path, opened: Callable[..., Region], small: str) -> None:
    levels = pyramid(np.tile(sparse()[TOP : TOP + 220, LEFT : LEFT + 260], (4, 5, 1)), 3)
    if small == "white":
        levels[2][:] = 255
    else:
        levels[2] = levels[2].copy()
        levels[2][:, :200] = levels[2][:1, :1]
    path = write(tmp_path / "a.tif", levels)
    with pytest.raises(DataError, match=r"a.tif: level 2 of the pyramid shows bare glass around \d+,\d+ px, where"):
        run_slide(model(), opened(path), tmp_path / "out", skip_blank=True)
    assert run_slide(model(), opened(path), tmp_path / "out", overwrite=True).cells > 100  # as the message says


def test_a_damaged_level_is_an_error(slide: Path, tmp_path: Path, opened: Callable[..., Region]) -> None:
    path = tmp_path / "a.tif"
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as tiff:
        offset = tiff.series[0].levels[2].pages[0].dataoffsets[20]  # type: ignore[union-attr]
    data[offset : offset + 30] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(DataError, match="strip 20 of the TIFF is damaged"):
        run_slide(model(), opened(path), tmp_path / "out", skip_blank=True)
