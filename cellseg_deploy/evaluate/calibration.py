"""Choose the best settings of the instance step for a task, and estimate the uncertainty of the choice.

The network has already run; its probabilities are kept, and only the instance step is tried repeatedly.

*Search*: from a starting point, groups of settings are varied together, each group from the best of the previous group,
twice through all groups. Every method that the network's channels allow is tried.

*Rank* of a choice for ``counting``: F1, then the relative count error, then Dice; for ``confluence``: Dice, then the
error of the covered area. Cells are those ``apart`` from clumps (see ``metrics``): with binary masks, F1 over all
components would reward settings that leave overlapping cells merged. Differences of F1 below 0.005 and of Dice below
0.0005 amount to a few cells, so the second figure decides there.

*Honest figures*: settings chosen on the images they are reported on look better than they are. So images are dealt to
folds, each fold is scored with the settings chosen on the other folds (cross-fitting), and the pooled figures are
reported, with percentile bootstrap intervals over images (Efron and Tibshirani, An Introduction to the Bootstrap,
1993). The intervals treat the choices as fixed; the differences of choice between folds are reported with them.
The choice on all images is written into a model: it uses at least as much data, and no figure is claimed for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.instances import BorderCells, segment
from cellseg_deploy.cells.metrics import F1_THRESHOLD, MAP_THRESHOLDS, ImageScore, pool, score_image
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import TASKS, DistanceParams, InstanceParams, Task, Variant, default_operating_points

FOLDS = 5
BOOTSTRAPS = 2000
ROUNDS = 2  # through all groups of settings; a later group may change the best choice in an earlier one
F1_STEP, DICE_STEP = 0.005, 0.0005
INTERVAL = (2.5, 97.5)
REPORTED = ("f1_apart", "count_mape_apart", "dice", "area_error", "f1", "count_mape")

_VALUES: dict[str, tuple[float, ...]] = {
    "foreground_threshold": (0.4, 0.45, 0.5, 0.55, 0.6),
    "seed_threshold": (0.6, 0.7, 0.8, 0.9),
    "boundary_weight": (0.25, 0.5, 1.0, 1.5),
    # Ends at 0.2: at another magnification cells may have half the model's cell area.
    "min_area_rel": (0.1, 0.15, 0.2),
    "min_border_area_rel": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
}
# Depth in a cell at which a seed begins; a share of the depth, not a probability.
_DEPTH = {"seed_threshold": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "min_seed_area_rel": (0.005, 0.01, 0.02, 0.04)}
# For a plain threshold, which must also split the cells.
_PARTING_FOREGROUND = (*_VALUES["foreground_threshold"], 0.7, 0.8, 0.9, 0.95)
_GROUPS = (
    ("seed_threshold", "boundary_weight", "min_seed_area_rel"),
    ("foreground_threshold",),
    ("min_area_rel", "min_border_area_rel"),
)

Axes = dict[str, tuple[float, ...]]


class Judged(Protocol):
    """An image with kept probabilities, (K, h, w) floats of any width, and its true labels at full size."""

    @property
    def probabilities_khw(self) -> npt.NDArray[np.floating]: ...

    @property
    def true_labels(self) -> npt.NDArray[np.integer]: ...


@dataclass(frozen=True)
class Labelling:
    """Settings that turn probabilities into scored labels, in addition to the operating point."""

    channels: tuple[str, ...]
    cell_diameter_px: float
    min_object_px: int
    border_cells: BorderCells = "model"

    def score(self, item: Judged, params: InstanceParams, thresholds: Sequence[float] = MAP_THRESHOLDS) -> ImageScore:
        """Score one image at its full size, at the IoU levels ``thresholds``."""
        true = item.true_labels
        labels = segment(
            item.probabilities_khw.astype(np.float32),
            self.channels,
            params,
            cell_diameter_px=self.cell_diameter_px,
            out_hw=(true.shape[0], true.shape[1]),
            border_cells=self.border_cells,
        )
        return score_image(true, labels, min_area_px=self.min_object_px, thresholds=thresholds)


class Scorer:
    """Scores of images under settings, each computed once, images in parallel.

    ``workers``: threads. ``on_trial``: called after each new pair of settings and set of images.
    """

    def __init__(
        self,
        items: Sequence[Judged],
        labelling: Labelling,
        *,
        workers: int = 1,
    ) -> None:
        self.items = items
        self.labelling = labelling
        self._known: dict[tuple[InstanceParams, int], ImageScore] = {}
        self._workers = workers
        self.on_trial: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def n_tried(self) -> int:
        """Number of different settings scored so far."""
        return len({params for params, _ in self._known})

    def scores(self, params: InstanceParams, images: Sequence[int]) -> list[ImageScore]:
        """Return the scores of the images at these positions."""
        missing = [image for image in images if (params, image) not in self._known]
        if missing:
            with ThreadPoolExecutor(min(self._workers, len(missing))) as pool_of_threads:
                found = pool_of_threads.map(
                    lambda image: self.labelling.score(self.items[image], params, (F1_THRESHOLD,)), missing
                )
                self._known |= {(params, image): score for image, score in zip(missing, found, strict=True)}
            if self.on_trial is not None:
                self.on_trial()
        return [self._known[params, image] for image in images]

    def full_scores(self, params: InstanceParams, images: Sequence[int]) -> list[ImageScore]:
        """Return the scores at every IoU level of ``map``, for reports. Not kept."""
        with ThreadPoolExecutor(max(self._workers, 1)) as pool_of_threads:
            return list(pool_of_threads.map(lambda image: self.labelling.score(self.items[image], params), images))


def figures(scores: Sequence[ImageScore]) -> dict[str, float]:
    """Return ``metrics.pool`` and ``area_error``: |covered / truly covered - 1|.

    ``map`` and ``map_inner`` only if the images were scored at all IoU levels; the search needs one level, which is
    faster.
    """
    covered = sum(score.foreground.predicted_px for score in scores) / max(
        sum(score.foreground.true_px for score in scores), 1
    )
    pooled = {**pool(scores), "area_error": abs(covered - 1)}
    if scores[0].thresholds != MAP_THRESHOLDS:
        del pooled["map"], pooled["map_inner"]
    return pooled


def rank(task: Task, pooled: dict[str, float]) -> tuple[float, ...]:
    """Return the rank, higher is better; see the module. ``pooled``: a result of ``figures``."""
    if task == "counting":
        error = pooled["count_mape_apart"]  # NaN without a true cell: then it favours neither
        return (round(pooled["f1_apart"] / F1_STEP), 0.0 if math.isnan(error) else -error, pooled["dice"])
    return (round(pooled["dice"] / DICE_STEP), -pooled["area_error"], pooled["dice"])


def search_axes(params: InstanceParams, task: Task) -> list[Axes]:
    """Return settings to vary together, group by group, for the method of ``params``.

    For ``confluence`` splitting cells gains nothing: the covered area stays the same.
    """
    values: Axes = dict(_VALUES)
    if "seed_threshold" not in params.__struct_fields__ and task == "counting":
        values["foreground_threshold"] = _PARTING_FOREGROUND
    if isinstance(params, DistanceParams):
        values |= _DEPTH
    groups = _GROUPS if task == "counting" else _GROUPS[1:]
    axes = [
        {name: values[name] for name in group if name in values and name in params.__struct_fields__}
        for group in groups
    ]
    return [group for group in axes if group]


def starting_points(operating_points: dict[str, InstanceParams], task: Task, variant: Variant) -> list[InstanceParams]:
    """Return the model's own point for ``task``, and defaults of the other methods that its channels allow."""
    own = operating_points.get(task)
    variants: list[Variant] = ["plain"] if variant == "plain" else ["plain", variant]
    defaults = [default_operating_points(name)[task] for name in variants]
    return ([] if own is None else [own]) + [point for point in defaults if type(point) is not type(own)]


