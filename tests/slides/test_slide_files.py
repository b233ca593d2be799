"""Files of a streamed image: the same cells in every kind, the pixel size in each, and formats that others read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import make_spec
from test_run_slide import BoundaryBackend, mosaic, segmenter, small_blocks

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.resolution import PixelSize
from cellseg_deploy.outputs import geojson
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import files, zarr_labels
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.region import ArrayReader, region_of
from cellseg_deploy.slides.run import run_slide

ALL = tuple(files.KINDS)
UM = 0.13


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run over several blocks with all kinds of files."""
    pytest.importorskip("zarr")
    pytest.importorskip("pyarrow")
    small_blocks(monkeypatch, 40, 20)
    monkeypatch.setattr(zarr_labels, "CHUNK_PX", 64)
    monkeypatch.setattr(zarr_labels, "_SMALLEST_PX", 128)
    reader = ArrayReader(mosaic(), "mosaic.tif", PixelSize(UM, "OME"))
    run_slide(segmenter(scale=0.73), region_of(reader), tmp_path / "out", save=ALL)
    return tmp_path / "out"


def labels_of(out: Path) -> Any:
    return tifffile.imread(out / files.LABELS)


def test_the_pixel_size_is_carried_over_into_the_tiff(out: Path) -> None:
    with tifffile.TiffFile(out / files.LABELS) as tiff:
        page = tiff.pages[0]
        assert page.tags["ResolutionUnit"].value == 3  # centimetre
        across, per = page.tags["XResolution"].value
        assert per * 10_000 / across == pytest.approx(UM)


def test_ome_zarr_has_the_labels_a_pyramid_and_the_pixel_size(out: Path) -> None:
    import zarr

    group = zarr.open_group(str(out / files.ZARR), mode="r")
    labels = labels_of(out)
    assert labels.shape == (440, 520)
    about = dict(group.attrs)
    datasets = about["multiscales"][0]["datasets"]  # type: ignore[index, call-overload]
    assert [each["path"] for each in datasets] == ["0", "1", "2", "3"]  # type: ignore[index]
    for level, dataset in enumerate(datasets):  # type: ignore[arg-type]
        step = 2**level
        array: Any = group[str(level)]
        assert array.dtype == np.uint32
        assert np.array_equal(array[...], labels[::step, ::step])
        assert dataset["coordinateTransformations"] == [{"type": "scale", "scale": [UM * step] * 2}]  # type: ignore[index, call-overload]
    assert (out / files.ZARR / ".zgroup").is_file()  # NGFF 0.4 is Zarr 2
    assert (out / files.ZARR / "0" / "0" / "0").is_file()  # dimensions are separated by /


def test_ome_zarr_passes_the_validator(out: Path) -> None:
    models = pytest.importorskip("ome_zarr_models.v04.image_label", reason="pip install ome-zarr-models")
    import pydantic_zarr.v2
    import zarr
    from ome_zarr_models.v04.image import Image

    for model in (Image, models.ImageLabel):  # some versions leave this to the user
        model.model_rebuild(_types_namespace=vars(pydantic_zarr.v2))
    found = models.ImageLabel.from_zarr(zarr.open_group(str(out / files.ZARR), mode="r"))
    assert [axis.unit for axis in found.attributes.multiscales[0].axes] == ["micrometer"] * 2
    assert found.attributes.image_label.version == "0.4"


def test_naparis_reader_opens_ome_zarr(out: Path) -> None:
    reason = "pip install napari-ome-zarr, which brings napari"
    reader = pytest.importorskip("napari_ome_zarr._reader", reason=reason).napari_get_reader(str(out / files.ZARR))
    ((levels, about, kind),) = reader(str(out / files.ZARR))
    assert kind == "labels"
    assert about["scale"] == [UM, UM]
    assert about["units"] == ("micrometer", "micrometer")
    assert np.array_equal(np.asarray(levels[0]), labels_of(out))
    assert len(levels) == 4


