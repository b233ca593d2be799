"""A streamed image has the labels and the table of the whole image; a killed run is resumed."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import DarknessBackend, make_spec

from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.samples.params import random_params
from cellseg_deploy.samples.smear import make_smear
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import counting, files
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.region import ArrayReader, Region, region_of
from cellseg_deploy.slides.run import run_slide


class BoundaryBackend(DarknessBackend):
    """Darkness as foreground, and a boundary that is high where a pixel is neither dark nor bright."""

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        out = super()._predict(tiles_nhwc)
        out[:, 1] = np.clip(4 * out[:, 0] * (1 - out[:, 0]), 0, 1)
        return out


def mosaic(rows: int = 2, columns: int = 2) -> npt.NDArray[np.uint8]:
    """Synthetic smears of one laboratory next to each other: cells are cut and touch at the seams."""
    from dataclasses import replace

    params = replace(random_params(np.random.default_rng(4)), size_hw=(220, 260), n_cells=30, cell_diameter_px=40.0)
    images = [make_smear(params, seed).image_hwc for seed in range(rows * columns)]
    return np.vstack([np.hstack(images[row * columns : (row + 1) * columns]) for row in range(rows)])


def segmenter(**settings: Any) -> Segmenter:
    return Segmenter(BoundaryBackend(make_spec(variant="boundary")), **settings)


def small_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, overlap: int) -> None:
    from dataclasses import replace

    settings_of = counting.block_settings

    def small(*arguments: Any) -> Any:
        return replace(settings_of(*arguments), block_rows=rows, overlap_rows=overlap)

    monkeypatch.setattr(counting, "block_settings", small)


@pytest.mark.parametrize(("rows", "overlap", "scale"), [(16, 4, 0.5), (50, 30, 0.73), (2000, 10, 1.0), (40, 20, 1.21)])
def test_streamed_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, overlap: int, scale: float
) -> None:
    image, model = mosaic(), segmenter(scale=scale)
    whole = model(image, field="full")
    assert whole.count > 40
    small_blocks(monkeypatch, rows, overlap)
    result = run_slide(model, region_of(ArrayReader(image)), tmp_path / "out")
    assert np.array_equal(tifffile.imread(tmp_path / "out" / files.LABELS), whole.labels)
    assert (tmp_path / "out" / slides.CELLS).read_bytes() == whole.table.csv()
    assert result.cells == whole.count
    assert result.counted == int(whole.counted().sum())
    assert result.row["confluence"] == whole.confluence
    assert set(result.notes) == set(whole.notes)
    assert not (tmp_path / "out" / slides.UNFINISHED).exists()


def test_the_measured_scale_is_that_of_the_whole_image(tmp_path: Path) -> None:
    image = mosaic()
    model = Segmenter(BoundaryBackend(make_spec(variant="boundary", tile_size=224)), cell_diameter_px="auto")
    whole = model(image, field="full")
    result = run_slide(model, region_of(ArrayReader(image)), tmp_path)
    assert result.row["scale"] == whole.scale != 1
    assert np.array_equal(tifffile.imread(tmp_path / files.LABELS), whole.labels)


def test_a_run_that_died_is_resumed_without_computing_twice(tmp_path: Path) -> None:
    image = mosaic()
    region = region_of(ArrayReader(image))
    model = segmenter(scale=1.0, batch_size=4)
    run_slide(model, region, tmp_path / "whole")
    all_tiles = sum(model.backend.batches)  # type: ignore[attr-defined]

    class Killed(BaseException):
        pass

    done = 0

    def kill(tiles: int) -> None:
        nonlocal done
        done += tiles
        if done > all_tiles // 2:
            raise Killed

    with pytest.raises(Killed):
        run_slide(model, region, tmp_path / "out", progress=slides.Progress(advanced=kill))
    stored = tmp_path / "out" / slides.UNFINISHED / "probabilities.f32"
    with stored.open("ab") as file:  # as a kill in the middle of a row would leave it
        file.write(b"half a row")
    again = segmenter(scale=1.0, batch_size=4)
    stages = dict[str, int]()
    run_slide(again, region, tmp_path / "out", progress=slides.Progress(started=stages.__setitem__))
    assert 0 < stages["tiles"] < all_tiles  # those to do, so that the time left is theirs
    assert 0 < sum(again.backend.batches) <= all_tiles - done + 12  # type: ignore[attr-defined]
    for name in (files.LABELS, slides.CELLS, slides.IMAGES, slides.OVERVIEW):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    region = region_of(ArrayReader(mosaic(1, 1)))

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_slide(segmenter(scale=1.0), region, tmp_path, progress=slides.Progress(advanced=fail))
    with pytest.raises(OutputError, match=r"unfinished run with another scale.*`overwrite`"):
        run_slide(segmenter(scale=0.5), region, tmp_path)
    retrained = segmenter(scale=1.0)
    retrained.backend.describe = lambda: {"model_file_sha256": "of other weights"}  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="unfinished run with another engine"):
        run_slide(retrained, region, tmp_path)
    with pytest.raises(OutputError, match="unfinished run with another stamp"):
        run_slide(segmenter(scale=1.0), region_of(ArrayReader(255 - mosaic(1, 1))), tmp_path)
    run_slide(segmenter(scale=0.5), region, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="finished result"):
        run_slide(segmenter(scale=0.5), region, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_slide(segmenter(scale=0.5), region, tmp_path, overwrite=True, progress=slides.Progress(advanced=fail))
    with pytest.raises(OutputError, match="finished result"):  # which is there until the new one is counted
        run_slide(segmenter(scale=0.5), region, tmp_path)
    run_slide(segmenter(scale=0.5), region, tmp_path, overwrite=True)


def test_overwriting_keeps_the_earlier_result_until_the_cells_are_counted(tmp_path: Path) -> None:
    region = region_of(ArrayReader(mosaic(1, 1)))
    run_slide(segmenter(scale=1.0), region, tmp_path, save=("labels", "geojson"))
    with pytest.raises(UsageError, match="memory"):
        run_slide(segmenter(scale=1.0), region, tmp_path, save=("labels",), memory=1_000_000, overwrite=True)
    assert (tmp_path / slides.RECORD).exists()
    assert (tmp_path / files.GEOJSON).exists()
    run_slide(segmenter(scale=1.0), region, tmp_path, save=("labels",), overwrite=True)
    assert not (tmp_path / files.GEOJSON).exists()
    record = json.loads((tmp_path / slides.RECORD).read_bytes())
    assert (record["count_rule"], record["version"]) == ("half", version("cellseg-deploy"))
    assert "counting_classes" in record


@pytest.mark.parametrize("name", ["cells.csv", "unfinished/b3c1/probabilities.f32", ".zattrs", "slide.json"])
def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(b"{}")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="no result of cellseg-slide; choose a new or empty folder"):
            run_slide(segmenter(scale=1.0), region_of(ArrayReader(mosaic(1, 1))), tmp_path, overwrite=overwrite)
    assert other.read_bytes() == b"{}"
    assert sum(path.is_file() for path in tmp_path.rglob("[!.]*")) <= 1


def test_a_folder_that_a_killed_run_left_almost_empty_is_taken(tmp_path: Path) -> None:
    (tmp_path / slides.UNFINISHED).mkdir()
    (tmp_path / slides.UNFINISHED / ".cellseg-1.tmp").touch()
    assert run_slide(segmenter(scale=1.0), region_of(ArrayReader(mosaic(1, 1))), tmp_path).cells


def test_the_output_folder_is_apart_from_the_image(tmp_path: Path) -> None:
    image = tmp_path / "slide.ome.zarr"
    image.mkdir()
    for out in (image, image / "counts", tmp_path):
        with pytest.raises(UsageError, match="must not contain each other"):
            segmenter(scale=1.0).run_slide(image, out)
    assert not [*image.iterdir()]


def test_a_region_is_the_image_cut_out(tmp_path: Path) -> None:
    image, model = mosaic(), segmenter(scale=0.5)
    run_slide(model, region_of(ArrayReader(image), 0, (30, 40, 200, 150)), tmp_path)
    whole = model(np.ascontiguousarray(image[40:190, 30:230]), field="full")
    assert np.array_equal(tifffile.imread(tmp_path / files.LABELS), whole.labels)


def test_labels_are_a_tiled_bigtiff_and_an_empty_image_has_no_cells(tmp_path: Path) -> None:
    image = np.full((700, 300, 3), 230, np.uint8)
    result = run_slide(segmenter(scale=1.0), region_of(ArrayReader(image)), tmp_path)
    assert result.cells == 0
    with tifffile.TiffFile(tmp_path / files.LABELS) as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff
        assert page.is_tiled
        assert (page.dtype, page.shape) == (np.uint32, (700, 300))


def test_too_little_memory_is_refused_with_the_amount(tmp_path: Path) -> None:
    region = Region(ArrayReader(mosaic(1, 1)), 0, 0, 0, 220, 260)
    with pytest.raises(UsageError, match=r"rows of 260 px need 0\.0\d GB"):
        run_slide(segmenter(scale=1.0), region, tmp_path, memory=1_000_000)
