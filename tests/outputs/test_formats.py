"""Every output format, opened again by the library of the program it is for; numbers agree with the table of cells."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from read_back import area_of, check_qupath, coco_of, quiet_decoding, regions, rings_of
from segmented_images import odd_labels, photographs, segmented, smear

from cellseg_deploy.cells.measure import COLUMNS, UM_COLUMNS
from cellseg_deploy.errors import BackendUnavailableError, OutputError, UsageError
from cellseg_deploy.outputs import formats, label_tiff, tables
from cellseg_deploy.outputs import segmented as segmented_module
from cellseg_deploy.outputs.names import LONGEST_SUFFIX_BYTES
from cellseg_deploy.outputs.segmented import SegmentedImage

BY_FILE = {f"{format.name}{format.suffix}": format for format in formats.FORMATS}


def made(format_name: str, image: SegmentedImage) -> bytes:
    return next(format for format in formats.FORMATS if format.name == format_name).encode(image)


def cell_rows(image: SegmentedImage) -> list[list[Any]]:
    """One row a cell: the image's name, then the cell's value of every column."""
    return [[image.name, *row] for row in zip(*(column.tolist() for column in image.columns.values()), strict=True)]


def cells_csv(image: SegmentedImage) -> list[dict[str, str]]:
    """The rows of cells.csv, read back."""
    header = tables.csv_rows([["image", *image.columns]])
    text = (header + tables.csv_rows(cell_rows(image))).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture(
    scope="module",
    params=[
        "smear",
        "odd",
        "all one cell",
        "no cell",
        "one pixel",
        pytest.param("photographs", marks=pytest.mark.real),
    ],
)
def images(request: pytest.FixtureRequest) -> list[SegmentedImage]:
    if request.param == "photographs":
        return list(photographs(request.getfixturevalue("real_data")))
    return {
        "smear": lambda: [smear()],
        "odd": lambda: [segmented(odd_labels())],
        "all one cell": lambda: [segmented(np.ones((5, 7)))],
        "no cell": lambda: [segmented(np.zeros((30, 40)))],
        "one pixel": lambda: [segmented(np.ones((1, 1)), pixel_size_um=0.25)],
    }[request.param]()


# --- each format, read back


def test_imagej_regions_cover_the_cells_pixels(images: list[SegmentedImage]) -> None:
    pytest.importorskip("roifile")
    for image in images:
        rows, found = cells_csv(image), list(regions(made("rois", image)))
        assert [int(roi.name) for roi in found] == [int(row["label"]) for row in rows]
        for roi, row in zip(found, rows, strict=True):
            assert area_of(roi) == int(row["area_px"])
            box = (roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top)
            assert box == tuple(int(row[f"bbox_{side}_px"]) for side in ("left", "top", "width", "height"))
            assert roi.position == 0
            window = image.labels[roi.top : roi.bottom, roi.left : roi.right]
            painted = np.zeros(window.shape, np.uint8)
            for ring in rings_of(roi):
                painted ^= filled(ring - (roi.left, roi.top), window.shape)
            assert np.array_equal(painted > 0, window == int(roi.name))
        assert {roi.stroke_color for roi in found} <= {b"\xff\x00\xff\x50", b"\xff\x96\x96\x96"}
        counted = [roi.stroke_color == b"\xff\x00\xff\x50" for roi in found]
        assert counted == [row["counted"] == "true" for row in rows]


def filled(ring: np.ndarray, hw: tuple[int, ...]) -> np.ndarray:
    """Pixels whose centre lies in a ring of pixel corners: an odd number of its vertical edges is to their left."""
    crossings = np.zeros((hw[0], hw[1] + 1), np.uint8)
    for (x, y), (_, next_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        crossings[min(y, next_y) : max(y, next_y), x] ^= 1
    return np.bitwise_xor.accumulate(crossings, axis=1)[:, : hw[1]]


def test_a_region_beyond_imagejs_16_bit_coordinates() -> None:
    pytest.importorskip("roifile")
    labels = np.zeros((4, 70_000), np.int32)
    labels[1:3, 69_000:69_500] = 1
    (roi,) = regions(made("rois", segmented(labels)))
    assert area_of(roi) == 1000
    assert rings_of(roi)[0].max(axis=0).tolist() == [69_500, 3]


def test_geojson_is_what_qupath_imports_with_the_cells_measurements(images: list[SegmentedImage]) -> None:
    geometry = pytest.importorskip("shapely.geometry")
    for image in images:
        content = json.loads(made("geojson", image))
        check_qupath(content)
        rows = cells_csv(image)
        assert content["cellseg"]["image"] == image.name
        for feature, row in zip(content["features"], rows, strict=True):
            shape = geometry.shape(feature["geometry"])
            assert shape.is_valid
            assert shape.area == int(row["area_px"])
            for part in getattr(shape, "geoms", [shape]):
                assert part.exterior.is_ccw
                assert not any(hole.is_ccw for hole in part.interiors)
            centroid = (float(row["centroid_x_px"]) + 0.5, float(row["centroid_y_px"]) + 0.5)
            assert (shape.centroid.x, shape.centroid.y) == pytest.approx(centroid, abs=1e-4)
            measured = feature["properties"]["measurements"]
            assert {name: tables.format_cell(measured[name]) for name in measured} == {
                name: {"true": "1", "false": "0"}.get(value, value) for name, value in row.items() if name != "image"
            }
            assert feature["properties"]["name"] == row["label"]
            assert feature["properties"]["classification"]["name"] == (
                "Cell" if row["counted"] == "true" else "Cell not counted"
            )


def check_coco(coco: Any, image_id: int, image: SegmentedImage) -> None:
    mask = pytest.importorskip("pycocotools.mask")
    described = coco.imgs[image_id]
    assert (described["height"], described["width"]) == image.labels.shape
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
    for annotation, row in zip(annotations, cells_csv(image), strict=True):
        assert annotation["label"] == int(row["label"])
        assert annotation["counted"] == (row["counted"] == "true")
        assert annotation["area"] == mask.area(annotation["segmentation"]) == int(row["area_px"])
        assert annotation["bbox"] == mask.toBbox(annotation["segmentation"]).tolist()
        if image.labels.size > 1_000_000 and annotation["label"] % 10:
            continue  # of a photograph every tenth mask
        assert np.array_equal(coco.annToMask(annotation) > 0, image.labels == annotation["label"])
        # the very bytes that pycocotools makes of the mask: canonical, so that programs may compare them
        own = mask.encode(np.asfortranarray(image.labels == annotation["label"], np.uint8))
        assert annotation["segmentation"]["counts"].encode() == own["counts"]


@quiet_decoding
def test_coco_masks_are_the_cells(images: list[SegmentedImage], tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    for image in images:
        (tmp_path / "coco.json").write_bytes(made("coco", image))
        coco = coco_of(tmp_path / "coco.json")
        assert coco.imgs[1]["file_name"] == image.name
        assert [category["name"] for category in coco.cats.values()] == ["cell"]
        check_coco(coco, 1, image)


def test_a_coco_part_that_cannot_be_read_is_no_error_of_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone\.json: cannot be read") as caught:
        BY_FILE["coco.json"].finish(tmp_path, [tmp_path / "gone.json"], tmp_path / "coco.json")
    assert "written" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@quiet_decoding
def test_coco_files_become_one(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    several = [
        smear(0),
        segmented(np.zeros((3, 4)), name="none.png"),
        segmented(odd_labels(), name="odd.png"),
        smear(1, n_cells=12),
    ]
    parts = [tmp_path / f"{number}.json" for number in range(len(several))]
    for part, image in zip(parts, several, strict=True):
        part.write_bytes(made("coco", image))
    BY_FILE["coco.json"].finish(tmp_path, parts, tmp_path / "coco.json")
    content = json.loads((tmp_path / "coco.json").read_bytes())
    assert [annotation["id"] for annotation in content["annotations"]] == list(range(1, 1 + sum(map(cells, several))))
    coco = coco_of(tmp_path / "coco.json")
    assert [coco.imgs[number]["file_name"] for number in (1, 2, 3, 4)] == [image.name for image in several]
    for number, image in enumerate(several, start=1):
        check_coco(coco, number, image)
    BY_FILE["coco.json"].finish(tmp_path, [], tmp_path / "coco.json")
    assert json.loads((tmp_path / "coco.json").read_bytes())["images"] == []


def cells(image: SegmentedImage) -> int:
    return len(image.table)


def test_probabilities_keep_sixteen_bits_and_their_scale() -> None:
    image = smear()
    random = np.random.default_rng(0).random(image.probabilities_khw.shape, np.float32)
    random[:, 0, 0], random[:, 0, 1] = 0, 1
    image = segmented(image.labels, image.pixels_hwc, probabilities_khw=random, pixel_size_um=0.1)
    with tifffile.TiffFile(io.BytesIO(made("probabilities", image))) as file:
        planes, metadata = file.asarray(), file.imagej_metadata
        assert file.series[0].axes == "CYX"
        # ImageJ reads strips only, and undoes a predictor only for LZW
        assert all(not page.is_tiled and page.predictor == 1 and page.compression in (8, 32946) for page in file.pages)
        assert "DateTime" not in file.pages[0].tags  # type: ignore[union-attr]
        tags = file.pages[0].tags  # type: ignore[union-attr]
        per_um = tags["XResolution"].value
        assert per_um[0] / per_um[1] == pytest.approx(0.5 / 0.1)
    assert planes.dtype == np.uint16
    assert planes.shape == random.shape
    assert planes[:, 0, 0].tolist() == [0, 0]
    assert planes[:, 0, 1].tolist() == [65535, 65535]
    assert metadata is not None
    # as ImageJ calibrates: value * c1 + c0
    assert np.abs(planes * metadata["c1"] + metadata["c0"] - random).max() <= 0.51 / 65535
    assert (metadata["cf"], metadata["vunit"], metadata["unit"]) == (0, "probability", "um")
    assert metadata["Labels"] == ["foreground", "boundary"]
    info = json.loads(metadata["Info"])
    assert info["model_px_per_image_px"] == 0.5
    assert info["pixel_size_um"] == pytest.approx(0.2)
    assert (info["image_height_px"], info["image_width_px"]) == image.labels.shape


def test_one_channel_is_a_plain_plane() -> None:
    image = segmented(np.ones((20, 30)), probabilities_khw=np.ones((1, 20, 30), np.float32), channels=("foreground",))
    with tifffile.TiffFile(io.BytesIO(made("probabilities", image))) as file:
        assert file.asarray().shape == (20, 30)
        assert file.asarray().min() == 65535


@pytest.mark.parametrize("hw", [(1, 1), (7, 1), (1, 7), (300, 1)])
def test_thin_planes_are_read_again(hw: tuple[int, int]) -> None:
    probabilities = np.linspace(0, 1, 2 * hw[0] * hw[1], dtype=np.float32).reshape(2, *hw)
    with tifffile.TiffFile(
        io.BytesIO(made("probabilities", segmented(np.ones(hw), probabilities_khw=probabilities)))
    ) as file:
        assert np.array_equal(file.asarray().reshape(2, *hw), np.rint(probabilities * 65535))


def test_label_tiff_knows_the_pixel_size(images: list[SegmentedImage]) -> None:
    for image in images:
        with tifffile.TiffFile(io.BytesIO(made("labels", image))) as file:
            assert np.array_equal(file.asarray(), image.labels)
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            if image.pixel_size_um is not None:
                assert page.resolutionunit == 3  # centimetre
                assert [10_000 / value for value in page.resolution] == pytest.approx([image.pixel_size_um] * 2)


@pytest.mark.parametrize(("hw", "numbers"), [((37, 53), 300), ((1, 1), 2), ((13, 60), 70_000), ((26, 2), 9)])
def test_label_strips_are_those_that_tifffile_compresses(hw: tuple[int, int], numbers: int) -> None:
    labels = np.random.default_rng(0).integers(0, numbers, hw).astype(np.int32).repeat(20, axis=0).repeat(20, axis=1)
    expected = io.BytesIO()
    tifffile.imwrite(
        expected,
        labels.astype(np.uint16 if labels.max() < 65_536 else np.uint32),
        photometric="minisblack",
        compression="zlib",
        compressionargs={"level": 6},
        predictor=False,
        rowsperstrip=256,
        maxworkers=1,
        metadata=None,
        software="cellseg-deploy",
        datetime=None,
    )
    assert label_tiff.encode(labels) == expected.getvalue()


def test_an_overlay_drawn_over_its_image_is_the_same_picture() -> None:
    labels = np.zeros((700, 800), np.int32)
    labels[100:200, 100:250], labels[300:420, 500:640] = 1, 2
    pixels = np.random.default_rng(0).integers(0, 255, (700, 800, 3)).astype(np.uint8)
    image = segmented(labels, pixels.copy())
    expected = made("overlays", image)
    assert np.array_equal(image.pixels_hwc, pixels)
    assert made("overlays", replace(image, pixels_are_spare=True)) == expected
    assert not np.array_equal(image.pixels_hwc, pixels)
    image.pixels_hwc[:] = pixels
    image.pixels_hwc.flags.writeable = False
    assert made("overlays", replace(image, pixels_are_spare=True)) == expected


def test_confluence_figures_add_up_to_the_image(images: list[SegmentedImage]) -> None:
    for image in images:
        rows = list(csv.DictReader(io.StringIO(BY_FILE["confluence.csv"].encode(image).decode())))
        number = {name: np.array([int(row[name]) for row in rows]) for name in rows[0] if name != "confluence"}
        assert number["covered_px"].sum() == np.count_nonzero(image.labels)
        assert number["cells"].sum() == len(image.table)
        assert number["counted"].sum() == image.counted.sum()
        assert (number["width_px"] * number["height_px"]).sum() == image.labels.size
        assert max(np.ptp(number["width_px"]), np.ptp(number["height_px"])) <= 1
        for row in rows:
            left, top, width, height = (int(row[f"{side}_px"]) for side in ("left", "top", "width", "height"))
            window = image.labels[top : top + height, left : left + width]
            assert int(row["covered_px"]) == np.count_nonzero(window)
            assert row["confluence"] == tables.format_cell(float((window > 0).mean()))


def test_confluence_figures_are_computed_once_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    made_grids = []
    real = segmented_module.grid
    monkeypatch.setattr(segmented_module, "grid", lambda *given: made_grids.append(given) or real(*given))
    image = segmented(odd_labels())
    assert BY_FILE["confluence.jpg"].encode(image)
    assert BY_FILE["confluence.csv"].encode(image)
    assert len(made_grids) == 1


@pytest.mark.parametrize("name", ["labels.tif", "probabilities.tif"])
def test_tifffile_compresses_in_the_thread_that_calls_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures large enough that it would start a pool."""
    started = []
    real = ThreadPoolExecutor.submit
    monkeypatch.setattr(tifffile.TIFF, "MAXWORKERS", 4)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *given, **more: started.append(1) or real(*given, **more))
    labels = np.zeros((3000, 1000), np.int32)
    labels[10:20, 10:20] = 1
    assert BY_FILE[name].encode(segmented(labels, probabilities_khw=np.zeros((2, 3000, 1000), np.float32), scale=1.0))
    assert not started


