"""At which scale a folder run works: measured once for each group of like images, and kept with the run.

Images of one folder, size in px and pixel size make a group: one camera at one magnification. Given the scales, no
result depends on the other images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.scale import SAMPLE_IMAGES, ScaleChoice
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.read import declared_size, read_image
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.run.record import RunOptions

_log = logging.getLogger(__name__)


def group_of(image: FoundImage) -> str:
    """Folder, size and pixel size of ``image`` by its header, in words; "" for one that must not be read."""
    if image.problem:
        return ""
    (height, width), um = declared_size(image.path)
    of_pixel = "" if um is None else f", {um:.4g} um/px"
    return f"{utf8(str(PurePosixPath(image.name).parent))}: {width} x {height} px{of_pixel}"


def groups_of(images: Iterable[FoundImage]) -> dict[str, list[FoundImage]]:
    """``images`` by group, in the order of their names."""
    groups: dict[str, list[FoundImage]] = {}
    for image in sorted(images, key=lambda image: image.name):
        if group := group_of(image):
            groups.setdefault(group, []).append(image)
    return groups


def sample(images: Sequence[FoundImage], options: RunOptions) -> Iterator[npt.NDArray[np.uint8]]:
    """Pixels of at most ``SAMPLE_IMAGES`` of ``images``, spread evenly; what cannot be read is left out, and said when
    its turn comes."""
    step = max(1.0, len(images) / SAMPLE_IMAGES)
    for index in range(min(len(images), SAMPLE_IMAGES)):
        try:
            image = images[int(index * step)]
            yield read_image(image.path, options.reading).pixels_hwc
        except (DataError, MemoryError) as error:
            _log.debug("not measured: %s", error)


def said(group: str, choice: ScaleChoice, model_diameter_px: float) -> str:
    """What was found, in a line."""
    images = f"{choice.images} image{'' if choice.images == 1 else 's'} measured"
    if choice.note:
        return f"{group}: {choice.note} ({images})"
    return f"{group}: cells are {model_diameter_px / choice.scale:.0f} px wide ({images}): scale {choice.scale:.2f}"
