"""Change of counts on images unlike those the model was made for: measured curves, one per condition.

``conditions``: the same images at another magnification, with weaker or stronger stain, darker or brighter, with a
colour cast. ``crowding``: synthetic smears, whose truth is exact, from separate cells to overlapping cells, at
half to twice the size. Each image is evaluated at the model's own scale and, where the size changes, also with the
size estimated (``--cell-diameter auto``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.images import judged_pairs
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import with_remark
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cells.metrics import pool, score_image
from cellseg_deploy.cli import console
from cellseg_deploy.errors import OutputError
from cellseg_deploy.evaluate.plots import curves_png
from cellseg_deploy.evaluate.specks import speck_px
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import pair_by_stem
from cellseg_deploy.outputs.tables import csv_rows
from cellseg_deploy.samples import SmearParams, make_smear
from cellseg_deploy.segmenter import Segmenter

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
Pairs = Callable[[], Iterable[tuple[Image, Labels]]]
Say = Callable[[str], None]

FIXED, AUTO = "scale of the model", "size estimated"
SIZES = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
CONDITIONS: dict[str, tuple[float, ...]] = {
    "size": SIZES,
    "stain": (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
    "brightness": (0.5, 0.7, 0.85, 1.0, 1.1, 1.2),
    "cast": (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),
}
CROWDING: dict[str, dict[str, Any]] = {  # of SmearParams
    "apart": {"clustering": 0.0, "overlap": 0.0, "rouleaux": 0.0},
    "touching": {"clustering": 0.7, "overlap": 0.0, "rouleaux": 0.0},
    "overlapping": {"clustering": 0.7, "overlap": 0.5, "rouleaux": 0.1},
    "crowded": {"clustering": 0.9, "overlap": 0.6, "rouleaux": 0.3},
}
CELLS = {"apart": 60, "touching": 80, "overlapping": 80, "crowded": 130}
CROWDING_SIZES = (0.5, 0.7, 1.0, 1.4, 2.0)
SMEARS = 3
"""Number of synthetic smears for each level and size."""
REPORTED = ("dice", "f1_inner", "count_mape_inner", "f1", "count_mape", "count_bias", "n_true", "n_predicted")
"""Metrics of each row. The first ones, without border objects, do not depend on what the ground truth shows of a cell
that the image border cuts, and are the ones drawn."""


@dataclass(frozen=True)
class Row:
    """Pooled figures of all images under one condition. ``value``: factor of the condition, 1 for unchanged images."""

    experiment: str
    condition: str
    value: float
    scale: str
    figures: dict[str, float]

    def flat(self) -> dict[str, Any]:
        """One line of a table."""
        row = asdict(self)
        return {key: value for key, value in row.items() if key != "figures"} | self.figures


def changed(image_hwc: Image, labels_hw: Labels, condition: str, value: float) -> tuple[Image, Labels]:
    """The image (h, w, 3) under ``condition`` and its truth, which changes only with the size.

    ``size``: enlarged by ``value``. ``stain``: optical density of every pixel times ``value`` (Beer and Lambert), as
    with more or less dye. ``brightness``: light times ``value``, cut at white. ``cast``: red times the square root of
    ``value``, blue divided by it.
    """
    import cv2

    if value == 1:
        return image_hwc, labels_hw
    if condition == "size":
        size = (round(image_hwc.shape[1] * value), round(image_hwc.shape[0] * value))
        method = cv2.INTER_AREA if value < 1 else cv2.INTER_LINEAR
        small = cv2.resize(image_hwc, size, interpolation=method)
        return np.asarray(small, np.uint8), cv2.resize(labels_hw, size, interpolation=cv2.INTER_NEAREST)
    light = image_hwc.astype(np.float32) / 255
    if condition == "stain":
        light = light**value
    elif condition == "brightness":
        light = light * value
    elif condition == "cast":
        light = light * np.array([value**0.5, 1, value**-0.5], np.float32)
    else:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
    return np.rint(np.clip(light, 0, 1) * 255).astype(np.uint8), labels_hw


def conditions(
    segmenters: dict[str, Segmenter],
    pairs: Pairs,
    *,
    min_area_px: int | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> list[Row]:
    """Figures of the images of ``pairs`` under every one of ``CONDITIONS``.

    ``segmenters``: by name of the scale, ``FIXED`` and ``AUTO``. ``min_area_px``: limit for specks, in px of the
    unchanged images; None for the limit that ``cellseg-evaluate`` derives from the true labels.
    """
    usual_px = min_area_px
    if usual_px is None:
        usual_px = speck_px((labels for _, labels in pairs()), segmenters[FIXED].backend.spec)

    def judge(condition: str, value: float) -> list[Row]:
        area = round(usual_px * value**2) if condition == "size" else usual_px
        made = (changed(image, labels, condition, value) for image, labels in pairs())
        scales = (FIXED, AUTO) if condition == "size" else (FIXED,)
        return _judged(segmenters, scales, made, ("conditions", condition, value), area)

    turns = [(condition, value) for condition, values in CONDITIONS.items() for value in values]
    return _in_turn("conditions", turns, judge, say, progress or Progress())


def crowding(
    segmenters: dict[str, Segmenter], *, seed: int = 0, say: Say = lambda _: None, progress: Progress | None = None
) -> list[Row]:
    """Figures of ``SMEARS`` synthetic smears at every level of ``CROWDING`` and every one of ``CROWDING_SIZES``."""

    def judge(level: str, size: float) -> list[Row]:
        return _judged(segmenters, (FIXED, AUTO), _smears(level, size, seed), ("crowding", level, size), 0)

    turns = [(level, size) for level in CROWDING for size in CROWDING_SIZES]
    return _in_turn("crowding", turns, judge, say, progress or Progress())


def _in_turn(
    name: str,
    turns: Sequence[tuple[str, float]],
    judge: Callable[[str, float], list[Row]],
    say: Say,
    progress: Progress,
) -> list[Row]:
    """Rows of all ``turns``, or of those completed before a signal."""
    rows: list[Row] = []
    done = 0
    if progress.skips(name):
        return rows
    with progress.stoppable(lambda: ", ".join(f"{condition} {value:g}" for condition, value in turns[done:])):
        for condition, value in turns:
            rows += judge(condition, value)
            done += 1
            progress.keep(name, [row.flat() for row in rows])
            say(_told(rows[-1]))
    return rows


def _smears(level: str, size: float, seed: int) -> Iterator[tuple[Image, Labels]]:
    usual = SmearParams()
    hw = (round(usual.size_hw[0] * size * 0.75), round(usual.size_hw[1] * size * 0.75))
    for k in range(SMEARS):
        params = replace(
            usual,
            size_hw=hw,
            cell_diameter_px=usual.cell_diameter_px * size,
            n_cells=CELLS[level],
            # Optical lengths stay in proportion: another magnification, not another microscope.
            blur_px=usual.blur_px * size,
            edge_px=usual.edge_px * size,
            contact_gap_px=usual.contact_gap_px * size,
            **CROWDING[level],
        )
        smear = make_smear(params, seed + 1000 * k)
        yield smear.image_hwc, smear.labels_hw


def _judged(
    segmenters: dict[str, Segmenter],
    scales: Sequence[str],
    made: Iterable[tuple[Image, Labels]],
    about: tuple[str, str, float],
    min_area_px: int,
) -> list[Row]:
    scores: dict[str, list[Any]] = {scale: [] for scale in scales}
    for image, labels in made:
        for scale in scales:
            found = segmenters[scale](image).labels
            scores[scale].append(score_image(labels, found, min_area_px=min_area_px))
    rows = []
    for scale in scales:
        pooled = pool(scores[scale])
        rows.append(Row(*about, scale, {name: float(pooled[name]) for name in REPORTED}))
    return rows


def _told(row: Row) -> str:
    f1, error = row.figures["f1_inner"], row.figures["count_mape_inner"]
    return f"{row.condition} {row.value:g}: F1 {f1:.3f}, count error {error:.1%}, without border objects"


@click.command("robustness", context_settings=shared.SETTINGS)
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="New folder.")
@shared.model_option
@click.option("--images", metavar="DIR", type=shared.FOLDER, help="Images to change.  [default: sample smears]")
@click.option("--masks", metavar="DIR", type=shared.FOLDER, help="Masks of these images.")
@console.mask_options
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per core]")
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def robustness_command(
    output: Path,
    model: Path | None,
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    threads: int | None,
    quiet: bool,
) -> None:
    """How counts change with cell size, stain, brightness and colour, and with crowding at known truth.

    Writes robustness.csv, robustness.md, conditions.png and crowding.png to DIR.
    """
    console.require_packages("plots", "matplotlib")
    shared.check_pair(images, masks)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not an empty folder; choose another -o")
    if images is not None and masks is not None:
        pair_by_stem(images, masks)  # a missing partner must be reported before the folder is made
    say = shared.teller(quiet)
    engine = EngineOptions(threads=threads)
    with ExitStack() as stack:
        segmenters = {
            FIXED: stack.enter_context(Segmenter.load(model, engine=engine, scale=None)),
            AUTO: stack.enter_context(Segmenter.load(model, engine=engine)),
        }
        make_folder(output)
        progress = shared.progress(output, "robustness")
        shifted = conditions(segmenters, lambda: _pairs(images, masks, mask_foreground), say=say, progress=progress)
        crowded = crowding(segmenters, say=say, progress=progress)
    rows = [*shifted, *crowded]
    lines = [row.flat() for row in rows]
    write_bytes(output / "robustness.csv", csv_rows([list(lines[0]), *(list(row.values()) for row in lines)]))
    text = with_remark(_markdown(rows), progress)
    write_bytes(output / "robustness.md", text.encode())
    for name, part in (("conditions", shifted), ("crowding", crowded)):
        if not part:
            continue
        panels = [_panel(part, condition) for condition in dict.fromkeys(row.condition for row in part)]
        write_bytes(output / f"{name}.png", curves_png(panels, y_label="F1 and relative count error, inner"))
    click.echo(text)
    progress.finish()


def _pairs(images: Path | None, masks: Path | None, foreground: MaskForeground) -> Iterator[tuple[Image, Labels]]:
    if images is not None and masks is not None:
        yield from judged_pairs(images, masks, foreground=foreground)
        return
    for seed in range(4):
        smear = make_smear(SmearParams(), seed)
        yield smear.image_hwc, smear.labels_hw


def _panel(rows: list[Row], condition: str) -> tuple[str, dict[str, tuple[list[float], list[float]]]]:
    """Title, and x and y of each curve: F1 and count error at each scale."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.condition == condition:
            for metric, name in (("f1_inner", "F1"), ("count_mape_inner", "count error")):
                x, y = curves.setdefault(f"{name}, {row.scale}", ([], []))
                x.append(row.value)
                y.append(row.figures[metric])
    return condition, curves


def _markdown(rows: list[Row]) -> str:
    lines = [
        "| condition | factor | scale | Dice | F1 inner | count error inner | F1 | count error | bias, cells per image "
        "| true | found |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        f = row.figures
        lines.append(
            f"| {row.condition} | {row.value:g} | {row.scale} | {f['dice']:.3f} | {f['f1_inner']:.3f} | "
            f"{f['count_mape_inner']:.1%} | {f['f1']:.3f} | {f['count_mape']:.1%} | {f['count_bias']:+.1f} | "
            f"{f['n_true']:.0f} | {f['n_predicted']:.0f} |"
        )
    return "\n".join(lines) + "\n"
