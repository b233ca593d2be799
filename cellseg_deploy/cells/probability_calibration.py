"""Calibration of the probabilities: of the pixels with a cell probability of 0.8, eight in ten should be cell.

Reliability curve and expected calibration error: ECE = sum over bins of (share of pixels) * |mean probability - share
that is cell|, in bins of equal width (Naeini et al., AAAI 2015; Guo et al., On Calibration of Modern Neural Networks,
ICML 2017). Binary: the probability is that of "cell", not of the winning class, so that it relates to a threshold.
Most pixels are easy and fall into the outer bins; the inner bins show the effect of a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

BINS = 15
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Sums per probability bin [i/n, (i+1)/n): pixels, their probabilities, and pixels that are cell; each (n,)."""

    pixels: Floats
    probability: Floats
    cell: Floats

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.pixels + other.pixels, self.probability + other.probability, self.cell + other.cell)

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 (calibrated) to 1; NaN without pixels."""
        total = self.pixels.sum()
        return float(np.abs(self.probability - self.cell).sum() / total) if total else float("nan")

    @property
    def curve(self) -> tuple[Floats, Floats]:
        """Mean probability and share of cell pixels, for each bin that is not empty."""
        there = self.pixels > 0
        return self.probability[there] / self.pixels[there], self.cell[there] / self.pixels[there]


def reliability(
    foreground: npt.NDArray[np.floating], true_labels: npt.NDArray[np.integer], *, bins: int = BINS
) -> Reliability:
    """Reliability of the probabilities ``foreground`` (h, w) of one image against ``true_labels`` of any size (H, W).

    Ground truth is sampled at the centre of each probability pixel. Raises ``UsageError`` for other shapes.
    """
    if foreground.ndim != 2 or true_labels.ndim != 2 or bins < 1:
        raise UsageError(
            "expected probabilities (h, w), labels (H, W) and at least one bin, "
            f"got {foreground.shape}, {true_labels.shape}, {bins}"
        )
    rows, columns = (
        (2 * np.arange(small) + 1) * large // (2 * small)
        for small, large in zip(foreground.shape, true_labels.shape, strict=True)
    )
    is_cell = (true_labels[np.ix_(rows, columns)] > 0).reshape(-1)
    value = foreground.reshape(-1).astype(np.float64)
    at = np.minimum((value * bins).astype(np.int64), bins - 1)
    return Reliability(
        np.bincount(at, minlength=bins).astype(np.float64),
        np.bincount(at, weights=value, minlength=bins).astype(np.float64),
        np.bincount(at, weights=is_cell, minlength=bins).astype(np.float64),
    )
