"""The same cells in the files of every program: label images, Cellpose, ImageJ, QuPath, COCO, YOLO, colours."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import roifile
import tifffile
from PIL import Image
from segmented_images import segmented

from cellseg_deploy.cells.polygons import cell_polygons
from cellseg_deploy.outputs import coco, geojson, imagej_roi
from cellseg_deploy.outputs.segmented import SegmentedImage

Truth = Mapping[str, np.ndarray]
"""Label image (h, w) by name of its image, such as ``a.png``."""


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def suffixed(ending: str) -> Callable[[Truth, Path], None]:
    def files(truth: Truth, folder: Path) -> None:
        for name, labels in truth.items():
            png(folder / f"{Path(name).stem}{ending}.png", labels.astype(np.uint16))

    return files


def like_ours(truth: Truth, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, labels in truth.items():
        tifffile.imwrite(folder / f"{name}.tif", labels.astype(np.uint16))


def cellpose(truth: Truth, folder: Path) -> None:
    """As cellpose.io.masks_flows_to_seg writes it."""
    folder.mkdir(parents=True)
    for name, labels in truth.items():
        content: Any = {
            "outlines": np.zeros(labels.shape, np.uint16),
            "masks": labels.astype(np.uint16),
            "chan_choose": [0, 0],
            "ismanual": np.zeros(int(labels.max()), bool),
            "filename": f"/home/somebody/{name}",
            "flows": [np.zeros((2, 3), np.float32), None, []],
            "diameter": np.float64(30.5),
        }
        np.save(folder / f"{Path(name).stem}_seg.npy", content)


def rois(truth: Truth, folder: Path) -> None:
    for name, labels in truth.items():
        write(folder / f"{Path(name).stem}.zip", imagej_roi.encode(segmented(labels)))


def qupath(truth: Truth, folder: Path) -> None:
    for name, labels in truth.items():
        write(folder / f"{Path(name).stem}.geojson", geojson.encode(segmented(labels)))


def coco_rle(truth: Truth, folder: Path) -> None:
    """Compressed run lengths, a file an image, as our own run writes."""
    for name, labels in truth.items():
        write(folder / f"{name}.json", coco.encode(segmented(labels, name=name)))


def coco_file(truth: Truth, folder: Path, segmentation: Callable[[np.ndarray, int], Any], **more: Any) -> None:
    """One file for all images."""
    images, annotations = [], []
    for image_id, (name, labels) in enumerate(truth.items(), start=10):
        images.append({"id": image_id, "file_name": name, "width": labels.shape[1], "height": labels.shape[0]})
        for label in range(1, int(labels.max()) + 1):
            found = segmentation(labels, label)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1 + label % 2, "iscrowd": 0}
            annotations.append({**entry, "segmentation": found})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}]
    content = {"images": images, "annotations": annotations, "categories": categories, **more}
    write(folder / "annotations.json", json.dumps(content).encode())


def plain_rle(labels: np.ndarray, label: int) -> dict[str, Any]:
    flat = (labels == label).T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(labels.shape), "counts": counts}


def contours(labels: np.ndarray, label: int, how: int = cv2.CHAIN_APPROX_NONE) -> list[np.ndarray]:
    """Outlines (n, 2) through the border pixels of the cell, pixels numbered from 0, as most programs draw them."""
    found, _ = cv2.findContours((labels == label).astype(np.uint8), cv2.RETR_EXTERNAL, how)
    return [contour.reshape(-1, 2) for contour in found]


def coco_polygons(truth: Truth, folder: Path) -> None:
    """Through the centres of the border pixels in COCO's coordinates."""
    coco_file(truth, folder, lambda *cell: [(each + 0.5).reshape(-1).tolist() for each in contours(*cell)])


def coco_whole(truth: Truth, folder: Path) -> None:
    """Whole numbers, corners of straight runs only, as many converters to COCO write."""
    how = cv2.CHAIN_APPROX_SIMPLE
    coco_file(truth, folder, lambda *cell: [each.reshape(-1).tolist() for each in contours(*cell, how)])


def cellpose_rois(truth: Truth, folder: Path) -> None:
    """As cellpose.io.save_rois writes them: ``ImagejRoi.frompoints`` of ``utils.outlines_list``."""
    for name, labels in truth.items():
        path = folder / f"{Path(name).stem}_rois.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for label in range(1, int(labels.max()) + 1):
                (points,) = contours(labels, label)
                archive.writestr(f"{label}.roi", roifile.ImagejRoi.frompoints(points).tobytes())


