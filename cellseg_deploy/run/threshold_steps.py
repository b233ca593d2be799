"""What a run would find in one image at other thresholds: its own code over the probabilities it has at hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import msgspec

from cellseg_deploy.cells.image_tiles import ImageTiles
from cellseg_deploy.images.read import LoadedImage
from cellseg_deploy.outputs.segmentation import Segmentation
from cellseg_deploy.report import thresholds
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.segmenter import Segmenter, as_read


def encoded_steps(segmenter: Segmenter, found: Segmentation, loaded: LoadedImage, options: RunOptions) -> str:
    """Return ``thresholds.encode`` of the image ``loaded``, in which ``segmenter`` found ``found``."""
    steps = (
        (step, other.labels, other.counted())
        for step, other in at_thresholds(segmenter, found, loaded, options, thresholds.THRESHOLDS)
    )
    return thresholds.encode(loaded.pixels_hwc, segmenter.params.foreground_threshold, steps)


def at_thresholds(
    segmenter: Segmenter, found: Segmentation, loaded: LoadedImage, options: RunOptions, steps: Sequence[float]
) -> Iterator[tuple[float, Segmentation]]:
    """Yield each foreground threshold of ``steps`` with what ``segmenter`` finds at it, at the scale of ``found``.

    All other settings stay. The network does not run: its probabilities are those of ``found``.
    """

    def remembered(tiles: ImageTiles) -> None:
        tiles.out_khw[:] = found.probabilities_khw

    other = copy.copy(segmenter)
    for step in steps:
        other.params = msgspec.structs.replace(segmenter.params, foreground_threshold=step)
        result = other.segment(loaded.pixels_hwc, remembered, field=options.field_of_view, scale=found.scale)
        yield step, as_read(result, loaded, name=found.name, count_rule=options.count_rule)
