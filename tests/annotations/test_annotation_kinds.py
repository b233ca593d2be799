"""Cells from the files of other programs: the same label images as those they were made from."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotation_files as kinds
import numpy as np
import pytest
import roifile
from made_images import picture
from PIL import Image
from segmented_images import classified, odd_labels, smear

from cellseg_deploy.annotations.labels import as_label_images, find_labels
from cellseg_deploy.annotations.shapes import Shape, are_traced, fill, fill_trace, is_trace, paint_shapes
from cellseg_deploy.cells.polygons import cell_polygons
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images.read import pair_by_stem, read_labels, read_numbered_labels
from cellseg_deploy.outputs import geojson, imagej_roi


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Two photographs, and the true labels of one smear and of an empty field."""
    folder = tmp_path_factory.mktemp("images")
    made = smear(n_cells=20)
    kinds.png(folder / "a.png", made.pixels_hwc)
    kinds.png(folder / "b.png", made.pixels_hwc)
    return folder, {"a.png": made.labels, "b.png": np.zeros_like(made.labels)}


def labels_of(images: Path, given: Path, place: Path) -> dict[str, np.ndarray]:
    made = as_label_images(images, given, lambda: place)
    return {pair.stem: read_labels(pair.mask) for pair in pair_by_stem(images, made.folder)}