def test_confluence_squares_of_a_smear() -> None:
    labels = np.zeros((120, 160), np.int32)
    labels[0:20, 0:20] = 1  # the first square whole
    labels[30:40, 39:41] = 2  # over a border, its centroid exactly on it: with the square behind it
    rows = list(csv.DictReader(io.StringIO(BY_FILE["confluence.csv"].encode(segmented(labels)).decode())))
    assert len(rows) == 8 * 6
    assert (rows[0]["confluence"], rows[0]["cells"]) == ("1.0000", "1")
    second = {(row["row"], row["column"]): (row["covered_px"], row["cells"]) for row in rows}
    assert (second["1", "1"], second["1", "2"]) == (("10", "0"), ("10", "1"))


@pytest.mark.parametrize("name", ["overlays.jpg", "numbered.jpg", "confluence.jpg"])
def test_pictures_can_be_opened_and_differ_by_what_they_show(name: str) -> None:
    image = smear()
    data = BY_FILE[name].encode(image)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    assert picture.shape == image.pixels_hwc.shape
    label = int(np.argmax(image.table.columns["area_px"] * ~image.table.columns["touches_border"])) + 1
    inside = cv2.erode((image.labels == label).astype(np.uint8), np.ones((7, 7))) > 0
    y, x = (int(image.table.columns[f"centroid_{axis}_px"][label - 1]) for axis in "yx")
    around = np.zeros_like(inside)
    around[y - 6 : y + 7, x - 10 : x + 11] = True
    change = np.abs(picture - image.pixels_hwc)
    if name == "confluence.jpg":  # the covered area is tinted: (1 - 0.35) of the image and 0.35 of green
        plain = inside & ~around
        assert np.median(picture[plain, 1] - image.pixels_hwc[plain, 1]) > 20
        assert np.median(np.abs(picture - image.pixels_hwc)[image.labels == 0]) <= 2
    elif name == "numbered.jpg":
        assert (picture[around].min(axis=1) > 200).sum() > 10  # white letters at the centre
    else:
        assert change[inside].max() < 60  # cells themselves are left as they are


