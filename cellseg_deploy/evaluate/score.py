"""Score label images against a folder of masks: the evaluation behind ``cellseg-evaluate``.

    pairs by stem --> labels (read, or made by a Segmenter) --> ImageScore each --> metrics.json, metrics.csv

With a Segmenter, reading, the network and scoring of different images overlap.

An evaluation is complete or fails: one unreadable or mis-sized file stops it, because figures over an arbitrary
subset of images are not comparable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Job, Network
from cellseg_deploy.cells import metrics
from cellseg_deploy.cells.classes import counting_labels
from cellseg_deploy.cells.count_rules import CountRule
from cellseg_deploy.cells.field_of_view import Field, Mask
from cellseg_deploy.files import atomic
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import Pair, check_same_size, declared_pixels, read_image, read_labels
from cellseg_deploy.outputs import label_tiff, tables
from cellseg_deploy.outputs.names import LABEL_SUFFIX, output_names
from cellseg_deploy.threads import ThreadPlan

if TYPE_CHECKING:
    from cellseg_deploy.evaluate.truths import Truths
    from cellseg_deploy.outputs.segmentation import Segmentation
    from cellseg_deploy.segmenter import Segmenter

T = TypeVar("T")
_READ_DEFAULTS = ReadOptions()
Labels = npt.NDArray[np.int32]
METRICS_JSON, METRICS_CSV, LABELS_FOLDER = "metrics.json", "metrics.csv", "labels"
PROGRAM = "cellseg-evaluate"

# Per image the count error is one signed number; means over images are in metrics.json.
_CSV_RATIOS = ("dice", "iou", "f1", "precision", "recall", "map", "pq_strict")
_CSV_APART = (
    "f1_apart",
    "n_true_apart",
    "n_predicted_apart",
    "count_error_apart",
    "n_clumps",
    "counted_true",
    "counted_predicted",
)
_CSV_INNER = ("f1_inner", "dice_inner", "n_true_inner", "n_predicted_inner", "count_error_inner", "n_border")
CSV_COLUMNS = (
    *("image", *_CSV_RATIOS, "n_true", "n_predicted", "count_error", "tp", "fp", "fn", "merges", "splits"),
    *_CSV_APART,
    *_CSV_INNER,
)


@dataclass(frozen=True)
class ScoredImage:
    """``name``: the pair's stem. ``labels``: what was judged, ``true_labels``: the truth; int32 (h, w).

    ``probabilities_khw``: network output, float32 (K, h', w') at the model's scale, if the ``Predictor`` keeps it.
    ``notes``: remarks on the image for the user (``cells.notes``).
    """

    name: str
    score: metrics.ImageScore
    labels: Labels
    true_labels: Labels
    probabilities_khw: npt.NDArray[np.float32] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictor:
    """Makes labels of photographs: ``segmenter``, with the settings of ``read_image``.

    ``keep_probabilities``: also pass on the network output. ``mask_foreground``: how the masks are read.
    """

    segmenter: Segmenter
    threads: ThreadPlan
    reading: ReadOptions = _READ_DEFAULTS
    keep_probabilities: bool = False
    mask_foreground: MaskForeground = "auto"
    field: Field = "auto"

    def segment(self, pair: Pair, mask_hw: tuple[int, int], network: Network) -> Segmentation:
        """Segment the photograph ``pair.image``; its size is checked before any work is done."""
        loaded = read_image(pair.image, self.reading)
        image_hwc = loaded.pixels_hwc
        check_same_size(pair, (image_hwc.shape[0], image_hwc.shape[1]), mask_hw)
        found = self.segmenter.segment(image_hwc, network, field=self.field)
        return replace(found, notes=(*loaded.notes, *found.notes))


def predicted_pairs(
    pairs: Sequence[Pair],
    predictor: Predictor,
    finish: Callable[[Pair, Labels, Segmentation], T],
    truths: Truths | None = None,
) -> Generator[T, None, None]:
    """Yield ``finish(pair, true_labels, found)`` for each pair, in order. Pairs overlap (see ``batching``), and
    ``finish`` is called by the labelling threads. Close before the segmenter, see ``Segmenter.results``. ``truths``:
    the masks, if already read.

    Raises ``DataError`` naming an unusable file, and what the network raises.
    """

    def work(pair: Pair, network: Network) -> T:
        true = _true_labels(pair, predictor.mask_foreground, truths)
        found = predictor.segment(pair, (true.shape[0], true.shape[1]), network)
        return finish(pair, true, found)

    def nbytes(pair: Pair) -> int:
        pixels = declared_pixels(pair.image)
        return predictor.segmenter.bytes_in_flight(pixels) + pixels * np.dtype(np.int32).itemsize  # of the truth

    jobs = [Job(partial(work, pair), partial(nbytes, pair)) for pair in pairs]
    return predictor.segmenter.results(jobs, predictor.threads)


def score_pairs(
    pairs: Sequence[Pair],
    predictor: Predictor | None,
    *,
    min_area_px: int,
    count_rule: CountRule = "all",
    mask_foreground: MaskForeground = "auto",
    truths: Truths | None = None,
) -> Generator[ScoredImage, None, None]:
    """Score each pair, in order: the cells that ``predictor`` finds in the photograph, or without a predictor the label
    image that a tool wrote. Close before the segmenter, see ``Segmenter.results``. ``mask_foreground``: how the masks
    are read; a ``predictor`` has its own. ``truths``: the masks, if already read.

    Raises ``DataError`` naming an unusable file.
    """

    def scored(
        pair: Pair,
        true: Labels,
        labels: Labels,
        probabilities_khw: npt.NDArray[np.float32] | None = None,
        field: Mask | None = None,
        notes: tuple[str, ...] = (),
    ) -> ScoredImage:
        score = metrics.score_image(true, labels, min_area_px=min_area_px, count_rule=count_rule, field=field)
        return ScoredImage(pair.stem, score, labels, true, probabilities_khw, notes)

    if predictor is None:
        for pair in pairs:
            true = _true_labels(pair, mask_foreground, truths)
            taken: MaskForeground = "light" if mask_foreground == "light" else "auto"
            yield scored(pair, true, read_predicted(pair, (true.shape[0], true.shape[1]), taken))
    else:
        keep = predictor.keep_probabilities
        yield from predicted_pairs(
            pairs,
            predictor,
            lambda pair, true, found: scored(
                pair,
                true,
                counting_labels(found.labels, found.classes),
                found.probabilities_khw if keep else None,
                found.field,
                found.notes,
            ),
            truths,
        )


def _true_labels(pair: Pair, foreground: MaskForeground, truths: Truths | None) -> Labels:
    if truths is not None:
        return truths.labels_of(pair)
    return read_labels(pair.mask, foreground=foreground, keep_ignored=True)


def read_predicted(pair: Pair, mask_hw: tuple[int, int], foreground: MaskForeground = "auto") -> Labels:
    """Read the label image ``pair.image`` written by any tool; ``foreground`` as in ``read_labels``."""
    labels = read_labels(pair.image, foreground=foreground)
    check_same_size(pair, (labels.shape[0], labels.shape[1]), mask_hw)
    return labels


def describe_model(segmenter: Segmenter) -> dict[str, Any]:
    """Describe the model and settings that made the labels, for metrics.json."""
    import msgspec

    backend = segmenter.backend
    return {
        "name": backend.spec.name,
        "variant": backend.spec.variant,
        "parity": backend.spec.parity,
        "backend": backend.name,
        "device": backend.device,
        "precision": backend.precision,
        "task": segmenter.task,
        "operating_point": msgspec.to_builtins(segmenter.params),
        "scale": "measured" if segmenter.auto_scale else segmenter.scale,
        "measured_scales": sorted({round(scale, 4) for scale in segmenter.measured_scales.values()}),
        "halo": segmenter.halo,
        "border_cells": segmenter.border_cells,
        **({"classes": list(segmenter.counting_classes)} if backend.spec.classes else {}),
        **backend.describe(),
    }


def csv_rows(scored: Sequence[tuple[str, metrics.ImageScore]]) -> list[list[Any]]:
    """Return rows of metrics.csv under ``CSV_COLUMNS``, one per image."""
    rows: list[list[Any]] = [list(CSV_COLUMNS)]
    for name, score in scored:
        alone = metrics.pool([score])
        tp = score.matches_at(metrics.F1_THRESHOLD)
        level = metrics.level_of(metrics.F1_THRESHOLD, score.thresholds)
        counts, apart, inner = (cells.counts(level) for cells in (score.whole, score.apart, score.inner))
        rows.append(
            [
                name,
                *(alone[key] for key in _CSV_RATIOS),
                score.n_true,
                score.n_predicted,
                counts[1] - counts[0],
                tp,
                score.n_predicted - tp,
                score.n_true - tp,
                score.merges,
                score.splits,
                alone["f1_apart"],
                score.apart.n_true,
                score.apart.n_predicted[level],
                apart[1] - apart[0],
                alone["n_clumps"],
                *counts,
                alone["f1_inner"],
                alone["dice_inner"],
                *inner,
                inner[1] - inner[0],
                alone["n_border"],
            ]
        )
    return rows


def write_report(
    out: Path, scored: Sequence[tuple[str, metrics.ImageScore]], *, min_area_px: int, about: dict[str, Any]
) -> dict[str, float]:
    """Write metrics.csv and metrics.json into the folder ``out``; return the metrics.

    metrics.json: the pooled metrics at the top level, undefined ones as null, and their provenance next to them.
    Raises ``OutputError``.
    """
    pooled = metrics.pool([score for _, score in scored])
    record: dict[str, Any] = {key: None if math.isnan(value) else value for key, value in pooled.items()}
    record |= {"program": PROGRAM, "min_area_px": min_area_px, "iou_thresholds": list(metrics.MAP_THRESHOLDS), **about}
    atomic.make_folder(out)
    atomic.write_bytes(out / METRICS_CSV, tables.csv_rows(csv_rows(scored)))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(out / METRICS_JSON, text.encode("utf-8", "backslashreplace"))
    return pooled


class LabelWriter:
    """Writes label images to ``out``/labels/STEM.tif."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self._folder = out / LABELS_FOLDER
        self._names = output_names(names)

    def __call__(self, image: ScoredImage) -> None:
        """Write the labels of ``image``. Raises ``OutputError``."""
        path = self._folder / f"{self._names[image.name]}{LABEL_SUFFIX}"
        atomic.make_folder(path.parent)
        atomic.write_bytes(path, label_tiff.encode(image.labels))
