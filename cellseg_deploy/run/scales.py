"""The scale of a folder run: measured once per group of similar images, and recorded with the run.

For given scales, no result depends on the other images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.scale import ScaleChoice
from cellseg_deploy.images import groups
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.groups import group_of, groups_of
from cellseg_deploy.plural import plural
from cellseg_deploy.run.record import RunOptions

__all__ = ["group_of", "groups_of", "said", "sample"]


def sample(images: Sequence[FoundImage], options: RunOptions) -> Iterator[npt.NDArray[np.uint8]]:
    """Call ``groups.sample`` with the reading options of the run."""
    return groups.sample(images, options.reading)


def said(group: str, choice: ScaleChoice, model_diameter_px: float) -> str:
    """Describe the measured scale in one line."""
    images = f"{plural(choice.images, 'image')} measured"
    if choice.note:
        return f"{group}: {choice.note} ({images})"
    return f"{group}: cells are {model_diameter_px / choice.scale:.0f} px wide ({images}): scale {choice.scale:.2f}"