@pytest.mark.parametrize("hw", [(1, 1), (13, 5000), (5000, 13), (5, 7), (7, 9)])
@pytest.mark.parametrize("file", [name for name, format in BY_FILE.items() if format.encoder])
def test_any_size_and_no_cell(file: str, hw: tuple[int, int]) -> None:
    format = BY_FILE[file]
    for package in format.packages:
        pytest.importorskip(package)
    labels = np.zeros(hw, np.int32)
    assert format.encode(segmented(labels))
    labels[0, -1] = 1
    probabilities = np.zeros((2, 1, 1), np.float32)
    assert format.encode(segmented(labels, probabilities_khw=probabilities, scale=1 / 32))


@pytest.mark.parametrize("block_bytes", [1 << 22, 400])
def test_parquet_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(
        "cellseg_deploy.outputs.parquet._BLOCK_BYTES", block_bytes
    )  # names with line ends across blocks
    parquet = pytest.importorskip("pyarrow.parquet")
    image = segmented(odd_labels(), name='=quo"te,\nline.png', pixel_size_um=0.3)
    rows = [["image", *image.columns], *cell_rows(image)]
    rows += [[f"{row[0]} {number}", *row[1:]] for number in range(20) for row in rows[1:]]
    rows += [["None", *row[1:]] for row in rows[1:3]]
    (tmp_path / "cells.csv").write_bytes(tables.csv_rows(rows))
    BY_FILE["parquet"].finish(tmp_path, [], tmp_path / "cells.parquet")
    table = parquet.read_table(tmp_path / "cells.parquet")
    with (tmp_path / "cells.csv").open(newline="", encoding="utf-8") as file:
        text = list(csv.DictReader(file))
    assert table.column_names == list(text[0])
    assert [{key: tables.format_cell(value) for key, value in row.items()} for row in table.to_pylist()] == [
        {**row, "image": tables.format_cell(row["image"])} for row in text
    ]
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["image"] == "string"
    assert types["label"] == types["area_px"] == types["bbox_left_px"] == "int64"
    assert types["counted"] == types["touches_border"] == "bool"
    assert types["area_um2"] == types["centroid_x_px"] == "double"
    (tmp_path / "cells.csv").write_bytes(tables.csv_rows([rows[0]]))
    BY_FILE["parquet"].finish(tmp_path, [], tmp_path / "cells.parquet")
    assert parquet.read_table(tmp_path / "cells.parquet").num_rows == 0


