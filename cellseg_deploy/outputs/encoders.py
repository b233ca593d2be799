"""Encoders for formats.py whose own modules do not know ``SegmentedImage`` or output folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import atomic_file, writing
from cellseg_deploy.outputs import coco, label_tiff, parquet
from cellseg_deploy.outputs import overlay as _overlay
from cellseg_deploy.outputs.formats import CELLS_CSV
from cellseg_deploy.outputs.picture_file import JPG
from cellseg_deploy.outputs.segmented import SegmentedImage


def labels(image: SegmentedImage) -> bytes:
    """Encode the label TIFF, with the pixel size if known."""
    return label_tiff.encode(image.labels, pixel_size_um=image.pixel_size_um)


def overlay(image: SegmentedImage, suffix: str = JPG) -> bytes:
    """Encode the image with outlines and count."""
    return _overlay.encode(
        *(image.pixels_hwc, image.labels, image.field, image.counted),
        classes=image.classes,
        by_class=image.by_class,
        suffix=suffix,
        several=image.several,
        over_image=image.pixels_are_spare,
    )


def numbered(image: SegmentedImage, suffix: str = JPG) -> bytes:
    """Encode the image with outlines, count, and each cell's label at its centroid."""
    centroids = np.stack([image.table.columns[f"centroid_{axis}_px"] for axis in "xy"], axis=1)
    return _overlay.encode(
        *(image.pixels_hwc, image.labels, image.field, image.counted, centroids),
        classes=image.classes,
        by_class=image.by_class,
        suffix=suffix,
        several=image.several,
    )


def merge_coco(_out: Path, files: Sequence[Path], path: Path) -> None:
    """Merge the COCO files of single images into one. Raises ``OutputError``."""
    with atomic_file(path) as file, writing(path):
        try:
            coco.merge(files, file)
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise OutputError(
                f"{path}: one of the files it is made from is damaged, or was edited and is no longer COCO "
                f"({error}); delete that file and run again"
            ) from error


def cells_parquet(out: Path, _files: Sequence[Path], path: Path) -> None:
    """Write cells.csv of ``out`` as Parquet. Raises ``OutputError``."""
    parquet.write(out / CELLS_CSV, path)