def test_geojson_is_that_of_the_whole_image(out: Path) -> None:
    model = segmenter(scale=0.73)
    whole = model(mosaic(), field="full")
    segmented = replace(whole, name="mosaic.tif", pixel_size_um=UM).segmented
    expected = json.loads(geojson.encode(segmented))
    found = json.loads((out / files.GEOJSON).read_bytes())
    assert found["cellseg"] == expected["cellseg"]
    assert len(found["features"]) == len(expected["features"]) > 40
    for one, other in zip(found["features"], expected["features"], strict=True):
        assert one["properties"].pop("measurements") == pytest.approx(other["properties"].pop("measurements"))
        assert one == other  # outline, id, group


def test_parquet_is_cells_csv(out: Path) -> None:
    from pyarrow import csv, parquet

    table = parquet.read_table(out / files.PARQUET)
    assert table.num_rows == int(labels_of(out).max()) > 40
    said = csv.read_csv(out / slides.CELLS)
    assert table.column_names == said.column_names
    assert table["area_um2"].to_pylist() == said["area_um2"].to_pylist()


def test_an_image_without_cells_has_all_files(tmp_path: Path) -> None:
    zarr, parquet = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
    image = np.full((70, 30, 3), 230, np.uint8)
    run_slide(segmenter(scale=1.0), region_of(ArrayReader(image)), tmp_path, save=ALL)
    group = zarr.open_group(str(tmp_path / files.ZARR), mode="r")
    assert group["0"].shape == (70, 30)
    assert not group["0"][...].any()
    assert "unit" not in dict(group.attrs)["multiscales"][0]["axes"][0]  # the pixel size is not known
    assert json.loads((tmp_path / files.GEOJSON).read_bytes())["features"] == []
    assert parquet.read_table(tmp_path / files.PARQUET).num_rows == 0


def test_kinds_that_were_not_asked_for_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    region, model = region_of(ArrayReader(mosaic(1, 1))), segmenter(scale=1.0)
    run_slide(model, region, tmp_path, save=("geojson", "zarr"))
    assert not (tmp_path / files.LABELS).exists()
    (tmp_path / "own.txt").write_text("kept")
    run_slide(model, region, tmp_path, overwrite=True)  # its files must not pass for those of this run
    assert {path.name for path in tmp_path.iterdir()} - {".cellseg-lock"} == {
        *("own.txt", files.LABELS, slides.CELLS, slides.IMAGES, slides.OVERVIEW, slides.RECORD)
    }
    with pytest.raises(UsageError, match="cannot save rois of a streamed image; expected some of labels, zarr"):
        run_slide(model, region, tmp_path / "other", save=("rois",))


@pytest.mark.parametrize(("text", "kinds"), [("all", ALL), ("none", ()), ("zarr, labels", ("zarr", "labels"))])
def test_names_of_kinds(text: str, kinds: tuple[str, ...]) -> None:
    assert files.parse_kinds(text) == kinds


@pytest.mark.parametrize("text", ["", "all,labels", "overlays"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected labels, zarr, geojson, parquet, or all or none alone"):
        files.parse_kinds(text)


def test_classes_are_in_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    spec = make_spec(channels=("foreground", "boundary", "red", "platelet"), classes=("red", "platelet"))
    model = Segmenter(BoundaryBackend(spec), scale=1.0)
    image = mosaic(1, 1)
    run_slide(model, region_of(ArrayReader(image)), tmp_path, save=("geojson", "parquet"))
    whole = json.loads(geojson.encode(model(image, field="full").segmented))["features"]
    found = json.loads((tmp_path / files.GEOJSON).read_bytes())["features"]
    groups = [[each["properties"]["classification"] for each in features] for features in (found, whole)]
    assert groups[0] == groups[1]
    assert "red" in {group["name"] for group in groups[0]}