def qupath_contours(truth: Truth, folder: Path) -> None:
    """As scripts make GeoJSON for QuPath from OpenCV's contours."""
    for name, labels in truth.items():
        features = []
        for label in range(1, int(labels.max()) + 1):
            (points,) = contours(labels, label)
            geometry = {"type": "Polygon", "coordinates": [[*points.tolist(), points[0].tolist()]]}
            features.append({"type": "Feature", "geometry": geometry, "properties": {"objectType": "detection"}})
        content = {"type": "FeatureCollection", "features": features}
        write(folder / f"{Path(name).stem}.geojson", json.dumps(content).encode())


def ultralytics(truth: Truth, folder: Path) -> None:
    """As Ultralytics' save_txt writes masks: six decimals of contours divided by the sides."""
    folder.mkdir(parents=True)
    for name, labels in truth.items():
        lines = []
        for label in range(1, int(labels.max()) + 1):
            (points,) = contours(labels, label, cv2.CHAIN_APPROX_SIMPLE)
            shares = points / np.array(labels.shape[::-1])
            lines.append(" ".join(["0", *(f"{value:.6f}" for value in shares.reshape(-1))]))
        (folder / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")


def simplified(truth: Truth, folder: Path) -> None:
    """Outlines along the edges of pixels, with corners left out where that moves the outline by less than a pixel."""
    edges = {name: {cell.label: cell.polygons for cell in cell_polygons(labels)} for name, labels in truth.items()}

    def segmentation(labels: np.ndarray, label: int) -> list[list[float]]:
        name = next(name for name, known in truth.items() if known is labels)
        rings = [ring for ring, *_ in edges[name][label]]
        return [cv2.approxPolyDP(r.astype(np.float32)[:, None], 1.0, True).reshape(-1).tolist() for r in rings]

    coco_file(truth, folder, segmentation)


def coco_plain_rle(truth: Truth, folder: Path) -> None:
    coco_file(truth, folder, plain_rle)


def yolo(truth: Truth, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("red\nwhite\n")
    for name, labels in truth.items():
        height, width = labels.shape
        lines = []
        for cell in cell_polygons(labels):
            ((ring, *_), *_) = cell.polygons
            lines.append(" ".join([str(cell.label % 2), *map(str, (ring / (width, height)).reshape(-1).tolist())]))
        (folder / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")


def colours(truth: Truth, folder: Path) -> None:
    for name, labels in truth.items():
        table = np.random.default_rng(0).permutation(2**24 - 1)[: int(labels.max())] + 1
        table = np.concatenate([[0], table])[labels]
        png(folder / name, np.stack([table >> 16, table >> 8 & 255, table & 255], axis=2).astype(np.uint8))


EXACT: dict[str, Callable[[Truth, Path], None]] = {
    "masks": suffixed("_masks"),
    "cp_masks": suffixed("_cp_masks"),
    "labels": suffixed("_labels"),
    "ours": like_ours,
    "cellpose": cellpose,
    "rois": rois,
    "qupath": qupath,
    "coco rle": coco_rle,
    "coco plain rle": coco_plain_rle,
    "yolo": yolo,
    "colours": colours,
}
OUTLINES: dict[str, Callable[[Truth, Path], None]] = {
    "coco polygons": coco_polygons,
    "coco whole": coco_whole,
    "cellpose rois": cellpose_rois,
    "qupath contours": qupath_contours,
    "ultralytics": ultralytics,
    "simplified": simplified,
}
"""Polygons, which need not give every pixel."""
ROUGH = ("simplified",)
"""Those of ``OUTLINES`` that do not: 0.95 of each cell, as intersection over union."""
ALL = EXACT | OUTLINES


def iou_per_cell(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Intersection over union of each cell of ``first`` with that of ``second`` that shares most of its pixels."""
    found = []
    for label in range(1, int(first.max()) + 1):
        cell = first == label
        other = np.bincount(second[cell]).argmax()
        found.append(np.count_nonzero(cell & (second == other)) / np.count_nonzero(cell | (second == other)))
    return found


def as_result(labels: np.ndarray, **changes: Any) -> SegmentedImage:
    return segmented(labels, **changes)
