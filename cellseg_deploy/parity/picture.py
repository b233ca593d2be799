"""The picture of a parity report: one image with the outlines of both forms, and where they differ.

Green is the reference, magenta the candidate, white a line that both draw. Pixels that belong to different cells, or
to a cell on one side only, are orange, and the largest such places are framed, as a changed rim is easily overlooked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs import overlay
from cellseg_deploy.parity.report import WorstImage

REFERENCE_RGB = overlay.OUTLINE_RGB
CANDIDATE_RGB = (255, 0, 220)
BOTH_RGB = (255, 255, 255)
DIFFERENCE_RGB = (255, 140, 0)
SUFFIXES = (".png", ".jpg", ".jpeg")

_MOST_FRAMES = 20


def check_suffix(path: Path) -> None:
    """Raise ``UsageError`` unless ``path`` has the suffix of a supported picture format."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: the picture must end in one of {', '.join(SUFFIXES)}")


def encode(worst: WorstImage, suffix: str) -> bytes:
    """Encode ``draw(worst)`` as PNG or JPEG, by ``suffix``."""
    import cv2

    settings = [] if suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 90]
    written, data = cv2.imencode(suffix.lower(), cv2.cvtColor(draw(worst), cv2.COLOR_RGB2BGR), settings)
    if not written:
        raise RuntimeError(f"OpenCV could not encode the picture of {worst.name} as {suffix}")
    return bytes(data)


def draw(worst: WorstImage) -> npt.NDArray[np.uint8]:
    """Draw ``worst`` in RGB, at its own size or enlarged by an integer factor, with a caption in the corner."""
    image, reference = overlay.to_viewing_size(worst.image_hwc, worst.reference)
    _, candidate = overlay.to_viewing_size(worst.image_hwc, worst.candidate)
    _, marked = overlay.to_viewing_size(worst.image_hwc, worst.differing.astype(np.int32))
    differing = marked > 0
    picture = image.copy()
    picture[differing] = (0.4 * picture[differing] + 0.6 * np.array(DIFFERENCE_RGB)).astype(np.uint8)
    thickness = max(1, round(min(reference.shape) / 600))
    ours, theirs = (overlay.outlines(labels, thickness=thickness) for labels in (reference, candidate))
    picture[ours] = REFERENCE_RGB
    picture[theirs] = CANDIDATE_RGB
    picture[ours & theirs] = BOTH_RGB
    _frame(picture, differing, thickness)
    name = worst.name.encode("ascii", "replace").decode()  # OpenCV's font is limited to ASCII
    cells = f"{int(worst.reference.max(initial=0))} cells (green), now {int(worst.candidate.max(initial=0))} (magenta)"
    return overlay.with_caption(picture, f"{name}, {worst.task}: {cells}, {int(worst.differing.sum())} px differ")


def _frame(picture: npt.NDArray[np.uint8], differing: npt.NDArray[np.bool_], thickness: int) -> None:
    """Draw a box around each of the largest groups of differing pixels, merging groups that are close together."""
    import cv2

    reach = 4 * thickness
    grown = cv2.dilate(differing.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    _, groups, boxes, _ = cv2.connectedComponentsWithStats(grown)
    pixels = np.bincount(groups[differing], minlength=len(boxes))
    for group in np.argsort(-pixels, kind="stable")[:_MOST_FRAMES]:
        if pixels[group]:
            x, y, width, height = (int(value) for value in boxes[group][:4])
            cv2.rectangle(picture, (x, y), (x + width - 1, y + height - 1), DIFFERENCE_RGB, thickness)
