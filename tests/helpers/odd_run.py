"""A run whose report has everything: groups, a failed image, hostile names, cells of all degrees of darkness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import DarknessBackend, draw_discs, make_spec
from running import save

from cellseg_deploy.images.find import find_images
from cellseg_deploy.models.spec import ThresholdParams
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter

HOSTILE = "<img src=x onerror=document.title='pwned'>&amp;.png"
SCRIPT = "</script><script>document.title='pwned'<!--.png"


def make_images(folder: Path) -> Path:
    """Ten fields in two folders: as many cells as their number, one field with many more; two have hostile names."""
    for number in range(10):
        cells = 24 if number == 9 else number % 4 + 4
        name = {0: "b/" + HOSTILE, 1: SCRIPT.replace("/", "_")}.get(number, f"{'ab'[number % 2]}/{number}.png")
        image = draw_discs((140, 260), [(20 + 30 * (n % 8), 20 + 40 * (n // 8)) for n in range(cells)])
        save(folder / name, image)
    save(folder / "a/shades.png", shades())
    (folder / "a/bad.png").write_bytes(b"\x89PNG")
    return folder


def shades() -> np.ndarray:
    """Ten discs, each somewhat brighter than the one before: how many are found depends on the threshold."""
    image = np.full((60, 400, 3), 230, np.uint8)
    for number in range(10):
        disc = draw_discs((60, 400), [(20 + 38 * number, 30)])[..., 0] < 200
        image[disc] = 104 + 5 * number
    return image


def segmenter(threshold: float = 0.5) -> Segmenter:
    """The stub network with this threshold of its foreground."""
    point = ThresholdParams(foreground_threshold=threshold)
    return Segmenter(DarknessBackend(make_spec(operating_points={"counting": point, "confluence": point})))


def run(images: Path, out: Path, *, threshold: float = 0.5, **options: Any) -> None:
    """Run the stub network over ``images``."""
    run_folder(segmenter(threshold), find_images([images]), out, options=RunOptions(**options))
