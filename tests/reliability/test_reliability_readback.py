"""Every file that a run of the model that ships leaves, opened by the library of the program it is for.

Counts, areas, boxes and centroids must be those of cells.csv: on the validation photographs, and on two sample smears
so that something runs everywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import tifffile
from PIL import Image
from read_back import area_of, check_qupath, coco_of, quiet_decoding, regions, rings_of

from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command
from cellseg_deploy.run.output_folder import ALWAYS
from cellseg_deploy.samples import SmearParams, make_smear

pytestmark = pytest.mark.reliability

SIZED, PIXEL_SIZE_UM = "a.tif", 0.1
Row = dict[str, str]


@dataclass(frozen=True)
class Results:
    """An output folder with what its tables say: rows of images.csv by name, rows of cells.csv by image."""

    out: Path
    images: dict[str, Row]
    cells: dict[str, list[Row]]

    def file(self, folder: str, name: str, suffix: str) -> Path:
        return self.out / folder / f"{name}{suffix}"

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Height and width of each label image."""
        return {name: tifffile.imread(self.file("labels", name, ".tif")).shape for name in self.images}


def run(images: Path, out: Path) -> Results:
    arguments = [images, "-o", out, "--save", "all", "--count-rule", "frame", "-q"]
    assert console.run(command, [str(argument) for argument in arguments]) == 0
    rows = {row["image"]: row for row in running.rows(out / "images.csv")}
    cells: dict[str, list[Row]] = {name: [] for name in rows}
    for row in running.rows(out / "cells.csv"):
        cells[row["image"]].append(row)
    return Results(out, rows, cells)


@pytest.fixture(scope="session")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two sample smears: a TIFF that says how large its pixels are, and a PNG in a folder of its own that does not."""
    folder = tmp_path_factory.mktemp("smears")
    (folder / "sub").mkdir()
    params = SmearParams(size_hw=(600, 800), n_cells=45, cell_diameter_px=90)
    per_cm = 10_000 / PIXEL_SIZE_UM
    tifffile.imwrite(
        folder / SIZED,
        make_smear(params, 0).image_hwc,
        photometric="rgb",
        resolution=(per_cm, per_cm),
        resolutionunit=3,
    )
    Image.fromarray(make_smear(params, 1).image_hwc).save(folder / "sub" / "b.png")
    return run(folder, tmp_path_factory.mktemp("out") / "smears")


@pytest.fixture(scope="session")
def photographs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The ten validation photographs."""
    found = run(real_data / "bbbc041seg" / "val" / "images", tmp_path_factory.mktemp("out") / "photographs")
    assert len(found.images) == 10
    return found


@pytest.fixture(params=["smears", pytest.param("photographs", marks=pytest.mark.real)])
def results(request: pytest.FixtureRequest) -> Results:
    for package in ("onnxruntime", "roifile", "pyarrow", "pycocotools", "shapely"):
        pytest.importorskip(package)
    found: Results = request.getfixturevalue(request.param)
    assert sum(map(len, found.cells.values())) > 60  # there is something to compare
    return found


def numbers(rows: list[Row], *columns: str) -> np.ndarray:
    """Values (n, columns) of cells.csv."""
    return np.array([[float(row[column]) for column in columns] for row in rows]).reshape(len(rows), len(columns))


TYPES = {
    **dict.fromkeys(("image", "class", "left_out_by"), "string"),
    **dict.fromkeys(("touches_border", "counted"), "bool"),
    **dict.fromkeys(("label", "area_px"), "int64"),
    **{f"bbox_{side}_px": "int64" for side in ("left", "top", "width", "height")},
}
CENTROID = ("centroid_x_px", "centroid_y_px")
BOX = ("bbox_left_px", "bbox_top_px", "bbox_width_px", "bbox_height_px")


# --- tables among themselves


def test_images_csv_sums_up_cells_csv(results: Results) -> None:
    for name, row in results.images.items():
        cells, (height, width) = results.cells[name], results.sizes()[name]
        assert row["status"] == "done"
        assert int(row["cells"]) == len(cells)
        assert int(row["counted"]) == sum(cell["counted"] == "true" for cell in cells)
        areas = numbers(cells, "area_px")[:, 0]
        without_platelets = areas[[cell.get("class") != "platelet" for cell in cells]]
        assert float(row["median_cell_area_px"]) == pytest.approx(np.median(without_platelets))
        assert float(row["confluence"]) == pytest.approx(areas.sum() / (height * width), abs=1e-4)