def search(
    scorer: Scorer, starts: Sequence[InstanceParams], task: Task, images: Sequence[int] | None = None
) -> InstanceParams:
    """Return the best settings for ``task`` on ``images`` (positions; None: all) from any of ``starts``.

    Among equals the first one tried wins, so a model's own point is left only for something better.
    Raises ``UsageError`` without an image or a start.
    """
    images = range(len(scorer)) if images is None else images
    if not len(images) or not starts:
        raise UsageError("calibration needs at least one image with its truth and one starting point")

    def ranked(params: InstanceParams) -> tuple[float, ...]:
        return rank(task, figures(scorer.scores(params, images)))

    found = [_climb(start, search_axes(start, task), ranked) for start in starts]
    return max(found, key=ranked)


def most_trials(starts: Sequence[InstanceParams], task: Task) -> int:
    """Return the maximum number of settings that ``search`` tries from ``starts``."""
    groups = [math.prod(map(len, axes.values())) for start in starts for axes in search_axes(start, task)]
    return len(starts) + ROUNDS * sum(groups)


def _climb(
    start: InstanceParams, axes: Sequence[Axes], ranked: Callable[[InstanceParams], tuple[float, ...]]
) -> InstanceParams:
    best, best_rank = start, ranked(start)
    for _ in range(ROUNDS):
        before = best
        for group in axes:
            for candidate in list(_varied(best, group)):
                candidate_rank = ranked(candidate)
                if candidate_rank > best_rank:
                    best, best_rank = candidate, candidate_rank
        if best == before:
            break
    return best


