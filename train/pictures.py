"""Sample predictions during training: predicted channels next to the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_train.validate import Prediction

SIDE_PX = 448


def save_samples(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one row per image, as JPEG: a corner with the true outlines in white, and every probability channel."""
    make_folder(path.parent)
    rows = []
    for item in predictions:
        hw = item.image_hwc.shape[:2]
        truth = cv2.resize(item.true_labels.astype(np.float32), (hw[1], hw[0]), interpolation=cv2.INTER_NEAREST)
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        image = item.image_hwc.copy()
        image[(truth > 0) & (cv2.erode(truth, cross) != truth)] = 255
        maps = (item.probabilities_khw.astype(np.float32) * 255).astype(np.uint8)
        panels = [image, *(np.repeat(plane[..., None], 3, axis=2) for plane in maps)]
        rows.append(np.concatenate([_corner(panel) for panel in panels], axis=1))
    written, data = cv2.imencode(".jpg", np.concatenate(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not written:
        raise RuntimeError("OpenCV could not encode the sample pictures as JPEG")
    write_bytes(path, bytes(data))


def _corner(panel: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    part = panel[:SIDE_PX, :SIDE_PX]
    return np.pad(part, ((0, SIDE_PX - part.shape[0]), (0, SIDE_PX - part.shape[1]), (0, 0)))