def test_micrometres_are_pixels_times_their_size(smears: Results) -> None:
    rows = smears.cells[SIZED]
    assert numbers(rows, "area_um2") == pytest.approx(numbers(rows, "area_px") * PIXEL_SIZE_UM**2, rel=1e-3)
    for length in ("equivalent_diameter", "major_axis", "minor_axis", "perimeter"):
        um, px = numbers(rows, f"{length}_um"), numbers(rows, f"{length}_px")
        assert um == pytest.approx(px * PIXEL_SIZE_UM, rel=1e-3, abs=1e-3)
    assert float(smears.images[SIZED]["pixel_size_um"]) == pytest.approx(PIXEL_SIZE_UM)
    assert {row["area_um2"] for row in smears.cells["sub/b.png"]} == {""}


# --- label images: tifffile (and Fiji, QuPath, napari)


def test_label_images_hold_the_cells(results: Results) -> None:
    for name, rows in results.cells.items():
        with tifffile.TiffFile(results.file("labels", name, ".tif")) as file:
            labels = file.asarray()
        assert labels.dtype == np.uint16
        assert labels.max() == len(rows)
        y, x = np.nonzero(labels)
        at = labels[y, x].astype(np.int64) - 1
        area = np.bincount(at, minlength=len(rows))
        assert area.tolist() == numbers(rows, "area_px")[:, 0].tolist()
        centroids = np.stack([np.bincount(at, weights=values, minlength=len(rows)) / area for values in (x, y)], axis=1)
        assert centroids == pytest.approx(numbers(rows, *CENTROID), abs=6e-3)
        for row, label in zip(rows, range(1, len(rows) + 1), strict=True):
            own_y, own_x = y[at == label - 1], x[at == label - 1]
            box = (own_x.min(), own_y.min(), np.ptp(own_x) + 1, np.ptp(own_y) + 1)
            assert box == tuple(int(row[column]) for column in BOX)
            assert int(row["label"]) == label


# --- regions: roifile (and ImageJ)


def test_imagej_regions_are_the_cells(results: Results) -> None:
    import shapely

    for name, rows in results.cells.items():
        found = list(regions(results.file("rois", name, ".zip").read_bytes()))
        assert [int(roi.name) for roi in found] == [int(row["label"]) for row in rows]
        assert [area_of(roi) for roi in found] == numbers(rows, "area_px")[:, 0].tolist()
        boxes = [(roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top) for roi in found]
        assert np.array(boxes).tolist() == numbers(rows, *BOX).tolist()
        for roi, centroid in zip(found, numbers(rows, *CENTROID), strict=True):
            if len(rings := rings_of(roi)) == 1:
                centre = shapely.Polygon(rings[0]).centroid
                assert (centre.x - 0.5, centre.y - 0.5) == pytest.approx(tuple(centroid), abs=6e-3)


# --- GeoJSON: shapely, and QuPath's rules


def test_geojson_is_what_qupath_imports(results: Results) -> None:
    from shapely.geometry import shape

    for name, rows in results.cells.items():
        content = json.loads(results.file("geojson", name, ".geojson").read_bytes())
        check_qupath(content)
        assert content["cellseg"]["image"] == name
        shapes = [shape(feature["geometry"]) for feature in content["features"]]
        assert all(found.is_valid for found in shapes)
        assert [found.area for found in shapes] == numbers(rows, "area_px")[:, 0].tolist()
        left, top, width, height = numbers(rows, *BOX).T
        assert [found.bounds for found in shapes] == list(zip(left, top, left + width, top + height, strict=True))
        centroids = np.array([(found.centroid.x - 0.5, found.centroid.y - 0.5) for found in shapes])
        assert centroids == pytest.approx(numbers(rows, *CENTROID), abs=6e-3)
        for feature, row in zip(content["features"], rows, strict=True):
            measured = feature["properties"]["measurements"]
            assert set(measured) == {column for column in row if row[column]} - {"image", "class", "left_out_by"}
            for column, value in measured.items():
                said = {"true": 1.0, "false": 0.0}.get(row[column])
                expected = float(row[column]) if said is None else said
                assert value == pytest.approx(expected, rel=1e-3, abs=6e-3), column
            left_out = " not counted" if row["left_out_by"] == "border" else ""
            assert feature["properties"]["classification"]["name"] == row["class"] + left_out


# --- COCO: pycocotools


def check_annotations(coco: Any, image_id: int, rows: list[Row], size_hw: tuple[int, ...]) -> None:
    from pycocotools import mask

    described = coco.imgs[image_id]
    assert (described["height"], described["width"]) == size_hw
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
    masks = [annotation["segmentation"] for annotation in annotations]
    area = numbers(rows, "area_px")[:, 0].tolist()
    assert [annotation["area"] for annotation in annotations] == mask.area(masks).tolist() == area
    boxes = numbers(rows, *BOX).tolist()
    assert [annotation["bbox"] for annotation in annotations] == mask.toBbox(masks).tolist() == boxes
    assert [annotation["counted"] for annotation in annotations] == [row["counted"] == "true" for row in rows]
    for annotation, centroid in list(zip(annotations, numbers(rows, *CENTROID), strict=True))[::7]:
        y, x = np.nonzero(coco.annToMask(annotation))
        assert (x.mean(), y.mean()) == pytest.approx(tuple(centroid), abs=6e-3)


