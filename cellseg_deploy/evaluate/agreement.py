"""Agreement of counts with counts by hand: bias and limits of agreement, not correlation.

For images i with count by hand t and found count f, from the differences d = f - t:

    ``bias``: mean of d; ``sd``: its standard deviation (n - 1); limits of agreement: bias +- 1.96 sd, between which
    95 % of the differences are expected (Bland and Altman, Statistical methods for assessing agreement between two
    methods of clinical measurement, Lancet i (1986) 307-310).
    Confidence intervals (95 %, by Student's t with n - 1 degrees of freedom): standard error sd sqrt(1/n) of the bias,
    sd sqrt(1/n + 1.96^2 / (2 (n - 1))) of a limit (Bland and Altman, Measuring agreement in method comparison studies,
    Stat. Methods Med. Res. 8 (1999) 135-160).
    The same as a *ratio* f / t, because the errors of counts grow with the count: bias and limits of log(f / t), and
    the exponential of all of them, over the images in which both counts are above 0 (``n``).
    ``mae``: mean of |d|; ``mape``: mean of |d| / t, a fraction, over the images with t > 0.
    ``by_density``: the same errors in thirds of the images by t. Images with equal counts stay together, so thirds
    may differ in size, and there are fewer thirds if most images have the same count.

The correlation coefficient is not reported: it says whether two counts rise together, not whether they are equal
(twice the right count correlates perfectly), and it grows with the range of the images. Undefined values are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

LIMIT_SD = 1.96
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """``value`` with its 95 % confidence interval from ``low`` to ``high``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Limits:
    """Bias and limits of agreement of ``n`` differences or ratios; for ratios ``sd`` is that of their logarithms."""

    n: int
    sd: float
    bias: Estimate
    lower: Estimate
    upper: Estimate


@dataclass(frozen=True)
class Third:
    """Errors of the ``n`` images with counts by hand from ``least`` to ``most``."""

    least: int
    most: int
    n: int
    bias: float
    mae: float
    mape: float


@dataclass(frozen=True)
class Agreement:
    """See the module."""

    n_images: int
    true: int
    found: int
    difference: Limits
    ratio: Limits
    mae: float
    mape: float
    by_density: tuple[Third, ...]


def agree(true: Sequence[int], found: Sequence[int]) -> Agreement:
    """Return the agreement of the counts ``found`` with the counts by hand ``true``, image by image.

    Raises ``UsageError`` if there are no images, the lengths differ, or a count is negative.
    """
    by_hand, ours = np.asarray(true, np.int64), np.asarray(found, np.int64)
    if by_hand.shape != ours.shape or by_hand.ndim != 1 or not by_hand.size:
        raise UsageError(f"{by_hand.size} counts by hand and {ours.size} found; expected one of each per image")
    if min(by_hand.min(), ours.min()) < 0:
        raise UsageError("counts must be 0 or more")
    both = (by_hand > 0) & (ours > 0)
    logs = limits_of(np.log(ours[both]) - np.log(by_hand[both]))
    every = _errors(by_hand, ours)
    return Agreement(
        n_images=len(by_hand),
        true=int(by_hand.sum()),
        found=int(ours.sum()),
        difference=limits_of((ours - by_hand).astype(np.float64)),
        ratio=Limits(logs.n, logs.sd, *(_exponential(one) for one in (logs.bias, logs.lower, logs.upper))),
        mae=every.mae,
        mape=every.mape,
        by_density=tuple(_errors(by_hand[third], ours[third]) for third in _thirds(by_hand)),
    )


def limits_of(differences: Values) -> Limits:
    """Return bias and limits of agreement of ``differences`` (n,), float64; NaN if n is too small."""
    from scipy.special import stdtrit

    n = len(differences)
    mean = float(differences.mean()) if n else float("nan")
    if n < 2:
        unknown = Estimate(float("nan"), float("nan"), float("nan"))
        return Limits(n, float("nan"), Estimate(mean, float("nan"), float("nan")), unknown, unknown)
    sd = float(differences.std(ddof=1))
    t = float(stdtrit(n - 1, 0.975))

    def around(value: float, variance: float) -> Estimate:
        reach = t * sd * variance**0.5
        return Estimate(value, value - reach, value + reach)

    of_a_limit = 1 / n + LIMIT_SD**2 / (2 * (n - 1))
    return Limits(
        n=n,
        sd=sd,
        bias=around(mean, 1 / n),
        lower=around(mean - LIMIT_SD * sd, of_a_limit),
        upper=around(mean + LIMIT_SD * sd, of_a_limit),
    )


def _exponential(one: Estimate) -> Estimate:
    # Limits of two images with wildly different ratios can exceed a double; they are then infinite.
    with np.errstate(over="ignore"):
        value, low, high = np.exp([one.value, one.low, one.high]).tolist()
    return Estimate(value, low, high)


def _thirds(by_hand: npt.NDArray[np.int64]) -> list[npt.NDArray[np.bool_]]:
    third = np.searchsorted(np.quantile(by_hand, [1 / 3, 2 / 3]), by_hand, side="left")
    return [third == number for number in np.unique(third)]


def _errors(by_hand: npt.NDArray[np.int64], ours: npt.NDArray[np.int64]) -> Third:
    difference, cells = ours - by_hand, by_hand > 0
    return Third(
        least=int(by_hand.min()),
        most=int(by_hand.max()),
        n=len(by_hand),
        bias=float(difference.mean()),
        mae=float(np.abs(difference).mean()),
        mape=float((np.abs(difference[cells]) / by_hand[cells]).mean()) if cells.any() else float("nan"),
    )
