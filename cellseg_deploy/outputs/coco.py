"""Cells as COCO JSON, for training or scoring with pycocotools, detectron2, mmdetection or FiftyOne.

Masks are run lengths (RLE, in COCO's compression), not polygons: exact for every cell, including holes and several
pieces, whereas COCO's polygons have no holes, and a tenth of the size. For polygons use the GeoJSON.

Programs expect one file for all images, but a run of ten thousand must neither hold a million cells in memory nor lose
them in a power cut. So each image has its own complete file, and ``merge`` joins the files when the run ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from cellseg_deploy.cells.classes import CLASS_PROBABILITY
from cellseg_deploy.cells.label_runs import Labels, row_runs
from cellseg_deploy.errors import OutputError
from cellseg_deploy.outputs.segmented import LEFT_OUT_BY, SegmentedImage
from cellseg_deploy.outputs.tables import utf8

_CATEGORIES = [{"id": 1, "name": "cell", "supercategory": "cell"}]


def encode(image: SegmentedImage) -> bytes:
    """Encode the COCO file of one image: image id 1, annotations in order of label, with the label as id.

    ``area`` is ``area_px`` and ``bbox`` left, top, width, height in px; ``counted`` is a custom member. Categories are
    the model's classes in their order, with ``class_probability`` and ``left_out_by`` as further custom members.
    """
    height, width = image.labels.shape
    categories, category_ids, ours = _classes_of(image)
    content = {
        "info": {"description": "cells found by cellseg-infer", "model": image.model, "task": image.task},
        "licenses": [],
        "categories": categories,
        "images": [{"id": 1, "file_name": utf8(image.name), "width": width, "height": height}],
        "annotations": [
            {
                "id": label,
                "image_id": 1,
                "category_id": category_id,
                "segmentation": segmentation,
                "area": area,
                "bbox": box,
                "iscrowd": 0,
                "label": label,
                "counted": is_counted,
                **of_class,
            }
            for label, segmentation, area, box, is_counted, category_id, of_class in zip(
                image.table.columns["label"].tolist(),
                run_lengths(image.labels),
                image.table.columns["area_px"].tolist(),
                image.table.boxes.tolist(),
                image.counted.tolist(),
                category_ids,
                ours,
                strict=True,
            )
        ],
    }
    return msgspec.json.encode(content) + b"\n"


def _classes_of(image: SegmentedImage) -> tuple[list[dict[str, Any]], list[int], list[dict[str, Any]]]:
    """Return the categories, each cell's category id, and each cell's further members about its class."""
    if image.classes is None:
        return _CATEGORIES, [1] * len(image.table), [{}] * len(image.table)
    names = enumerate(image.classes.names, start=1)
    categories = [{"id": number, "name": name, "supercategory": "cell"} for number, name in names]
    columns = {name: image.columns[name].tolist() for name in (CLASS_PROBABILITY, LEFT_OUT_BY)}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return categories, (image.classes.index + 1).tolist(), rows


def run_lengths(labels: Labels) -> list[dict[str, Any]]:
    """Return COCO's compressed RLE per label of ``labels`` (h, w), in order: ``{"size": [h, w], "counts": text}``."""
    from pycocotools import mask

    height, width = labels.shape
    runs = row_runs(np.ascontiguousarray(labels.T))  # COCO counts down the columns
    if not len(runs):
        return []
    order = np.argsort(runs.label, kind="stable")
    label, column = runs.label[order], runs.row[order] * height
    start, stop = column + runs.start[order], column + runs.stop[order]
    is_first = np.diff(label, prepend=0) != 0
    # A run ending at the bottom and one starting at the top of the next column are merged.
    begins = is_first | (start != np.roll(stop, 1))
    ends = np.roll(begins, -1)
    start, stop, is_first = start[begins], stop[ends], is_first[begins]
    gap = start - np.where(is_first, 0, np.roll(stop, 1))
    counts = np.stack([gap, stop - start], axis=1)
    first = np.flatnonzero(is_first)
    plain = []
    for begin, end in zip(first, np.append(first[1:], len(stop)), strict=True):
        behind = height * width - int(stop[end - 1])
        cell = counts[begin:end].reshape(-1).tolist()
        plain.append({"size": [height, width], "counts": [*cell, behind] if behind else cell})
    compressed = mask.frPyObjects(plain, height, width)
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in compressed]


def merge(parts: Iterable[Path], file: BinaryIO) -> None:
    """Merge the COCO files ``parts`` of single images into ``file``, renumbering images and annotations.

    One part at a time is in memory. Raises ``OutputError`` for an unreadable part, ``msgspec.DecodeError`` for a
    damaged one, and ``OSError`` if ``file`` cannot be written.
    """
    images: list[dict[str, Any]] = []
    n_annotations = 0

    def begin(categories: Any) -> None:
        head = {"info": {"description": "cells found by cellseg-infer"}, "licenses": [], "categories": categories}
        file.write(msgspec.json.encode(head)[:-1] + b',"annotations":[')

    for part in parts:
        content = msgspec.json.decode(_read(part))
        if not images:  # all parts share one model and its classes
            begin(content["categories"])
        images.append({**content["images"][0], "id": len(images) + 1})
        for annotation in content["annotations"]:
            file.write(b",\n" if n_annotations else b"\n")
            n_annotations += 1
            file.write(msgspec.json.encode({**annotation, "id": n_annotations, "image_id": len(images)}))
    if not images:
        begin(_CATEGORIES)
    file.write(b'],\n"images":' + msgspec.json.encode(images) + b"}\n")


def _read(part: Path) -> bytes:
    # A separate error: the caller treats every OSError as a write error.
    try:
        return part.read_bytes()
    except OSError as error:
        raise OutputError(
            f"{part}: cannot be read for the file of the whole run ({error.strerror or error}); "
            "check that it exists and its permissions, then run again"
        ) from error
