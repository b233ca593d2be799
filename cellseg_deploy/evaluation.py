"""Label images against a folder of masks: the evaluation behind ``cellseg-evaluate``.

    pairs by stem --> labels (read, or made by a Segmenter) --> ImageScore each --> metrics.json, metrics.csv

An evaluation is whole or it is not: one unreadable or mis-sized file stops it, because numbers over the images that
happened to work cannot be compared with anybody's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy import metrics
from cellseg_deploy.counting import CountRule
from cellseg_deploy.errors import OutputError
from cellseg_deploy.images import Pair, check_same_size, read_image, read_labels
from cellseg_deploy.outputs import atomic, label_tiff, tables
from cellseg_deploy.outputs.folder import was_written_by
from cellseg_deploy.outputs.lock import exclusive
from cellseg_deploy.outputs.names import LABEL_SUFFIX, output_names

if TYPE_CHECKING:
    from cellseg_deploy.pipeline import Segmenter

Labels = npt.NDArray[np.int32]
METRICS_JSON, METRICS_CSV, LABELS_FOLDER = "metrics.json", "metrics.csv", "labels"
PROGRAM = "cellseg-evaluate"

# Per image the count error is one signed number; its means over images are left to metrics.json.
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
CSV_COLUMNS = (
    *("image", *_CSV_RATIOS, "n_true", "n_predicted", "count_error", "tp", "fp", "fn", "merges", "splits"),
    *_CSV_APART,
)


@dataclass(frozen=True)
class ScoredImage:
    """``name``: the pair's stem. ``labels``: what was judged, ``true_labels``: by what; int32 (h, w)."""

    name: str
    score: metrics.ImageScore
    labels: Labels
    true_labels: Labels


def score_pairs(
    pairs: Sequence[Pair],
    labels_of: Callable[[Pair, tuple[int, int]], Labels],
    *,
    min_area_px: int,
    count_rule: CountRule = "all",
) -> Iterator[ScoredImage]:
    """Score each pair as it is asked for.

    ``labels_of(pair, mask_hw)`` gives the labels to judge; see ``read_predicted`` and ``Predictor``.
    Raises ``DataError`` naming the file that cannot be used.
    """
    for pair in pairs:
        true = read_labels(pair.mask)
        predicted = labels_of(pair, (true.shape[0], true.shape[1]))
        score = metrics.score_image(true, predicted, min_area_px=min_area_px, count_rule=count_rule)
        yield ScoredImage(pair.stem, score, predicted, true)


def read_predicted(pair: Pair, mask_hw: tuple[int, int]) -> Labels:
    """The label image ``pair.image`` that some tool wrote."""
    labels = read_labels(pair.image)
    check_same_size(pair, (labels.shape[0], labels.shape[1]), mask_hw)
    return labels


@dataclass(frozen=True)
class Predictor:
    """Labels of the photograph ``pair.image`` by ``segmenter``; the size is checked before any work is done.

    ``on_probabilities`` is handed what the network said of each, float32 (K, h', w') at the model's scale.
    """

    segmenter: Segmenter
    bit_depth: int | None = None
    max_pixels: int | None = None
    on_probabilities: Callable[[npt.NDArray[np.float32]], None] | None = None

    def __call__(self, pair: Pair, mask_hw: tuple[int, int]) -> Labels:
        """See ``score_pairs``."""
        limit: dict[str, Any] = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        image_hwc = read_image(pair.image, bit_depth=self.bit_depth, **limit).pixels_hwc
        check_same_size(pair, (image_hwc.shape[0], image_hwc.shape[1]), mask_hw)
        found = self.segmenter(image_hwc)
        if self.on_probabilities is not None:
            self.on_probabilities(found.probabilities_khw)
        return found.labels


def describe_model(segmenter: Segmenter) -> dict[str, Any]:
    """What made the labels, for metrics.json."""
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
        "scale": "auto" if segmenter.auto_scale else segmenter.scale,
        "halo": segmenter.halo,
        **backend.describe(),
    }


@contextmanager
def report_folder(out: Path, names: Sequence[str] = (METRICS_JSON, METRICS_CSV)) -> Iterator[None]:
    """``out`` existing, writable and held by this process: found out before hours of work, not after.

    ``names``: files to write, first the JSON that says who wrote it. Raises ``OutputError`` if the folder cannot be
    written or holds such files that no evaluation of ours wrote,
    ``OutputInUseError`` if another process writes there.
    """
    atomic.make_folder(out)
    with exclusive(out):
        there = [name for name in names if os.path.lexists(out / name)]
        if there and not was_written_by(PROGRAM, out / names[0]):
            raise OutputError(
                f"{out / there[0]}: not written by {PROGRAM}, so it is not replaced; choose another output folder"
            )
        yield


def csv_rows(scored: Sequence[tuple[str, metrics.ImageScore]]) -> list[list[Any]]:
    """Rows of metrics.csv under ``CSV_COLUMNS``, one an image."""
    rows: list[list[Any]] = [list(CSV_COLUMNS)]
    for name, score in scored:
        alone = metrics.pool([score])
        tp = score.matches_at(metrics.F1_THRESHOLD)
        rows.append(
            [
                name,
                *(alone[key] for key in _CSV_RATIOS),
                score.n_true,
                score.n_predicted,
                score.counted[1] - score.counted[0],
                tp,
                score.n_predicted - tp,
                score.n_true - tp,
                score.merges,
                score.splits,
                alone["f1_apart"],
                score.n_true_apart,
                score.n_predicted_apart,
                score.counted_apart[1] - score.counted_apart[0],
                alone["n_clumps"],
                *score.counted,
            ]
        )
    return rows


def write_report(
    out: Path, scored: Sequence[tuple[str, metrics.ImageScore]], *, min_area_px: int, about: dict[str, Any]
) -> dict[str, float]:
    """Write metrics.csv and metrics.json into ``out`` (whole or not at all, earlier ones replaced); give the metrics.

    metrics.json: the pooled metrics at the top level, an undefined one as null, and beside them how they were made.
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
