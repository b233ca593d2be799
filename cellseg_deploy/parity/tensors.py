"""Difference of two tensors, in figures that show where to look: the values, not one threshold.

``np.allclose`` only answers yes or no. To find a fault it helps to know how large the difference is, how common, and
the worst position with both values (as bioimageio.core and Polygraphy report it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError, UsageError

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class TensorDifference:
    """``|candidate - reference|`` of one tensor, or of several pooled.

    ``quantiles``: of the absolute difference, at ``QUANTILES``, each a difference that occurs. ``share_over``: share
    of the values whose difference exceeds ``tolerance``. ``worst_at``: index of the largest difference,
    ``worst_reference`` and ``worst_candidate`` the values there. ``*_range``: lowest and highest value of each side.
    ``dot``, ``*_square``: sums from which ``cosine`` is computed.
    """

    n: int
    max: float
    mean: float
    quantiles: tuple[float, ...]
    tolerance: float
    share_over: float
    worst_at: tuple[int, ...]
    worst_reference: float
    worst_candidate: float
    reference_range: tuple[float, float]
    candidate_range: tuple[float, float]
    dot: float
    reference_square: float
    candidate_square: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both tensors as vectors; 1.0 if both are zero, 0.0 if just one is."""
        return cosine(self.dot, self.reference_square, self.candidate_square)

    @property
    def candidate_is_constant(self) -> bool:
        """Whether the candidate is constant although the reference is not."""
        (low, high), (reference_low, reference_high) = self.candidate_range, self.reference_range
        return high - low < 1e-6 and reference_high - reference_low > 1e-2


def compare_tensors(
    reference: npt.NDArray[np.floating[Any]], candidate: npt.NDArray[np.floating[Any]], *, tolerance: float
) -> TensorDifference:
    """Compare two float tensors of the same shape (any shape); sums are in double precision.

    Raises ``UsageError`` if shapes differ or a tensor is empty, ``DataError`` if a value is not finite.
    """
    if reference.shape != candidate.shape or reference.size == 0:
        raise UsageError(
            f"tensors to compare must have one shape and a value, got {reference.shape}, {candidate.shape}"
        )
    a, b = reference.astype(np.float64).reshape(-1), candidate.astype(np.float64).reshape(-1)
    difference = np.abs(b - a)
    worst = int(difference.argmax())  # argmax finds a NaN first
    if not np.isfinite(difference[worst]) or not np.isfinite(difference.sum()):
        raise DataError(f"NaN or infinity among the values to compare, at {_index(worst, reference.shape)}")
    return TensorDifference(
        n=difference.size,
        max=float(difference[worst]),
        mean=float(difference.mean()),
        quantiles=tuple(float(q) for q in np.quantile(difference, QUANTILES, method="higher")),
        tolerance=tolerance,
        share_over=float((difference > tolerance).mean()),
        worst_at=_index(worst, reference.shape),
        worst_reference=float(a[worst]),
        worst_candidate=float(b[worst]),
        reference_range=(float(a.min()), float(a.max())),
        candidate_range=(float(b.min()), float(b.max())),
        dot=float(a @ b),
        reference_square=float(a @ a),
        candidate_square=float(b @ b),
    )


def pool_differences(parts: Sequence[TensorDifference]) -> tuple[TensorDifference, int]:
    """Pool ``parts`` into one difference, and return which of them holds the worst value.

    Everything is exact except the quantiles: each is the highest among the parts, which is never below the true one.
    Raises ``UsageError`` without parts.
    """
    if not parts:
        raise UsageError("no tensor was compared; there is nothing to pool")
    n = sum(part.n for part in parts)
    worst = max(range(len(parts)), key=lambda i: parts[i].max)
    return (
        TensorDifference(
            n=n,
            max=parts[worst].max,
            mean=sum(part.mean * part.n for part in parts) / n,
            quantiles=tuple(max(level) for level in zip(*(part.quantiles for part in parts), strict=True)),
            tolerance=parts[worst].tolerance,
            share_over=sum(part.share_over * part.n for part in parts) / n,
            worst_at=parts[worst].worst_at,
            worst_reference=parts[worst].worst_reference,
            worst_candidate=parts[worst].worst_candidate,
            reference_range=_union([part.reference_range for part in parts]),
            candidate_range=_union([part.candidate_range for part in parts]),
            dot=sum(part.dot for part in parts),
            reference_square=sum(part.reference_square for part in parts),
            candidate_square=sum(part.candidate_square for part in parts),
        ),
        worst,
    )


def cosine(dot: float, square_a: float, square_b: float) -> float:
    """Return ``dot / (|a| |b|)`` from the sums; 1.0 if both vectors are zero, 0.0 if just one is."""
    if square_a == 0 or square_b == 0:
        return float(square_a == square_b)
    return dot / (math.sqrt(square_a) * math.sqrt(square_b))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _union(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in ranges), max(high for _, high in ranges)
