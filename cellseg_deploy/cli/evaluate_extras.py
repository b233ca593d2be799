"""What ``--sweep`` and ``--anatomy`` add to an evaluation: each takes the images as they are scored, then writes files.

OUT/sweep.csv, sweep.png                    every metric against the threshold, by method
OUT/reliability.json, reliability.png       are the probabilities true
OUT/anatomy.csv, anatomy/KIND-NN.jpg        every error with its place, and crops of it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cellseg_deploy.cells.ignored import set_aside
from cellseg_deploy.cells.probability_calibration import Reliability, reliability
from cellseg_deploy.cli.progress import Progress
from cellseg_deploy.evaluate import anatomy, contact_sheet, plots, sweep
from cellseg_deploy.evaluate.calibration import Labelling, starting_points
from cellseg_deploy.evaluate.probability_store import KeptImages, kept_images
from cellseg_deploy.files import atomic
from cellseg_deploy.images.read import read_image
from cellseg_deploy.outputs import tables

if TYPE_CHECKING:
    from cellseg_deploy.cli.evaluate import Options
    from cellseg_deploy.evaluate.score import ScoredImage
    from cellseg_deploy.images.read import Pair
    from cellseg_deploy.models.spec import Task
    from cellseg_deploy.segmenter import Segmenter

SWEEP_CSV, SWEEP_PNG = "sweep.csv", "sweep.png"
RELIABILITY_JSON, RELIABILITY_PNG = "reliability.json", "reliability.png"
ANATOMY_CSV = "anatomy.csv"
SWEEP_FILES = (SWEEP_CSV, SWEEP_PNG, RELIABILITY_JSON, RELIABILITY_PNG)
ANATOMY_FILES = (ANATOMY_CSV, contact_sheet.FOLDER)
ANATOMY_COLUMNS = (
    *("image", "kind", "at_border", "left_px", "top_px", "width_px", "height_px"),
    *("true_labels", "predicted_labels", "page"),
)


class Anatomy:
    """Errors of each image: rows of anatomy.csv and crops.

    ``place``: a temporary folder for the pages, so that an evaluation that fails leaves the earlier ones.
    ``photographs``: whether ``pair.image`` is one.
    """

    def __init__(self, options: Options, place: Path, *, photographs: bool) -> None:
        self._out = options.output
        self._min_area_px = options.min_area_px
        self._photographs = photographs
        self._reading = options.reading
        self._place = place
        self._sheets = contact_sheet.ContactSheets(place)
        self._rows: list[list[Any]] = [list(ANATOMY_COLUMNS)]
        self.by_image: dict[str, dict[str, int]] = {}

    def add(self, pair: Pair, image: ScoredImage) -> None:
        """Find and show the errors of one image."""
        findings = anatomy.find(*set_aside(image.true_labels, image.labels), min_area_px=self._min_area_px)
        self.by_image[image.name] = anatomy.summary(findings)
        if self._photographs:
            photo = read_image(pair.image, self._reading).pixels_hwc
        else:
            photo = np.full((*image.labels.shape, 3), 90, np.uint8)
        for finding in findings:
            place = self._sheets.add(image.name, photo, image.true_labels, image.labels, finding)
            numbers = (" ".join(map(str, labels)) for labels in (finding.true, finding.predicted))
            self._rows.append([image.name, finding.kind, finding.at_border, *finding.box, *numbers, place])

    def finish(self) -> dict[str, Any]:
        """Write what is left; gives what metrics.json says of it: how many of each group, in all and by image."""
        self._sheets.close()
        contact_sheet.move_pages(self._place, self._out)
        atomic.write_bytes(self._out / ANATOMY_CSV, tables.csv_rows(self._rows))
        total = {group: sum(one[group] for one in self.by_image.values()) for group in anatomy.GROUPS}
        return {"anatomy": {**total, "by_image": self.by_image}}


def measure_reliability(kept: KeptImages) -> Reliability:
    """Reliability of the foreground over all kept images."""
    total: Reliability | None = None
    for item in kept:
        one = reliability(item.probabilities_khw[0], item.true_labels)
        total = one if total is None else total + one
    if total is None:
        raise ValueError("no image was kept")
    return total


def reliability_record(found: Reliability) -> dict[str, Any]:
    """``found`` for JSON: the ECE, and by bin its pixels, mean probability and share that is cell (null if empty)."""

    def mean(values: Any) -> list[float | None]:
        return [float(v / n) if n else None for v, n in zip(values.tolist(), found.pixels.tolist(), strict=True)]

    return {
        "channel": "foreground",
        "ece": found.ece,
        "bins": len(found.pixels),
        "pixels": [int(n) for n in found.pixels],
        "mean_probability": mean(found.probability),
        "share_cell": mean(found.cell),
    }


class Sweep:
    """Keeps what the network said of each image, then tries every threshold on it. See ``opened``."""

    def __init__(self, kept: KeptImages, segmenter: Segmenter, min_area_px: int) -> None:
        spec = segmenter.backend.spec
        self._kept = kept
        self._labelling = Labelling(spec.channels, spec.cell_diameter_px, min_area_px, segmenter.border_cells)
        # The model's own point first, then the defaults of the other methods that its channels allow.
        self._methods = starting_points({segmenter.task: segmenter.params}, cast("Task", segmenter.task), spec.variant)
        self._title = f"{spec.name}, {segmenter.task}"

    @classmethod
    @contextmanager
    def opened(cls, segmenter: Segmenter, min_area_px: int) -> Iterator[Sweep]:
        """A sweep with a temporary folder."""
        with kept_images() as kept:
            yield cls(kept, segmenter, min_area_px)

    def take(self, image: ScoredImage) -> None:
        """One more image, with what the network said of it."""
        if image.probabilities_khw is None:
            raise RuntimeError(f"{image.name}: its probabilities were not kept")
        self._kept.add(image.name, image.probabilities_khw, image.true_labels)

    def finish(self, out: Path, *, quiet: bool) -> dict[str, Any]:
        """Write sweep and reliability into ``out``; gives what metrics.json says of them."""
        total = sum(len(sweep.swept(params)) for params in self._methods) * len(sweep.THRESHOLDS)
        with nullcontext() if quiet else Progress(total, "settings of the sweep") as progress:
            advance = None if progress is None else progress.advance
            points = sweep.sweep(self._kept, self._labelling, self._methods, on_point=advance)
        found = measure_reliability(self._kept)
        atomic.write_bytes(out / SWEEP_CSV, tables.csv_rows(sweep.rows(points)))
        title = f"{self._title}: {len(self._kept)} images"
        atomic.write_bytes(out / SWEEP_PNG, plots.sweep_png(points, title=title))
        write_reliability(out / RELIABILITY_JSON, out / RELIABILITY_PNG, found, title=title)
        best = max(points, key=lambda point: (point.figures["f1_apart"], point.figures["dice"]))
        names = ("f1_apart", "f1", "dice")
        return {
            "ece": found.ece,
            "sweep_best": {
                "curve": best.curve,
                "threshold": best.threshold,
                **{name: best.figures[name] for name in names},
            },
        }


def remove_stale(out: Path, *, sweep: bool, anatomy: bool) -> None:
    """Remove what an earlier evaluation in ``out`` left of the extras that this one was not asked for."""
    if not anatomy:
        contact_sheet.remove_earlier(out)
    for name in (*(() if sweep else SWEEP_FILES), *(() if anatomy else (ANATOMY_CSV,))):
        with atomic.writing(out / name):
            (out / name).unlink(missing_ok=True)


def extra_rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table on the screen says of the extras in ``about``."""
    rows = []
    if "anatomy" in about:
        found = about["anatomy"]
        rows.append(("anatomy", ", ".join(f"{group} {found[group]}" for group in anatomy.GROUPS)))
    if "sweep_best" in about:
        best = about["sweep_best"]
        figures = f"f1 apart {best['f1_apart']:.4f}, f1 {best['f1']:.4f}, dice {best['dice']:.4f}"
        rows.append(("sweep", f"best on these very images: {best['curve']} {best['threshold']:g}: {figures}"))
        rows.append(("ece", f"{about['ece']:.4f}   see reliability.png"))
    return rows


def write_reliability(json_path: Path, png_path: Path, found: Reliability, *, title: str) -> None:
    """The curve as numbers and as a figure."""
    text = json.dumps(reliability_record(found), indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(json_path, text.encode())
    atomic.write_bytes(png_path, plots.reliability_png(found, title=title))