@quiet_decoding
def test_coco_masks_are_the_cells(results: Results) -> None:
    for name, rows in results.cells.items():
        coco = coco_of(results.file("coco", name, ".json"))
        assert [image["file_name"] for image in coco.imgs.values()] == [name]
        check_annotations(coco, next(iter(coco.imgs)), rows, results.sizes()[name])


@quiet_decoding
def test_one_coco_file_holds_all_images(results: Results) -> None:
    coco = coco_of(results.out / "coco.json")
    assert [image["file_name"] for image in coco.imgs.values()] == list(results.images)
    assert len(coco.anns) == sum(map(len, results.cells.values()))
    for image_id, image in coco.imgs.items():
        name = image["file_name"]
        check_annotations(coco, image_id, results.cells[name], results.sizes()[name])


# --- Parquet: pyarrow


def test_parquet_is_cells_csv(results: Results) -> None:
    from pyarrow import parquet

    table = parquet.read_table(results.out / "cells.parquet")
    rows = running.rows(results.out / "cells.csv")
    assert table.column_names == list(rows[0])
    assert table.num_rows == len(rows)
    for column in table.column_names:
        if TYPES.get(column) == "string":
            expected: list[Any] = [row[column] for row in rows]
        elif column in ("touches_border", "counted"):
            expected = [{"true": True, "false": False}[row[column]] for row in rows]
        else:
            expected = [float(row[column]) if row[column] else None for row in rows]
        assert table[column].to_pylist() == expected
        assert str(table.schema.field(column).type) == TYPES.get(column, "double")


# --- probabilities, confluence, pictures


def test_probabilities_are_those_the_cells_were_cut_from(results: Results) -> None:
    record = json.loads((results.out / "run.json").read_text())
    threshold = record["operating_point"]["foreground_threshold"]
    for name, row in results.images.items():
        with tifffile.TiffFile(results.file("probabilities", name, ".tif")) as file:
            planes, metadata = file.asarray(), file.imagej_metadata
        assert planes.dtype == np.uint16
        assert metadata is not None
        scale, (height, width) = float(row["scale"]), results.sizes()[name]
        assert planes.shape[1:] == (round(height * scale), round(width * scale))
        assert metadata["Labels"][0] == "foreground"
        foreground = planes[0] * metadata["c1"] + metadata["c0"]
        # The label under the middle of each pixel of the network. Holes are filled and specks dropped, so nearly all.
        y, x = ((2 * np.arange(n) + 1) / (2 * scale) for n in foreground.shape)
        labels = tifffile.imread(results.file("labels", name, ".tif"))
        is_cell = labels[np.ix_(y.astype(int).clip(0, height - 1), x.astype(int).clip(0, width - 1))] > 0
        assert np.mean(foreground[is_cell] >= threshold) > 0.95
        assert np.mean(foreground[~is_cell] >= threshold) < 0.1


def test_confluence_figures_add_up(results: Results) -> None:
    for name, rows in results.cells.items():
        squares = running.rows(results.file("confluence", name, ".csv"))
        assert sum(int(row["covered_px"]) for row in squares) == numbers(rows, "area_px").sum()
        assert sum(int(row["cells"]) for row in squares) == len(rows)
        assert sum(int(row["counted"]) for row in squares) == sum(row["counted"] == "true" for row in rows)
        whole = sum(int(row["width_px"]) * int(row["height_px"]) for row in squares)
        assert whole == np.prod(results.sizes()[name])


@pytest.mark.parametrize("kind", ["overlays", "numbered", "confluence"])
def test_pictures_are_whole_and_of_the_images_shape(results: Results, kind: str) -> None:
    for name, (height, width) in results.sizes().items():
        with Image.open(results.file(kind, name, ".jpg")) as picture:
            picture.load()
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            below = picture.height - height * picture.width / width  # classes of small overlays
            assert abs(below) <= 0.01 * picture.height or (kind != "confluence" and 30 < below < 90)


def test_nothing_else_is_left(results: Results) -> None:
    """Each image has one file of each kind, and no file belongs to none."""
    suffixes = {
        "labels": (".tif",),
        "overlays": (".jpg",),
        "numbered": (".jpg",),
        "rois": (".zip",),
        "geojson": (".geojson",),
        "coco": (".json",),
        "probabilities": (".tif",),
        "confluence": (".csv", ".jpg"),
    }
    expected = {
        f"{folder}/{name}{suffix}" for folder, kinds in suffixes.items() for suffix in kinds for name in results.images
    }
    expected |= {*ALWAYS, "cells.parquet", "coco.json", "results.xlsx", "run.json", "journal.jsonl"}
    found = {path.relative_to(results.out).as_posix() for path in results.out.rglob("*") if path.is_file()}
    assert found == expected
