"""Result of comparing two forms of a network: figures, verdict and reasons, as JSON and as a text table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.metrics import ImageScore, pool
from cellseg_deploy.errors import plural
from cellseg_deploy.parity.policy import ParityPolicy
from cellseg_deploy.parity.tensors import QUANTILES, TensorDifference, pool_differences

Verdict = Literal["passed", "failed", "inconclusive"]
REPORT_VERSION = 2

_METRIC_COLUMNS = ("f1", "precision", "recall", "map", "pq_strict", "dice", "count_mae", "merges", "splits")


@dataclass(frozen=True)
class TaskComparison:
    """One image labelled from both sides at the operating point of one task.

    ``score``: of the candidate, with the reference as the truth. ``reference_truth``, ``candidate_truth``: of each side
    against true labels, if available. ``n_matched``, ``class_changes``: number of cells that both find, and how many of
    them change class; 0 without classes.
    """

    score: ImageScore
    differing_px: int
    n_px: int
    reference_truth: ImageScore | None = None
    candidate_truth: ImageScore | None = None
    n_matched: int = 0
    class_changes: int = 0

    @property
    def count_difference(self) -> int:
        """Cells of the candidate - cells of the reference."""
        return self.score.n_predicted - self.score.n_true


@dataclass(frozen=True)
class ImageComparison:
    """One image through both forms. ``tensors``: per channel, (h, w) of the probabilities at model scale."""

    name: str
    tensors: dict[str, TensorDifference]
    tasks: dict[str, TaskComparison]


@dataclass(frozen=True)
class WorstImage:
    """The image in which the two forms differ most, for the picture; ``differing`` (h, w) marks the pixels."""

    name: str
    task: str
    image_hwc: npt.NDArray[np.uint8]
    reference: npt.NDArray[np.int32]
    candidate: npt.NDArray[np.int32]
    differing: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Side:
    """One of the two forms: engine, device, precision, name of the network, and the engine's own description."""

    model: str
    backend: str
    device: str
    precision: str
    details: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.model} ({self.backend}, {self.device}, {self.precision})"


