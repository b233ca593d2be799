"""Foreground of unknown instance: pixels of the ground truth that belong to cells, without saying to which."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = 65535
"""Value of ignored pixels in label images of 16 bit and more. No cell of a ground truth has this number."""

Labels = npt.NDArray[np.integer[Any]]


def without_ignored(labels: Labels) -> Labels:
    """``labels`` (h, w) with ignored pixels set to background; the same array if there are none."""
    ignored = labels == IGNORED
    return np.where(ignored, 0, labels).astype(labels.dtype) if ignored.any() else labels


def set_aside(true: Labels, predicted: Labels) -> tuple[Labels, Labels]:
    """Return both label images (h, w) as they are scored: nothing counts on ignored pixels of ``true``.

    A predicted object with more than half of its pixels there is removed; others lose only their pixels there.
    """
    ignored = true == IGNORED
    if not ignored.any():
        return true, predicted
    numbers, index = np.unique(predicted, return_inverse=True)
    index = index.reshape(predicted.shape)
    area = np.bincount(index.ravel(), minlength=len(numbers))
    unknown = np.bincount(index[ignored], minlength=len(numbers))
    out = ignored | (2 * unknown > area)[index]
    return np.where(ignored, 0, true).astype(true.dtype), np.where(out, 0, predicted).astype(predicted.dtype)
