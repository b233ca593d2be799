"""The Python interface to scoring labels against masks: the figures of ``cellseg-evaluate``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.field_of_view import Field, check_field
from cellseg_deploy.cells.metrics import ImageScore, pool
from cellseg_deploy.errors import UsageError, check_types
from cellseg_deploy.evaluate import specks
from cellseg_deploy.evaluate.score import Predictor, score_pairs
from cellseg_deploy.evaluate.specks import SpeckLimit
from cellseg_deploy.images import groups
from cellseg_deploy.images.find import find_images, pair_by_stem
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.models.spec import MIN_OBJECT_REL
from cellseg_deploy.segmenter import Segmenter

_READ_DEFAULTS = ReadOptions()


@dataclass(frozen=True)
class Evaluation:
    """How well cells were found, over all images.

    ``metrics``: every pooled figure, by its name in metrics.json (see docs/evaluation.md); NaN if undefined.
    ``images``: the score of each image by its stem. ``specks``: the limit below which an object does not count.

    >>> score = evaluate(None, "val/masks", "other-tool")
    >>> score.f1, score.count_mape, sorted(score.images)
    (1.0, 0.0, ['other', 'smear'])
    """

    metrics: Mapping[str, float]
    images: Mapping[str, ImageScore] = dataclass_field(repr=False)
    specks: SpeckLimit

    @property
    def f1(self) -> float:
        """F1 of cells matched at an IoU of 0.5, 0 to 1."""
        return self.metrics["f1"]

    @property
    def precision(self) -> float:
        """Share of the found cells that are true, 0 to 1."""
        return self.metrics["precision"]

    @property
    def recall(self) -> float:
        """Share of the true cells that were found, 0 to 1."""
        return self.metrics["recall"]

    @property
    def dice(self) -> float:
        """Overlap of foreground pixels, 0 to 1."""
        return self.metrics["dice"]

    @property
    def count_mae(self) -> float:
        """Mean absolute error of the count, in cells per image."""
        return self.metrics["count_mae"]

    @property
    def count_mape(self) -> float:
        """Mean absolute error of the count as a share of the true count; NaN if no image has a cell."""
        return self.metrics["count_mape"]

    @property
    def count_bias(self) -> float:
        """Mean of found minus true cells per image."""
        return self.metrics["count_bias"]

    @property
    def merges(self) -> int:
        """Number of found cells that cover several true cells."""
        return int(self.metrics["merges"])

    @property
    def splits(self) -> int:
        """Number of true cells that were found in several pieces."""
        return int(self.metrics["splits"])


def evaluate(
    images: str | Path | None,
    masks: str | Path,
    predicted: Segmenter | str | Path,
    *,
    read: ReadOptions = _READ_DEFAULTS,
    field: Field = "auto",
    count_rule: CountRule = DEFAULT_RULE,
    min_area_px: int | None = None,
    mask_foreground: MaskForeground = "auto",
) -> Evaluation:
    """Score the cells that a model finds in ``images``, or any tool's label images, against ``masks``.

    ``images``: folder of photographs, paired with ``masks`` by stem. ``predicted``: a segmenter, or the folder of label
    images to judge (``images`` is then not read and may be None). ``min_area_px``: smaller objects are specks; None:
    the share of the masks' median object that the model was trained with. ``count_rule``, ``field``: as in
    ``Segmenter.run``. ``mask_foreground``: which mask values are cells, see ``images.mask_foreground``.

    A model whose scale is measured measures it once for the images of one folder and size.

    Raises ``DataError`` naming an unusable or unpaired file, ``NothingToDoError`` without images, and
    ``UsageError``.

    >>> score = evaluate("val/images", "val/masks", model)
    >>> 0.8 < score.f1 <= 1
    True
    >>> score = evaluate(None, "val/masks", "other-tool")
    >>> score.merges
    0
    """
    check_types("a path or None", images=images)
    check_types("a path", masks=masks)
    check_types(ReadOptions, read=read)
    check_field(field)
    check_rule(count_rule)
    check_types("a whole number or None", min_area_px=min_area_px)
    segmenter = predicted if isinstance(predicted, Segmenter) else None
    if segmenter is None:
        check_types("a path", predicted=predicted)
    if segmenter is not None and images is None:
        raise UsageError("images must be the folder of photographs that the model is to count, got None")
    judged = Path(images if segmenter is not None and images is not None else str(predicted))
    pairs = pair_by_stem(judged, Path(masks))
    share = None if segmenter is None else segmenter.backend.spec.min_object_rel
    limit = specks.speck_limit(
        specks.object_areas(pairs, mask_foreground),
        share=MIN_OBJECT_REL if share is None else share,
        given_px=min_area_px,
    )
    predictor = None
    if segmenter is not None:
        predictor = Predictor(
            _measured(segmenter, judged, read, field),
            thread_plans.plan_of_engine(segmenter.threads),
            read,
            mask_foreground=mask_foreground,
            field=field,
        )
    scored = score_pairs(pairs, predictor, min_area_px=limit.px, count_rule=count_rule, mask_foreground=mask_foreground)
    with closing(scored):
        scores = {image.name: image.score for image in scored}
    return Evaluation(pool(list(scores.values())), scores, limit)


def _measured(segmenter: Segmenter, folder: Path, read: ReadOptions, field: Field) -> Segmenter:
    """Return ``segmenter``, sharing its network, with the scale of the images in ``folder`` if it measures scales."""
    if not segmenter.auto_scale:
        return segmenter
    measured = copy.copy(segmenter)
    measured.measured_scales = {}
    for images in groups.groups_of(find_images([folder], follow_links=True)).values():
        sample = list(groups.sample(images, read))
        choice = segmenter.find_scale(sample, field=field)
        measured.measured_scales |= {(image.shape[0], image.shape[1]): choice.scale for image in sample}
    return measured
