"""Boxes and points as annotation tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellseg_deploy.annotations.objects import Annotations, Boxes, Kind, Points, check_classes
from cellseg_deploy.annotations.read import read_annotations
from cellseg_deploy.errors import DataError, UsageError

SIZES = {"a.png": (100, 200), "sub/b.jpg": (50, 50)}  # height, width


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def boxes(annotations: Annotations, image: str) -> list[list[float]]:
    marked = annotations.by_image[image]
    assert isinstance(marked, Boxes)
    result: list[list[float]] = marked.boxes_xyxy.tolist()
    return result


def csv_file(folder: Path) -> Path:
    return write(folder / "b.csv", "image,class,x0,y0,x1,y1\na.png,RBC,10,20,30,40\na.png,WBC,50,60,90,80\nb,,,,,\n")


def yolo_folder(folder: Path) -> Path:
    write(folder / "classes.txt", "RBC\nWBC\n")
    write(folder / "txt" / "a.txt", "0 0.1 0.3 0.1 0.2\n1 0.35 0.7 0.2 0.2\n")
    write(folder / "txt" / "sub" / "b.txt", "")
    return folder / "txt"


def coco_file(folder: Path) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "sub/b.jpg"}],
        "categories": [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 20, 20, 20]},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [50, 60, 40, 20]},
        ],
    }
    return write(folder / "coco.json", json.dumps(content))


@pytest.mark.parametrize("make", [csv_file, yolo_folder, coco_file])
def test_every_format_gives_the_same_boxes(make: Any, tmp_path: Path) -> None:
    read = read_annotations(make(tmp_path), "boxes", SIZES)
    np.testing.assert_allclose(boxes(read, "a.png"), [[10, 20, 30, 40], [50, 60, 90, 80]])
    assert read.by_image["a.png"].classes == ("RBC", "WBC")
    assert boxes(read, "sub/b.jpg") == []  # the file says that it holds nothing
    assert str(read) == "2 images, 2 boxes (RBC 1, WBC 1)"
    assert read.remarks == ()


def test_points(tmp_path: Path) -> None:
    """Columns in another order, no class; a name without ending."""
    read = read_annotations(write(tmp_path / "p.csv", "y,x,image\n5,7.5,a\n"), "points", SIZES)
    marked = read.by_image["a.png"]
    assert isinstance(marked, Points)
    assert marked.points_xy.tolist() == [[7.5, 5]]
    assert str(read) == "1 image, 1 point"
    assert read.remarks == ("images not named in the file, left out: 1",)


def test_boxes_are_clipped_and_counted_once(tmp_path: Path) -> None:
    text = "image,x0,y0,x1,y1\na.png,-5,-5,10,10\na.png,1,2,3,4\na.png,1,2,3,4\nother.png,1,2,3,4\n"
    read = read_annotations(write(tmp_path / "b.csv", text), "boxes", SIZES)
    assert boxes(read, "a.png") == [[0, 0, 10, 10], [1, 2, 3, 4]]
    assert read.remarks == (
        "boxes that extend beyond their image, clipped to it: 1",
        "duplicate rows, counted once: 1",
        "images named in the file but not found: 1",
        "images not named in the file, left out: 1",
    )


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("boxes", "image,x,y\na.png,1,2\n", r"line 1: the columns are image,x,y; .*missing: x0, y0, x1, y1"),
        ("boxes", "image,x0,y0,x1,y1\na.png,1,2,3\n", "line 2: the number of fields differs"),
        ("boxes", "image,x0,y0,x1,y1\na.png,1,2,3,4,5\n", "line 2: the number of fields differs"),
        ("boxes", "image,x0,y0,x1,y1\na.png,1,2,3,much\n", "line 2: 'much' is not a number"),
        ("boxes", "image,x0,y0,x1,y1\na.png,1,2,3,nan\n", "line 2: 'nan' is not a number"),
        ("boxes", "image,x0,y0,x1,y1\na.png,1,2,3,4\na.png,9,2,3,4\n", "line 3: box 9, 2, 3, 4 has no area"),
        ("boxes", "image,x0,y0,x1,y1\na.png,201,2,203,4\n", "line 2: box .* lies outside a.png, which is 200 x 100"),
        ("boxes", "image,x0,y0,x1,y1\n,1,2,3,4\n", "line 2: no image name"),
        ("boxes", "image,x0,y0,x1,y1\nz.png,1,2,3,4\n", "names none of the 2 images; it names z.png"),
        ("boxes", '{"images": []}', "json without images and annotations"),
        ("boxes", '{"images": [], "annotations": [{}]}', "annotation 0: an entry without image_id"),
        ("boxes", '{"images"', "damaged json"),
        ("points", "image,x,y\na.png,1,101\n", "line 2: point 1, 101 lies outside a.png"),
        ("points", "{}", "is json; expected a CSV file with the columns image,class,x,y"),
    ],
)
def test_what_cannot_be_read_is_named(kind: Kind, text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=complaint):
        read_annotations(write(tmp_path / "file", text), kind, SIZES)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0 0.5 0.5 0.1", "line 1: .*expected a whole number and four numbers"),
        ("0 50 50 10 10", "line 1: .*expected fractions"),
        ("5 0.5 0.5 0.1 0.1", "line 1: class 5, but the list of names has"),
    ],
)
def test_what_is_no_yolo_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "RBC\n")
    write(tmp_path / "a.txt", line)
    with pytest.raises(DataError, match=complaint):
        read_annotations(tmp_path, "boxes", SIZES)


@pytest.mark.parametrize(
    "yaml",
    [
        "names: [RBC, 'WBC']\n",
        "nc: 2\nnames:\n- RBC\n- WBC\n",
        "names:\n  0: RBC\n  1: WBC\n",
        "names: {0: RBC, 1: WBC}",
    ],
)
def test_names_of_data_yaml(yaml: str, tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", yaml)
    write(tmp_path / "labels" / "a.txt", "1 0.5 0.5 0.1 0.1\n")
    read = read_annotations(tmp_path / "labels", "boxes", SIZES)
    assert read.by_image["a.png"].classes == ("WBC",)


def test_a_name_that_fits_two_images_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "b.csv", "image,x,y\nx/a.png,1,1\na,1,1\n")
    with pytest.raises(DataError, match=r"line 3: a may be x/a.png or y/a.png"):
        read_annotations(file, "points", {"x/a.png": (9, 9), "y/a.png": (9, 9)})


def test_a_class_that_is_not_there_is_named(tmp_path: Path) -> None:
    read = read_annotations(csv_file(tmp_path), "boxes", SIZES)
    check_classes(read, ["RBC"])
    with pytest.raises(UsageError, match="no boxes of class rbc; the file has RBC, WBC"):
        check_classes(read, ["rbc"])


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        ("txl_bccd/boxes.csv", "boxes", "RBC 9,698, WBC 469, platelet 456"),
        ("chula_rbc12/points.csv", "points", "102 images, 9,5"),
    ],
)
def test_real_files_are_read(file: str, kind: Kind, said: str, real_data: Path) -> None:
    from cellseg_deploy.images.read import find_images, read_image

    path = real_data / file
    if not path.is_file():
        pytest.skip(f"no {path}")
    images = find_images([path.parent / "images"])
    sizes = {image.name: read_image(image.path).pixels_hwc.shape[:2] for image in images}
    assert said in str(read_annotations(path, kind, sizes))