def _varied(params: InstanceParams, group: Axes) -> Iterator[InstanceParams]:
    for values in itertools.product(*group.values()):
        yield msgspec.structs.replace(params, **dict(zip(group, values, strict=True)))


# --------------------------------------------------------------------------------------------------- how sure one is


def deal(n_images: int, n_folds: int = FOLDS) -> list[list[int]]:
    """Deal positions 0..n-1 in turn to ``n_folds`` folds, but at most one fold per image.

    Raises ``UsageError`` with fewer than two images, which leave none to report on.
    """
    if n_images < 2:
        raise UsageError(
            f"calibration needs at least 2 images, got {n_images}: it reports on images it did not choose settings on"
        )
    return [list(range(first, n_images, n_folds)) for first in range(min(n_folds, n_images))]


@dataclass(frozen=True)
class CrossFit:
    """``scores``: of each image, at every IoU level of ``map``, with settings chosen without it.

    ``choices``: settings chosen for each fold.
    """

    scores: list[ImageScore]
    choices: list[InstanceParams]


def cross_fit(scorer: Scorer, starts: Sequence[InstanceParams], task: Task, folds: Sequence[Sequence[int]]) -> CrossFit:
    """Score the images of each fold with the settings that ``search`` chooses on the other folds."""
    scores: dict[int, ImageScore] = {}
    choices = []
    for fold in folds:
        others = [image for image in range(len(scorer)) if image not in fold]
        choice = search(scorer, starts, task, others)
        choices.append(choice)
        scores |= dict(zip(fold, scorer.full_scores(choice, fold), strict=True))
    return CrossFit([scores[image] for image in sorted(scores)], choices)


def intervals(
    scores: Sequence[ImageScore], names: Sequence[str] = REPORTED, *, repeats: int = BOOTSTRAPS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile bootstrap interval over images of each figure in ``names``; deterministic per seed.

    A repeat in which a figure is undefined (a count error without a true cell) is skipped for that figure.
    """
    draws = np.random.default_rng(seed).integers(len(scores), size=(repeats, len(scores)))
    pooled = [figures([scores[image] for image in draw]) for draw in draws]
    result = {}
    for name in names:
        values = np.array([entry[name] for entry in pooled])
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, INTERVAL) if len(values) else (np.nan, np.nan)
        result[name] = (float(low), float(high))
    return result


@dataclass(frozen=True)
class Step:
    """One setting moved from the chosen point, all others kept, and the result on all images."""

    parameter: str
    value: float
    figures: dict[str, float]


def sensitivity(scorer: Scorer, params: InstanceParams, task: Task) -> list[Step]:
    """Measure how much each setting matters: its values in ``search_axes`` around ``params``, one setting at a time."""
    steps = []
    for group in search_axes(params, task):
        for name, values in group.items():
            for value in values:
                scores = scorer.scores(msgspec.structs.replace(params, **{name: value}), range(len(scorer)))
                steps.append(Step(name, value, figures(scores)))
    return steps


@dataclass(frozen=True)
class TaskCalibration:
    """All results for one task. ``before``: the operating point that was in the model, None if there was none.

    ``chosen``: on all images. ``fit`` scores images with choices made without them; ``intervals`` refer to ``fit``.
    ``*_figures``: as ``figures``; those of ``chosen`` are optimistic, and so are those of ``before`` if that point was
    chosen on these images (as in a training that validated on them).
    """

    before: InstanceParams | None
    chosen: InstanceParams
    fit: CrossFit
    before_figures: dict[str, float] | None
    chosen_figures: dict[str, float]
    fit_figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    steps: list[Step]


def calibrate(
    scorer: Scorer, operating_points: dict[str, InstanceParams], variant: Variant
) -> dict[Task, TaskCalibration]:
    """Choose settings for each task, with their quality and its uncertainty. Raises ``UsageError``."""
    folds = deal(len(scorer))
    everything = range(len(scorer))
    result: dict[Task, TaskCalibration] = {}
    for task in TASKS:
        starts = starting_points(operating_points, task, variant)
        before = operating_points.get(task)
        chosen = search(scorer, starts, task)
        fit = cross_fit(scorer, starts, task, folds)
        result[task] = TaskCalibration(
            before=before,
            chosen=chosen,
            fit=fit,
            before_figures=None if before is None else figures(scorer.full_scores(before, everything)),
            chosen_figures=figures(scorer.full_scores(chosen, everything)),
            fit_figures=figures(fit.scores),
            intervals=intervals(fit.scores),
            steps=sensitivity(scorer, chosen, task),
        )
    return result
