"""Every kind of file that is written for each image: its name for ``--save``, its place, and what makes it.

A new format is a module with an ``encode`` and one entry in ``OUTPUTS``; the folder run, ``--save`` and the clearing of
an output folder follow from it. Entries are made by helper threads, side by side for different images: ``encode`` is a
function of the image's findings alone, and gives the same bytes for the same findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs import label_tiff, overlay
from cellseg_deploy.outputs.names import LABEL_SUFFIX, OVERLAY_SUFFIX


@dataclass(frozen=True)
class Findings:
    """What is known of one image. ``image_hwc``: uint8 RGB (h, w, 3). ``labels``: int32 (h, w). ``columns``: of the
    cells, name -> array (n,), as in cells.csv. ``scale``: model px per image px."""

    name: str
    image_hwc: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    columns: dict[str, npt.NDArray[Any]]
    scale: float


@dataclass(frozen=True)
class Output:
    """One kind of file: OUT/``folder``/NAME``suffix``; ``name``: as in ``--save``."""

    name: str
    folder: str
    suffix: str
    encode: Callable[[Findings], bytes]

    def path(self, image_name: str) -> str:
        """Place in the output folder, posix, for an image whose outputs are called ``image_name``."""
        return f"{self.folder}/{image_name}{self.suffix}"


OUTPUTS: tuple[Output, ...] = (
    Output("labels", "labels", LABEL_SUFFIX, lambda found: label_tiff.encode(found.labels)),
    Output("overlays", "overlays", OVERLAY_SUFFIX, lambda found: overlay.encode(found.image_hwc, found.labels)),
)
NAMES = tuple(output.name for output in OUTPUTS)


def chosen(names: Iterable[str]) -> tuple[Output, ...]:
    """The outputs ``names``, in the order of ``OUTPUTS``. Raises ``UsageError`` for one that is not known."""
    wanted = set(names)
    if unknown := sorted(wanted - set(NAMES)):
        raise UsageError(f"unknown output {unknown[0]!r}; expected some of {', '.join(NAMES)}")
    return tuple(output for output in OUTPUTS if output.name in wanted)


def encode(outputs: Iterable[Output], findings: Findings, image_name: str) -> dict[str, bytes]:
    """Place in the output folder -> content, of each of ``outputs``; see ``Output.path`` for ``image_name``."""
    return {output.path(image_name): output.encode(findings) for output in outputs}