@dataclass(frozen=True)
class ParityReport:
    """Result of ``parity.compare``.

    ``images_from``: where the images came from. ``hints``: possible faults. ``faults``: findings of other checks of the
    candidate; one is enough to refuse it. ``notes``: further remarks on the candidate. ``parts_at``: the part of the
    network from which the two differ, if localised; otherwise empty. ``worst``: not in JSON.
    """

    reference: Side
    candidate: Side
    policy: ParityPolicy
    images_from: str
    images: tuple[ImageComparison, ...]
    hints: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts_at: str = ""
    worst: WorstImage | None = field(default=None, repr=False, compare=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose operating points were compared."""
        return tuple(self.images[0].tasks)

    @property
    def n_cells(self) -> int:
        """Number of cells that the reference found, for the task with the fewest."""
        return min(sum(image.tasks[task].score.n_true for image in self.images) for task in self.tasks)

    @property
    def has_truth(self) -> bool:
        """Whether true labels were passed for every image."""
        return all(part.reference_truth is not None for image in self.images for part in image.tasks.values())

    @property
    def n_true_cells(self) -> int:
        """Number of cells in the true labels, 0 without true labels."""
        parts = [image.tasks[self.tasks[0]].reference_truth for image in self.images]
        return sum(score.n_true for score in parts if score is not None)

    @property
    def max_difference(self) -> float:
        """Largest difference of a probability."""
        return max(difference.max for image in self.images for difference in image.tensors.values())

    @property
    def tensors_agree(self) -> bool:
        """Whether no probability differs by more than the policy's tolerance."""
        return self.max_difference <= self.policy.tensor_tolerance

    @property
    def verdict(self) -> Verdict:
        """``failed`` on a fault; ``inconclusive`` with too few cells to judge by."""
        if self.faults:
            return "failed"
        if self._too_few():
            return "inconclusive"
        return "failed" if any(self._complaints(task) for task in self.tasks) else "passed"

    @property
    def passed(self) -> bool:
        """Whether the candidate may take the place of the reference."""
        return self.verdict == "passed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is not ``passed``, with the places to check first; empty if it is."""
        if self.verdict == "passed":
            return ()
        reasons = list(self.faults)
        reasons += self._too_few()
        before = len(reasons)
        reasons += [complaint for task in self.tasks for complaint in self._complaints(task)]
        if len(reasons) > before:
            reasons += [self._where(channel) for channel in self.images[0].tensors if self._differs(channel)]
        return (*reasons, *self.hints, *([self.parts_at] if self.parts_at else []))

    def summary(self, task: str) -> dict[str, Any]:
        """Return figures of ``task`` over all images; keys as in the report's JSON."""
        parts = [image.tasks[task] for image in self.images]
        scores = [part.score for part in parts]
        found = sum(s.n_true + s.n_predicted for s in scores)
        foreground = sum(s.foreground.true_px + s.foreground.predicted_px for s in scores)
        worst = max(
            self.images, key=lambda image: (abs(image.tasks[task].count_difference), image.tasks[task].differing_px)
        )
        f1 = {
            f"f1_at_{level:g}": 2 * sum(s.matches_at(level) for s in scores) / found if found else 1.0
            for level in scores[0].thresholds
        }
        return {
            "reference_cells": sum(s.n_true for s in scores),
            "candidate_cells": sum(s.n_predicted for s in scores),
            "max_count_difference": max(abs(part.count_difference) for part in parts),
            **f1,
            "dice": 2 * sum(s.foreground.common_px for s in scores) / foreground if foreground else 1.0,
            "merges": sum(s.merges for s in scores),
            "splits": sum(s.splits for s in scores),
            "differing_px": sum(part.differing_px for part in parts),
            "differing_share": sum(part.differing_px for part in parts) / sum(part.n_px for part in parts),
            "class_changes": sum(part.class_changes for part in parts),
            "worst_image": worst.name,
        }

    def truth(self, task: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics of both forms against the true labels (``metrics.pool``); only if ``has_truth``."""
        parts = [image.tasks[task] for image in self.images]
        return (
            pool([part.reference_truth for part in parts if part.reference_truth is not None]),
            pool([part.candidate_truth for part in parts if part.candidate_truth is not None]),
        )

    def tensor(self, channel: str) -> tuple[TensorDifference, str]:
        """Return the difference of ``channel`` over all images, and the image with the worst value."""
        pooled, worst = pool_differences([image.tensors[channel] for image in self.images])
        return pooled, self.images[worst].name

    def to_json(self) -> bytes:
        """Return the whole report, indented, ending in a newline."""
        tensors = {}
        for channel in self.images[0].tensors:
            pooled, name = self.tensor(channel)
            tensors[channel] = _tensor_row(pooled) | {"worst_image": name}
        content = {
            "report_version": REPORT_VERSION,
            "verdict": self.verdict,
            "reasons": self.reasons,
            "faults": self.faults,
            "notes": self.notes,
            "policy": asdict(self.policy),
            "reference": asdict(self.reference),
            "candidate": asdict(self.candidate),
            "images_from": self.images_from,
            "n_images": len(self.images),
            "tensors": tensors,
            "tasks": {task: self.summary(task) for task in self.tasks},
            "truth": self._truth_rows(),
            "images": [_image_row(image) for image in self.images],
        }
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

    def to_text(self) -> str:
        """Return a short table: what was compared, the figures, the verdict and its reasons."""
        over = f"over {self.policy.tensor_tolerance:g}"
        lines = [
            f"reference  {self.reference}",
            f"candidate  {self.candidate}",
            f"images     {len(self.images)}: {self.images_from}",
            f"policy     {self.policy}",
            "",
            f"{'channel':<12}{'max':>10}{'mean':>10}{'p99':>10}{'cosine':>11}{over:>12}  worst",
        ]
        for channel in self.images[0].tensors:
            d, name = self.tensor(channel)
            p99 = d.quantiles[QUANTILES.index(0.99)]
            lines.append(
                f"{channel:<12}{d.max:>10.2e}{d.mean:>10.2e}{p99:>10.2e}{d.cosine:>11.7f}{d.share_over:>12.2e}  "
                f"{name} {_place(d)}: {d.worst_reference:.4f} -> {d.worst_candidate:.4f}"
            )
        levels = [key for key in self.summary(self.tasks[0]) if key.startswith("f1_at_")]
        heads = "".join(f"{'F1@' + key.removeprefix('f1_at_'):>9}" for key in levels)
        lines += ["", f"{'task':<12}{'cells':>12}{heads}{'Dice':>10}{'merges':>8}{'splits':>8}{'differing':>11}  worst"]
        for task in self.tasks:
            s = self.summary(task)
            figures = "".join(f"{s[key]:>9.4f}" for key in levels)
            cells = f"{s['reference_cells']} -> {s['candidate_cells']}"
            lines.append(
                f"{task:<12}{cells:>12}{figures}{s['dice']:>10.6f}{s['merges']:>8}{s['splits']:>8}"
                f"{s['differing_share']:>11.2e}  {s['worst_image']}"
            )
        if self.has_truth:
            lines += ["", *self._truth_table()]
        lines += ["", *(f"note       {note}" for note in self.notes)] if self.notes else []
        lines += ["", f"verdict    {self.verdict}", *(f"  - {reason}" for reason in self.reasons)]
        return "\n".join(lines)

    def _truth_rows(self) -> dict[str, dict[str, dict[str, float | None]]] | None:
        """Return both rows of metrics per task, an undefined one as None."""
        if not self.has_truth:
            return None
        rows = {}
        for task in self.tasks:
            sides = zip(("reference", "candidate"), self.truth(task), strict=True)
            rows[task] = {
                side: {key: None if math.isnan(value) else value for key, value in row.items()} for side, row in sides
            }
        return rows

    def _truth_table(self) -> list[str]:
        """Format both forms against the truth, one below the other."""
        heads = "".join(f"{name:>10}" for name in _METRIC_COLUMNS)
        lines = [f"{'truth: ' + plural(self.n_true_cells, 'cell'):<22}{heads}"]
        for task in self.tasks:
            for side, row in zip(("reference", "candidate"), self.truth(task), strict=True):
                figures = (
                    f"{row[key]:>10d}" if isinstance(row[key], int) else f"{row[key]:>10.4f}" for key in _METRIC_COLUMNS
                )
                lines.append(f"{f'{task}, {side}':<22}{''.join(figures)}")
        return lines

    def _too_few(self) -> list[str]:
        """Return why nothing can be judged; empty if it can."""
        least, where = self.policy.min_cells, f"in {plural(len(self.images), 'image')}"
        if self.n_cells < least:
            return [
                f"the reference found {plural(self.n_cells, 'cell')} {where}, at least {least} "
                f"are needed to judge; give images "
                "with more cells, or train the network"
            ]
        if self.policy.needs_truth and self.n_true_cells < least:
            return [
                f"the true labels hold {plural(self.n_true_cells, 'cell')} {where}, at least "
                f"{least} are needed to judge; give "
                "images with more cells and their masks"
            ]
        return []

    def _differs(self, channel: str) -> bool:
        return self.tensor(channel)[0].max > self.policy.tensor_tolerance

    def _complaints(self, task: str) -> list[str]:
        """Describe each limit of the policy that ``task`` violates."""
        policy, s = self.policy, self.summary(task)
        complaints = []
        allowed = policy.max_count_difference
        off = [i for i in self.images if allowed is not None and abs(i.tasks[task].count_difference) > allowed]
        if off:
            score = next(image for image in off if image.name == s["worst_image"]).tasks[task].score
            complaints.append(
                f"{task}: counts differ in {len(off)} of {plural(len(self.images), 'image')}, "
                f"most in {s['worst_image']}: "
                f"{plural(score.n_true, 'cell')} in the reference, {score.n_predicted} in the candidate"
            )
        expected, got = s["reference_cells"], s["candidate_cells"]
        if policy.max_total_difference is not None and abs(got - expected) > policy.max_total_difference * expected:
            complaints.append(
                f"{task}: {plural(got, 'cell')} in all, {expected} in the reference: "
                f"{abs(got - expected) / max(expected, 1):.2%} apart, allowed {policy.max_total_difference:.2%}; "
                f"most in {s['worst_image']}"
            )
        f1 = s[f"f1_at_{policy.f1_iou:g}"]
        if policy.min_f1 is not None and f1 < policy.min_f1:
            worst = min(self.images, key=lambda image: image.tasks[task].score.f1_at(policy.f1_iou))
            complaints.append(
                f"{task}: matched F1 at IoU {policy.f1_iou:g} is {f1:.4f}, expected {policy.min_f1:g} or more "
                f"({s['merges']} merges, {s['splits']} splits); worst in {worst.name}: "
                f"{worst.tasks[task].score.f1_at(policy.f1_iou):.4f}"
            )
        if policy.max_f1_drop is not None:
            before, after = (row["f1"] for row in self.truth(task))
            if not before - after <= policy.max_f1_drop + 1e-12:  # a drop of exactly 0.01 is allowed
                complaints.append(
                    f"{task}: F1 against the truth falls from {before:.4f} to {after:.4f}, by {before - after:.4f}; "
                    f"allowed {policy.max_f1_drop:g}"
                )
        most = policy.max_differing_share
        if most is not None and s["differing_share"] > most:
            worst = max(self.images, key=lambda image: image.tasks[task].differing_px)
            complaints.append(
                f"{task}: {s['differing_share']:.2e} of the pixels differ, allowed {policy.max_differing_share:g}; "
                f"most in {worst.name}: {worst.tasks[task].differing_px} of {worst.tasks[task].n_px}"
            )
        matched = sum(image.tasks[task].n_matched for image in self.images)
        if s["class_changes"] > policy.max_class_changes * matched:
            worst = max(self.images, key=lambda image: image.tasks[task].class_changes)
            complaints.append(
                f"{task}: {s['class_changes']} of {matched} cells that both find have another class, allowed "
                f"{policy.max_class_changes:.1%}; most in {worst.name}: {worst.tasks[task].class_changes} of "
                f"{worst.tasks[task].n_matched}"
            )
        return complaints

    def _where(self, channel: str) -> str:
        d, name = self.tensor(channel)
        text = (
            f"channel {channel}: {d.share_over:.2%} of the probabilities differ by more than {d.tolerance:g}; worst in "
            f"{name}, {_place(d)} at model scale: {d.worst_reference:.4f} in the reference, {d.worst_candidate:.4f} in "
            "the candidate"
        )
        if d.candidate_is_constant:
            text += f"; the candidate says {d.candidate_range[0]:.4f} everywhere, as if that output were cut off"
        return text


def _place(difference: TensorDifference) -> str:
    return "row {}, column {}".format(*difference.worst_at)


def _tensor_row(difference: TensorDifference) -> dict[str, Any]:
    row = asdict(difference)
    for key in ("dot", "reference_square", "candidate_square"):
        del row[key]
    row["quantiles"] = {f"{q:g}": value for q, value in zip(QUANTILES, difference.quantiles, strict=True)}
    return row | {"cosine": difference.cosine}


def _image_row(image: ImageComparison) -> dict[str, Any]:
    return {
        "image": image.name,
        "tensors": {channel: _tensor_row(difference) for channel, difference in image.tensors.items()},
        "tasks": {
            task: {
                "reference_cells": part.score.n_true,
                "candidate_cells": part.score.n_predicted,
                **{f"f1_at_{level:g}": part.score.f1_at(level) for level in part.score.thresholds},
                "merges": part.score.merges,
                "splits": part.score.splits,
                "differing_px": part.differing_px,
                "n_px": part.n_px,
                "class_changes": part.class_changes,
            }
            for task, part in image.tasks.items()
        },
    }
