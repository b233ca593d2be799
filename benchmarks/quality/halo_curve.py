"""Context that the network needs: predictions near a cut edge of a tile compared with those in the middle.

Every image is predicted twice. The reference uses only the innermost pixels of each tile. The other plan uses every
tile up to its edge, and each of its pixels is binned by its distance from the nearest *cut* edge: at the border of the
image nothing is cut off; there the network can never have context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells import tiling
from cellseg_deploy.segmenter import Segmenter, resize

Image = npt.NDArray[np.uint8]

_BINS = 1000  # bins of |difference| in [0, 1], for percentiles without keeping every pixel


@dataclass(frozen=True)
class HaloCurve:
    """By distance from the cut edge in model px (index 0: the edge pixel itself), over the foreground channel.

    ``pixels``: number of pixels compared. ``mean``, ``p99``: of |probability - reference|, the percentile rounded up to
    0.001. ``flipped``: share of pixels that are on the other side of 0.5. NaN if no pixel had that distance.
    """

    pixels: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    p99: npt.NDArray[np.float64]
    flipped: npt.NDArray[np.float64]

    def needed(self, factor: float = 2.0) -> int:
        """Smallest halo in px beyond which ``flipped`` stays within ``factor`` times its median over the inner half of
        all distances, the level at which two tiles disagree anyway."""
        known = np.nan_to_num(self.flipped)
        worse = np.flatnonzero(known > factor * float(np.median(known[len(known) // 2 :])))
        return int(worse[-1]) + 1 if len(worse) else 0


def halo_curve(
    backend: Backend,
    images: Iterable[Image],
    *,
    scale: float,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> HaloCurve:
    """The curve of ``backend`` over ``images``, uint8 RGB (h, w, 3), at ``scale`` model px per image px.

    Takes about fifty times the tiles of a normal run: the reference keeps an eighth of a tile's side.
    """
    size = backend.spec.tile_size
    reach = size // 2
    counts = np.zeros((reach, _BINS + 1), np.int64)
    sums, flips = np.zeros(reach), np.zeros(reach, np.int64)
    innermost = Segmenter(backend, scale=scale, halo=size * 7 // 16, batch_size=batch_size)
    for number, image in enumerate(images, start=1):
        scaled = resize(image, scale)
        reference = innermost.probabilities(image)
        plan = tiling.plan((scaled.shape[0], scaled.shape[1]), size, 0)
        padded = tiling.pad(scaled, plan)
        for start in range(0, len(plan), batch_size):
            answers = backend.predict(tiling.cut(padded, plan, start, start + batch_size))
            for tile, answer in zip(plan.tiles[start:], answers, strict=False):
                distance = cut_distance(tile, plan)
                inside = np.s_[: min(size, plan.image_hw[0]), : min(size, plan.image_hw[1])]
                ours, theirs = answer[0][inside], reference[0][tile.read]
                known = distance[inside] < reach
                where = distance[inside][known]
                off = np.abs(ours - theirs)[known]
                sums += np.bincount(where, off, minlength=reach)
                flips += np.bincount(where, ((ours >= 0.5) != (theirs >= 0.5))[known], minlength=reach).astype(np.int64)
                np.add.at(counts, (where, np.ceil(off * _BINS).astype(np.int64).clip(0, _BINS)), 1)
        say(f"{number} images")
    pixels = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, flipped = sums / pixels, flips / pixels
    p99 = np.array(
        [
            np.searchsorted(np.cumsum(row), 0.99 * n) / _BINS if n else np.nan
            for row, n in zip(counts, pixels, strict=True)
        ]
    )
    return HaloCurve(pixels, mean, p99, flipped)


def cut_distance(tile: tiling.Tile, plan: tiling.TilePlan) -> npt.NDArray[np.int64]:
    """Distance in px of each pixel of ``tile`` (tile_size, tile_size) from its nearest edge with image beyond it;
    ``tile_size`` where no edge is cut. Pixels on the edge have distance 0."""
    size = plan.tile_size
    ramp = np.arange(size)
    far = np.full(size, size)
    axes = []
    for read, length in zip(tile.read, plan.image_hw, strict=True):
        before = ramp if read.start > 0 else far
        after = ramp[::-1] if read.stop < length else far
        axes.append(np.minimum(before, after))
    return np.minimum(axes[0][:, None], axes[1][None, :]).astype(np.int64)
