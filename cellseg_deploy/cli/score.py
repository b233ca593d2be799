"""``cellseg-evaluate score``: labels against masks, with the extras of ``--sweep`` and ``--anatomy``.

OUT/metrics.json, metrics.csv               all images together, and one row per image
OUT/labels/                                 with --save-labels, the label images that were scored
OUT/sweep.csv, sweep.png                    every metric against the threshold, by method
OUT/reliability.json, reliability.png       are the probabilities calibrated
OUT/anatomy.csv, anatomy/KIND-NN.jpg        every error with its place, and crops of it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import numpy as np

from cellseg_deploy.cells.ignored import set_aside
from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate_options import Kind, Shared, with_progress
from cellseg_deploy.cli.evaluate_remarks import Remarks
from cellseg_deploy.cli.masks import label_pairs
from cellseg_deploy.cli.progress import Progress
from cellseg_deploy.errors import plural
from cellseg_deploy.evaluate import anatomy, contact_sheet, plots, score, sweep
from cellseg_deploy.evaluate.calibration import Labelling, starting_points
from cellseg_deploy.evaluate.probability_store import KeptImages, kept_images, reliability_record
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.files import atomic
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.read import read_image
from cellseg_deploy.outputs import tables

if TYPE_CHECKING:
    from cellseg_deploy.cells.count_rules import CountRule
    from cellseg_deploy.cells.probability_calibration import Reliability
    from cellseg_deploy.evaluate.score import ScoredImage
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.images.read import Pair
    from cellseg_deploy.models.spec import Task
    from cellseg_deploy.segmenter import Segmenter

SWEEP_CSV, SWEEP_PNG = "sweep.csv", "sweep.png"
RELIABILITY_JSON, RELIABILITY_PNG = "reliability.json", "reliability.png"
ANATOMY_CSV = "anatomy.csv"
FILES = (
    *(score.METRICS_JSON, score.METRICS_CSV, SWEEP_CSV, SWEEP_PNG, RELIABILITY_JSON, RELIABILITY_PNG),
    *(ANATOMY_CSV, contact_sheet.FOLDER),
)
"""Files an evaluation may write, its record first."""
ANATOMY_COLUMNS = (
    *("image", "kind", "at_border", "left_px", "top_px", "width_px", "height_px"),
    *("true_labels", "predicted_labels", "page"),
)


@dataclass(frozen=True)
class Extras:
    """Extras in addition to the metrics."""

    labels: bool = False
    sweep: bool = False
    anatomy: bool = False


def run(shared: Shared, judged: Path, kind: Kind, masks: Path, count_rule: CountRule, extras: Extras) -> int:
    """Score every pair of ``judged`` and ``masks``, and write the report; return the exit code."""
    output = shared.output
    check_apart([judged, masks], output)
    about: dict[str, Any] = {"data": {kind: str(judged), "masks": str(masks)}, "count_rule": count_rule}
    about["mask_foreground"] = shared.mask_foreground
    with ExitStack() as stack:
        paired = stack.enter_context(label_pairs(judged, masks, are_labels=kind == "labels", quiet=shared.quiet))
        pairs = paired.pairs
        about |= paired.about
        segmenter = stack.enter_context(shared.open_segmenter(judged, shared.classes)) if kind == "images" else None
        predictor = None
        if segmenter is not None:
            predictor = shared.predictor(segmenter, keep_probabilities=extras.sweep)
            about["model"] = score.describe_model(segmenter)
        place = stack.enter_context(report_folder(output, score.PROGRAM, FILES))
        limit, truths = shared.truths(pairs, None if segmenter is None else segmenter.backend.spec)
        about |= {"min_object_rel": limit.share, "n_true_dropped": limit.dropped}
        tried = None
        if segmenter is not None and extras.sweep:
            tried = stack.enter_context(Sweep.opened(segmenter, limit.px))
        errors = Anatomy(place, limit.px, shared.reading, photographs=kind == "images") if extras.anatomy else None
        write_labels = score.LabelWriter(place, [pair.stem for pair in pairs])
        scores, remarks = [], Remarks()
        scored = score.score_pairs(
            pairs,
            predictor,
            min_area_px=limit.px,
            count_rule=count_rule,
            mask_foreground=shared.mask_foreground,
            truths=truths,
        )
        stack.enter_context(closing(scored))
        for pair, image in zip(pairs, with_progress(scored, len(pairs), shared.quiet), strict=True):
            if extras.labels:
                write_labels(image)
            if errors is not None:
                errors.add(pair, image)
            if tried is not None:
                tried.take(image)
            scores.append((image.name, image.score))
            remarks.add(image.name, image.notes)
        about["warnings"] = remarks.by_kind()
        if errors is not None:
            about |= errors.finish()
        if tried is not None:
            about |= tried.finish(place, quiet=shared.quiet)
        pooled = score.write_report(place, scores, min_area_px=limit.px, about=about)
    remarks.say()
    if not shared.quiet:
        click.echo(limit.words)
        _print_table(pooled, about, output)
    return console.EXIT_OK


class Anatomy:
    """Errors of each image: rows of anatomy.csv and crops, written to the folder ``place``.

    ``photographs``: whether ``pair.image`` is a photograph, to be read with the settings ``reading``.
    """

    def __init__(self, place: Path, min_area_px: int, reading: ReadOptions, *, photographs: bool) -> None:
        self._place, self._min_area_px, self._reading, self._photographs = place, min_area_px, reading, photographs
        self._sheets = contact_sheet.ContactSheets(place)
        self._rows: list[list[Any]] = [list(ANATOMY_COLUMNS)]
        self.by_image: dict[str, dict[str, int]] = {}

    def add(self, pair: Pair, image: ScoredImage) -> None:
        """Record the errors of one image, with crops of them."""
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
        """Write the remaining pages; return the entry for metrics.json: number per group, in total and per image."""
        self._sheets.close()
        atomic.write_bytes(self._place / ANATOMY_CSV, tables.csv_rows(self._rows))
        total = {group: sum(one[group] for one in self.by_image.values()) for group in anatomy.GROUPS}
        return {"anatomy": {**total, "by_image": self.by_image}}


class Sweep:
    """Keeps the network output of each image, then tries every threshold on it. See ``opened``."""

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
        """Open a sweep with a temporary folder."""
        with kept_images() as kept:
            yield cls(kept, segmenter, min_area_px)

    def take(self, image: ScoredImage) -> None:
        """Keep one more image with its network output."""
        if image.probabilities_khw is None:
            raise RuntimeError(f"{image.name}: its probabilities were not kept")
        self._kept.add(image.name, image.probabilities_khw, image.true_labels)

    def finish(self, out: Path, *, quiet: bool) -> dict[str, Any]:
        """Write sweep and reliability into ``out``; return the entry for metrics.json."""
        total = sum(len(sweep.swept(params)) for params in self._methods) * len(sweep.THRESHOLDS)
        with nullcontext() if quiet else Progress(total, "settings of the sweep") as progress:
            advance = None if progress is None else progress.advance
            points = sweep.sweep(self._kept, self._labelling, self._methods, on_point=advance)
        found = self._kept.reliability()
        atomic.write_bytes(out / SWEEP_CSV, tables.csv_rows(sweep.rows(points)))
        title = f"{self._title}: {plural(len(self._kept), 'image')}"
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


def write_reliability(json_path: Path, png_path: Path, found: Reliability, *, title: str) -> None:
    """Write the curve as numbers and as a figure."""
    text = json.dumps(reliability_record(found), indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(json_path, text.encode())
    atomic.write_bytes(png_path, plots.reliability_png(found, title=title))


def _print_table(pooled: dict[str, float], about: dict[str, Any], output: Path) -> None:
    rows = [
        ("images", f"{pooled['n_images']}"),
        ("cells", f"{pooled['n_predicted']} found, {pooled['n_true']} true"),
        ("dice", f"{pooled['dice']:.4f}"),
        ("f1", f"{pooled['f1']:.4f}   precision {pooled['precision']:.4f}, recall {pooled['recall']:.4f}"),
        ("map", f"{pooled['map']:.4f}   IoU 0.50 to 0.95"),
        (
            "count",
            f"{pooled['count_mae']:.2f} cells off per image ({pooled['count_mape']:.1%}), "
            f"bias {pooled['count_bias']:+.2f}",
        ),
        ("merges", f"{pooled['merges']}, splits {pooled['splits']}"),
        ("apart", f"from {pooled['n_clumps']} true components that look like several cells:"),
        ("  f1", f"{pooled['f1_apart']:.4f}"),
        (
            "  count",
            f"{pooled['count_mae_apart']:.2f} cells off per image ({pooled['count_mape_apart']:.1%}), "
            f"bias {pooled['count_bias_apart']:+.2f}",
        ),
        (
            "inner",
            f"f1 {pooled['f1_inner']:.4f}, dice {pooled['dice_inner']:.4f}, count bias "
            f"{pooled['count_bias_inner']:+.2f}: without objects at the border "
            f"({plural(int(pooled['n_border']), 'true cell')})",
        ),
        *_extra_rows(about),
        ("results", console.printable(output)),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")


def _extra_rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows for the extras in ``about`` in the table on the screen."""
    rows = []
    if "anatomy" in about:
        found = about["anatomy"]
        rows.append(("anatomy", ", ".join(f"{group} {found[group]}" for group in anatomy.GROUPS)))
    if "sweep_best" in about:
        best = about["sweep_best"]
        figures = f"f1 apart {best['f1_apart']:.4f}, f1 {best['f1']:.4f}, dice {best['dice']:.4f}"
        rows.append(("sweep", f"best on these images: {best['curve']} {best['threshold']:g}: {figures}"))
        rows.append(("ece", f"{about['ece']:.4f}   see reliability.png"))
    return rows
