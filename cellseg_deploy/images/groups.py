"""Groups of similar images: same folder, size in px and pixel size, as from one camera at one magnification."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.scale import SAMPLE_IMAGES
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import declared_size, read_image

_log = logging.getLogger(__name__)


def group_of(image: FoundImage) -> str:
    """Folder, size and pixel size of ``image`` from its header, as text; "" if it must not be read."""
    if image.problem:
        return ""
    (height, width), um = declared_size(image.path)
    of_pixel = "" if um is None else f", {um:.4g} um/px"
    folder = str(PurePosixPath(image.name).parent).encode("utf-8", "backslashreplace").decode()
    return f"{folder}: {width} x {height} px{of_pixel}"


def groups_of(images: Iterable[FoundImage]) -> dict[str, list[FoundImage]]:
    """Group ``images``, in the order of their names; images without a group are left out."""
    groups: dict[str, list[FoundImage]] = {}
    for image in sorted(images, key=lambda image: image.name):
        if group := group_of(image):
            groups.setdefault(group, []).append(image)
    return groups


def spread(images: Sequence[FoundImage]) -> list[FoundImage]:
    """Return at most ``SAMPLE_IMAGES`` of ``images``, evenly spaced."""
    step = max(1.0, len(images) / SAMPLE_IMAGES)
    return [images[int(index * step)] for index in range(min(len(images), SAMPLE_IMAGES))]


def sample(images: Sequence[FoundImage], options: ReadOptions) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the pixels of at most ``SAMPLE_IMAGES`` of ``images``, evenly spaced. Unreadable images are skipped here;
    they are reported when they are processed."""
    for image in spread(images):
        try:
            yield read_image(image.path, options).pixels_hwc
        except (DataError, MemoryError) as error:
            _log.debug("not measured: %s", error)