# --- micrometres


def test_micrometres_are_pixels_times_their_size() -> None:
    image = segmented(odd_labels(), pixel_size_um=0.5)
    columns = image.columns
    assert list(columns) == [*COLUMNS, "counted", *UM_COLUMNS]
    assert columns["area_um2"].tolist() == (columns["area_px"] * 0.25).tolist()
    for name in ("equivalent_diameter", "major_axis", "minor_axis", "perimeter"):
        assert columns[f"{name}_um"].tolist() == (columns[f"{name}_px"] * 0.5).tolist()
    assert list(segmented(odd_labels()).columns) == [*COLUMNS, "counted"]


# --- the registry


def test_same_image_same_bytes() -> None:
    image = segmented(odd_labels())
    for format in BY_FILE.values():
        if format.encoder and all(_installed(package) for package in format.packages):
            assert format.encode(image) == format.encode(segmented(odd_labels())), format.name


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_names_that_are_no_unicode_reach_no_encoder(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.png")
    image = segmented(odd_labels(), name=name)
    for format in BY_FILE.values():
        if format.encoder and all(_installed(package) for package in format.packages):
            format.encode(image)
    assert json.loads(made("geojson", image))["cellseg"]["image"] == "a\\udcff.png"


def test_every_format_has_a_place_of_its_own_and_a_suffix_that_names_leave_room_for() -> None:
    places = [(format.folder, format.suffix) for format in formats.FORMATS if format.encoder]
    assert len(set(places)) == len(places)
    run_files = [format.run_file for format in formats.FORMATS if format.finisher]
    assert len(set(run_files)) == len(run_files)
    assert max(len(format.suffix) for format in formats.FORMATS) == LONGEST_SUFFIX_BYTES
    assert all(bool(format.encoder) == bool(format.folder) == bool(format.suffix) for format in formats.FORMATS)
    assert all(bool(format.finisher) == bool(format.run_file) for format in formats.FORMATS)


def test_choosing() -> None:
    assert formats.parse_names(" geojson, labels ") == ("labels", "geojson")
    assert formats.parse_names("none") == ()
    assert formats.parse_names("all") == formats.NAMES
    assert formats.parse_names(",".join(formats.DEFAULT)) == formats.DEFAULT
    for wrong in ("", "everything", "labels,none", "labels all"):
        with pytest.raises(UsageError, match="cannot save"):
            formats.parse_names(wrong)
    assert [format.suffix for format in formats.chosen_formats(("confluence",))] == [".jpg", ".csv"]


def test_a_missing_library_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellseg_deploy.outputs import requirements

    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"roifile, pyarrow.*pip install 'cellseg-deploy\[outputs\]'"):
        formats.chosen_formats(("rois", "labels", "parquet"))
    assert BackendUnavailableError.exit_code == 8
    assert formats.chosen_formats(("labels", "overlays", "geojson", "confluence", "probabilities"))


@pytest.mark.parametrize(
    "changes",
    [
        lambda image: {"pixels": np.zeros((9, 9, 3), np.uint8)},
        lambda image: {"counted": np.ones(1, np.bool_)},
        lambda image: {"channels": ("foreground",)},
    ],
)
def test_what_does_not_belong_together_is_refused(changes: Callable[[SegmentedImage], dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be|planes"):
        segmented(odd_labels(), **changes(segmented(odd_labels())))


def test_one_name_is_not_a_sequence_of_letters() -> None:
    with pytest.raises(UsageError, match="`save` must be a sequence of names, got 'labels'"):
        formats.chosen_formats("labels")