@pytest.mark.parametrize("kind", kinds.EXACT)
def test_every_kind_gives_the_very_labels(kind: str, truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    images, true = truth
    kinds.EXACT[kind](true, tmp_path / "given")
    found = labels_of(images, tmp_path / "given", tmp_path / "made")
    assert list(found) == ["a", "b"]
    assert np.array_equal(found["a"], true["a.png"])
    assert not found["b"].any()


@pytest.mark.parametrize("kind", kinds.OUTLINES)
def test_polygons_of_other_programs_give_the_cells(
    kind: str, truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    images, true = truth
    kinds.OUTLINES[kind](true, tmp_path / "given")
    source = find_labels(images, tmp_path / "given")
    found = source.read("a", true["a.png"].shape).labels
    overlap = kinds.iou_per_cell(true["a.png"], found)
    assert len(overlap) == found.max() > 15
    assert min(overlap) >= (0.95 if kind in kinds.ROUGH else 1)
    remark = f"outlines through the centres of border pixels, read with these pixels: {len(overlap)}"
    assert (remark in " ".join(source.said)) == (kind not in kinds.ROUGH)


def test_only_outlines_through_pixel_centres_are_taken_as_such() -> None:
    disc = np.hypot(*np.mgrid[-9:10, -9:10]) <= 7.5
    (traced,) = kinds.contours(disc.astype(np.uint8), 1)
    for shift in (0, 0.5):
        assert is_trace([traced + float(shift)])
        assert np.array_equal(fill_trace([traced + float(shift)], disc.shape), disc)
    (cell,) = cell_polygons(disc.astype(np.int32))
    ((along_edges,),) = cell.polygons
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    drawn = np.stack([9 + 7.5 * np.cos(angle), 9 + 7.5 * np.sin(angle)], axis=1)
    triangle = np.array([[0, 0], [8, 0], [8, 8.0]])
    for ring in (along_edges, drawn, np.rint(drawn * 3), triangle, traced + 0.25):
        assert not is_trace([ring])


@pytest.mark.parametrize("radius", [3.5, 5.5, 9.0, 10.5])
def test_simplified_outlines_beside_others_are_no_traces(radius: float) -> None:
    """Small cells simplified have such edges by chance: taken for traces they would grow by up to a quarter."""
    import cv2

    def simplified(of: float) -> tuple[Shape, int]:
        disc = np.hypot(*np.mgrid[-30:31, -30:31]) <= of
        (cell,) = cell_polygons(disc.astype(np.int32))
        ring = cv2.approxPolyDP(cell.polygons[0][0].astype(np.int32)[:, None], 0.75, closed=True)[:, 0]
        return Shape("a", ((ring.astype(float),),)), int(np.count_nonzero(disc))

    small, large = simplified(radius), simplified(25)
    for one in (small, large):
        found = np.count_nonzero(paint_shapes([one[0]], (61, 61), "a").labels)
        assert abs(found - one[1]) <= 0.11 * one[1]
    assert not are_traced([small[0], large[0]])


def test_small_and_straight_cells_of_a_traced_image_keep_their_border_pixels() -> None:
    labels = np.zeros((80, 80), np.int32)
    labels[np.hypot(*np.mgrid[-20:60, -20:60]) <= 12.5] = 1
    labels[np.hypot(*np.mgrid[-60:20, -60:20]) <= 12.5] = 2
    labels[5:14, 50:56], labels[20:22, 60:62], labels[40, 60:66], labels[50, 60] = 3, 4, 5, 6
    shapes = [Shape("a", (tuple(kinds.contours((labels == n).astype(np.uint8), 1)),)) for n in range(1, 7)]
    painted = paint_shapes(shapes, labels.shape, "a")
    assert (painted.traced, painted.lost) == (6, 0)
    assert np.array_equal(painted.labels, labels)


def test_holes_pieces_and_corners_survive_rois_and_geojson(tmp_path: Path) -> None:
    labels = odd_labels()
    kinds.png(tmp_path / "images" / "a.png", np.zeros((*labels.shape, 3), np.uint8))
    for name, write in {"rois": kinds.rois, "qupath": kinds.qupath, "rle": kinds.coco_rle}.items():
        write({"a.png": labels}, tmp_path / name)
        found = labels_of(tmp_path / "images", tmp_path / name, tmp_path / f"made {name}")
        assert np.array_equal(found["a"], labels), name


def test_one_cell_in_two_pieces_stays_one_cell(tmp_path: Path) -> None:
    """A binary mask would be two: what this package wrote is no binary mask."""
    labels = np.zeros((30, 30), np.int32)
    labels[2:9, 2:9] = labels[15:25, 15:25] = 1
    kinds.png(tmp_path / "images" / "a.png", np.zeros((30, 30, 3), np.uint8))
    kinds.rois({"a.png": labels}, tmp_path / "rois")
    assert np.array_equal(labels_of(tmp_path / "images", tmp_path / "rois", tmp_path / "made")["a"], labels)


def test_what_was_read_is_said(truth: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    images, true = truth
    kinds.rois(true, tmp_path / "given")
    n = int(true["a.png"].max())
    with zipfile.ZipFile(tmp_path / "given" / "a.zip", "a") as archive:
        for number, (left, top) in enumerate([(300, 200), (304, 200)]):
            roi = roifile.ImagejRoi.frompoints(np.array([[0, 0], [20, 0], [20, 20], [0, 20]]) + np.array([left, top]))
            archive.writestr(f"more-{number}.roi", roi.tobytes())
    source = find_labels(images, tmp_path / "given")
    labels = source.read("a", true["a.png"].shape).labels
    source.read("b", true["a.png"].shape)
    assert str(source).startswith(f"2 images, {labels.max():,} cells from ImageJ ROIs, ")
    assert "overlapping by more than half" in str(source)
    assert n <= labels.max() <= n + 2


def test_the_smaller_of_two_overlapping_shapes_wins_whatever_the_order() -> None:
    large = Shape("large", ((np.array([[0, 0], [10, 0], [10, 10], [0, 10.0]]),),), "red")
    small = Shape("small", ((np.array([[5, 5], [9, 5], [9, 9], [5, 9.0]]),),), "white")
    for shapes in ([large, small], [small, large]):
        painted = paint_shapes(shapes, (12, 12), "a.png")
        sizes = dict(zip(painted.classes, np.bincount(painted.labels.ravel())[1:], strict=True))
        assert sizes == {"red": 100 - 16, "white": 16}
        assert painted.overlapping == 1
    twice = paint_shapes([small, small], (12, 12), "a.png")
    assert (twice.labels.max(), twice.lost, twice.overlapping) == (1, 1, 2)
    beyond = Shape("beyond", ((np.array([[20, 20], [30, 20], [30, 30.0]]),),))
    with pytest.raises(DataError, match=r"beyond: .*lies outside a\.png, which is 12 x 12 px"):
        paint_shapes([beyond], (12, 12), "a.png")


def test_filling_takes_the_pixels_whose_centre_is_inside() -> None:
    from skimage.measure import points_in_poly

    rng = np.random.default_rng(1)
    y, x = np.mgrid[:30, :40]
    for _ in range(20):
        ring = rng.uniform((-5, -5), (45, 35), (7, 2))
        inside = points_in_poly(np.stack([x.ravel(), y.ravel()], axis=1) + 0.5, ring).reshape(30, 40)
        assert np.array_equal(fill([ring], (30, 40)), inside)
    halves = np.array([[3.5, 2.5], [20.5, 2.5], [20.5, 11.5], [3.5, 11.5]])  # edges through pixel centres
    beside = halves + np.array([17, 0])
    assert not (fill([halves], (30, 40)) & fill([beside], (30, 40))).any()
    assert fill([halves], (30, 40)).sum() == 17 * 9


def test_classes_come_along(tmp_path: Path) -> None:
    made = smear(n_cells=12)
    kinds.png(tmp_path / "images" / "a.png", made.pixels_hwc)
    image = classified(made.labels)
    names = [image.classes.names[index] for index in image.classes.index] if image.classes else []
    encoders: dict[str, Callable[[Any], bytes]] = {"a.zip": imagej_roi.encode, "a.geojson": geojson.encode}
    for file, encode in encoders.items():
        kinds.write(tmp_path / file / file, encode(image))
        source = find_labels(tmp_path / "images", tmp_path / file)
        assert list(source.read("a", made.labels.shape).classes) == names, file
    kinds.yolo({"a.png": made.labels}, tmp_path / "yolo")
    labelled = as_label_images(tmp_path / "images", tmp_path / "yolo", lambda: tmp_path / "made")
    assert labelled.classes is not None
    rows = [line.split(",") for line in labelled.classes.read_text().splitlines()]
    _, numbers = read_numbered_labels(labelled.folder / "a.tif")
    assert rows[0] == ["image", "label", "class"]
    assert [row[2] for row in rows[1:]] == ["white" if label % 2 else "red" for label in numbers[1:].tolist()]


class Payload:
    """Pickled, it would write a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.reliability
def test_a_malicious_cellpose_file_runs_nothing(tmp_path: Path) -> None:
    kinds.png(tmp_path / "images" / "a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "given").mkdir()
    content: Any = {"masks": np.ones((4, 4), np.uint16), "filename": Payload(tmp_path / "run")}
    np.save(tmp_path / "given" / "a_seg.npy", content)
    with pytest.raises(DataError, match=r"a_seg\.npy: .*builtins\.exec.*nothing of it was run"):
        find_labels(tmp_path / "images", tmp_path / "given").read("a", (4, 4))
    assert not (tmp_path / "run").exists()
    np.load(tmp_path / "given" / "a_seg.npy", allow_pickle=True)  # numpy does run it: the file is what it claims to be
    assert (tmp_path / "run").exists()


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a_seg.npy", b"\x93NUMPY\x01\x00", "no array that can be read"),
        ("a_seg.npy", pickle.dumps({"masks": 1}), "no array that can be read"),
        ("a.zip", b"PK\x03\x04 cut", "damaged"),
        ("a.zip", b"Iout\0\0", "damaged"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": [', "damaged json"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": [{"geometry": {"type": "Point"}}]}', "a Point"),
        ("a.json", b"{}", "without images and annotations"),
        ("a.json", b"[" * 100_000, "damaged json"),
        (
            "a.json",
            b'{"images": [{"id": [], "file_name": "a.png"}], "annotations": []}',
            r"id is \[\]; expected a number",
        ),
        ("a.json", b'{"images": [], "annotations": [{"image_id": {}}]}', r"image_id is \{\}; expected a number"),
        (
            "a.geojson",
            b'{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1' + b"0" * 400 + b", 0]]]}}",
            "coordinates that cannot be read",
        ),
        ("a.txt", b"0 0.1 0.1 0.2 0.2", "a box, not a polygon"),
        ("a.txt", b"0 0.1 0.1 0.2 0.2 x 0.1", "not a number"),
        ("a.txt", b"0 0.1 0.1 0.2 0.2 0.3 1.7", "corners outside 0 to 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_damaged_files_are_named(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    kinds.png(tmp_path / "images" / "a.png", np.zeros((10, 10, 3), np.uint8))
    kinds.write(tmp_path / "given" / name, data)
    with pytest.raises(DataError, match=rf"{name}.*{words}"):
        find_labels(tmp_path / "images", tmp_path / "given").read("a", (10, 10))


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [10, 10], "counts": [5, 5]}, "10 px in all"),
        ({"size": [10, 10], "counts": [5, -5, 100]}, "no whole numbers"),
        ({"size": [10, 10], "counts": "~~~~"}, "run lengths with '~'"),
        ({"size": [99, 10], "counts": [990]}, "image of 10 x 99 px, but a.png is 10 x 10"),
        ({"size": [10**9, 10**9], "counts": "0"}, r"expected \[height, width\]"),
        ([[1, 2, 3, 4]], "no list of x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not a number"),
        ([[1, 2, 3, 4, 5, 1e300]], "coordinates that are no pixels"),
        ([], "given as `boxes`"),
    ],
)
def test_damaged_segmentations_are_named(segmentation: Any, words: str, tmp_path: Path) -> None:
    kinds.png(tmp_path / "images" / "a.png", np.zeros((10, 10, 3), np.uint8))
    kinds.coco_file({"a.png": np.ones((10, 10), np.uint8)}, tmp_path / "coco", lambda *_: segmentation)
    source = find_labels(tmp_path / "images", tmp_path / "coco" / "annotations.json")
    with pytest.raises(DataError, match=rf"annotations\.json, annotation 1: .*{words}"):
        source.read("a", (10, 10))


def roi(kind: str, **settings: Any) -> bytes:
    box = {"left": 2, "top": 3, "right": 12, "bottom": 9}
    return bytes(roifile.ImagejRoi(roitype=roifile.ROI_TYPE[kind], **{**box, **settings}).tobytes())


def test_ovals_and_rectangles_are_cells_and_lines_are_not(tmp_path: Path) -> None:
    kinds.png(tmp_path / "images" / "a.png", np.zeros((20, 20, 3), np.uint8))

    def read(data: bytes) -> np.ndarray:
        kinds.write(tmp_path / "given" / "a.roi", data)
        return find_labels(tmp_path / "images", tmp_path / "given").read("a", (20, 20)).labels

    expected = np.zeros((20, 20), np.int32)
    expected[3:9, 2:12] = 1
    assert np.array_equal(read(roi("RECT")), expected)
    oval = read(roi("OVAL"))
    assert abs(int(oval.sum()) - np.pi * 5 * 3) < 3
    assert not oval[expected == 0].any()
    for kind, words in {"LINE": "line", "POINT": "point", "FREELINE": "freehand line"}.items():
        points = {} if kind == "LINE" else {"n_coordinates": 3, "integer_coordinates": np.zeros((3, 2), np.int32)}
        with pytest.raises(DataError, match=rf"\({words}\) is no area of a cell"):
            read(roi(kind, **points))
    with pytest.raises(DataError, match="rounded rectangle"):
        read(roi("RECT", rounded_rect_arc_size=4))


def test_a_folder_of_several_kinds_is_refused_and_label_images_come_first(tmp_path: Path) -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[3:9, 3:9] = 1
    kinds.png(tmp_path / "images" / "a.png", np.zeros((20, 20, 3), np.uint8))
    kinds.rois({"a.png": labels}, tmp_path / "given")
    kinds.qupath({"a.png": labels}, tmp_path / "given")
    with pytest.raises(DataError, match=r"QuPath GeoJSON \(a\.geojson\) and ImageJ ROIs \(a\.zip\); which are meant"):
        find_labels(tmp_path / "images", tmp_path / "given")
    kinds.png(tmp_path / "given" / "a_masks.png", labels.astype(np.uint8))
    assert find_labels(tmp_path / "images", tmp_path / "given").kind == "label images"
    with pytest.raises(UsageError, match="no such file or folder"):
        find_labels(tmp_path / "images", tmp_path / "nowhere")
    (tmp_path / "given" / "a_masks.png").rename(tmp_path / "given" / "c_masks.png")
    with pytest.raises(DataError, match=r"c_masks\.png: no image of the same name"):
        find_labels(tmp_path / "images", tmp_path / "given")


def test_images_and_their_masks_in_one_folder(tmp_path: Path) -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[3:9, 3:9] = 1
    kinds.png(tmp_path / "a.png", np.zeros((20, 20, 3), np.uint8))
    kinds.suffixed("_cp_masks")({"a.png": labels}, tmp_path)
    assert [(pair.image.name, pair.mask.name) for pair in pair_by_stem(tmp_path, tmp_path)] == [
        ("a.png", "a_cp_masks.png")
    ]
    assert np.array_equal(labels_of(tmp_path, tmp_path, tmp_path / "made")["a"], labels)
    (tmp_path / "a_cp_masks.png").rename(tmp_path / "a_mask.PNG")
    assert [pair.mask.name for pair in pair_by_stem(tmp_path, tmp_path)] == ["a_mask.PNG"]


def test_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    for place in ("images/a.png", "masks/a.png", "masks/a_masks.png"):
        kinds.png(tmp_path / place, np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"a_masks\.png: no image|share the stem"):
        pair_by_stem(tmp_path / "images", tmp_path / "masks")
    kinds.png(tmp_path / "images" / "a_masks.png", np.zeros((4, 4), np.uint8))  # an image with that very name
    assert [pair.stem for pair in pair_by_stem(tmp_path / "images", tmp_path / "masks")] == ["a", "a_masks"]


def test_images_without_annotations_are_not_taken_as_empty(tmp_path: Path) -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[3:9, 3:9] = 1
    for name in ("a.png", "b.png"):
        kinds.png(tmp_path / "images" / name, np.zeros((20, 20, 3), np.uint8))
    kinds.rois({"a.png": labels}, tmp_path / "given")
    assert find_labels(tmp_path / "images", tmp_path / "given").unnamed == ("b",)
    with pytest.raises(DataError, match=r"does not name 1 images of .*images \(b\)"):
        as_label_images(tmp_path / "images", tmp_path / "given", lambda: tmp_path / "made")


def test_detections_count_and_the_regions_around_them_do_not(tmp_path: Path) -> None:
    kinds.png(tmp_path / "images" / "a.png", np.zeros((20, 20, 3), np.uint8))

    def feature(kind: str, side: int) -> dict[str, Any]:
        ring = [[1, 1], [side, 1], [side, side], [1, side], [1, 1]]
        properties = {"objectType": kind, "classification": {"names": ["Blood", "RBC"]}}
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}

    content = {"type": "FeatureCollection", "features": [feature("annotation", 15), feature("detection", 5)]}
    kinds.write(tmp_path / "given" / "a.json", json.dumps(content).encode())
    source = find_labels(tmp_path / "images", tmp_path / "given")
    painted = source.read("a", (20, 20))
    assert (np.count_nonzero(painted.labels), painted.classes) == (16, ("Blood: RBC",))
    assert "annotations around detections, left out: 1" in " ".join(source.said)


@pytest.mark.reliability
def test_pictures_are_no_colour_coded_masks(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "photograph.png")
    with pytest.raises(DataError, match="mask in colour"):
        read_labels(tmp_path / "photograph.png")
    labels = np.zeros((40, 40), np.uint8)
    labels[2:12, 2:12], labels[2:12, 12:22], labels[20:30, 20:30] = 1, 2, 3
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 255], [255, 0, 1]], np.uint8)
    Image.fromarray(colours[labels]).save(tmp_path / "cells.png")
    assert np.array_equal(read_labels(tmp_path / "cells.png"), labels)
    Image.fromarray(colours[labels]).resize((100, 100), Image.Resampling.BILINEAR).save(tmp_path / "soft.png")
    with pytest.raises(DataError, match=r"mask in colour with \d+ colours"):
        read_labels(tmp_path / "soft.png")
    white = np.where(colours[labels] == 0, 255, colours[labels]).astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "white.png")
    with pytest.raises(DataError, match="without black"):
        read_labels(tmp_path / "white.png")
    Image.fromarray(colours[labels]).save(tmp_path / "cells.jpg")
    with pytest.raises(DataError, match="in PNG or TIFF"):
        read_labels(tmp_path / "cells.jpg")


def test_images_that_share_a_stem_are_found_by_their_whole_names(tmp_path: Path) -> None:
    """As the label images of a run are named."""
    for name, label in (("a.png", 3), ("a.tif", 7)):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(kinds_folder(tmp_path / "images") / name)
        labels = np.zeros((9, 9), np.uint16)
        labels[:label, :label] = 1
        Image.fromarray(labels).save(kinds_folder(tmp_path / "labels") / f"{name}.tif")
    source = find_labels(tmp_path / "images", tmp_path / "labels")
    areas = {source.images[stem].name: source.read(stem, (9, 9)).labels.sum() for stem in source.images}
    assert areas == {"a.png": 9, "a.tif": 49}


def kinds_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
