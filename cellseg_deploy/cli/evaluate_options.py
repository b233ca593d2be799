"""Options shared by the commands of ``cellseg-evaluate``, and the valid combinations for ``score``.

Each refusal is one sentence, and comes before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cellseg_deploy.cli import console
from cellseg_deploy.cli.console import refuse_options

if TYPE_CHECKING:
    from cellseg_deploy.cells.field_of_view import Field
    from cellseg_deploy.evaluate.score import Predictor
    from cellseg_deploy.evaluate.specks import SpeckLimit
    from cellseg_deploy.evaluate.truths import Truths
    from cellseg_deploy.images.find import Pair
    from cellseg_deploy.images.mask_foreground import MaskForeground
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.models.spec import ModelSpec
    from cellseg_deploy.segmenter import Segmenter
    from cellseg_deploy.threads import ThreadPlan

T = TypeVar("T")
Kind = Literal["images", "labels"]
"""What is judged: cells that a model finds in photographs, or label images written by another tool."""

_EXTRAS = ("sweep", "anatomy", "save_labels")
_OF_THE_ENGINE = (
    *("scale", "cell_diameter", "batch_size", "device", "backend", "precision"),
    *("rebuild", "cuda_graph", "threads", "streams", "halo", "border_cells", "field"),
)
_OF_THE_MODEL = (*_OF_THE_ENGINE, "model", "task", "max_pixels", "bit_depth", "save_labels", "sweep")
_MODEL_FILES = (".onnx", ".safetensors")


@dataclass(frozen=True)
class Shared:
    """Options of every command.

    ``classes``: names in ``--classes``, None if not passed. ``engine``: options of ``console.model_options``
    and ``border_cells``, by name.
    """

    output: Path
    min_area: int | None
    max_pixels: int
    bit_depth: int | None
    mask_foreground: MaskForeground
    field: Field
    quiet: bool
    classes: tuple[str, ...] | None
    engine: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Shared:
        """Collect these options from all that click has ``given`` to a command."""
        own = [name for name in cls.__dataclass_fields__ if name not in ("classes", "engine")]
        engine = {"task": "counting", "border_cells": "visible"} | {**given}
        classes = console.names_in(given.get("classes"))
        return cls(**{name: given[name] for name in own}, classes=classes, engine=engine)

    def open_segmenter(self, images: Path | None, classes: Sequence[str] | None = None) -> Segmenter:
        """Open the model, by default the one that ships with the package. Raises as ``Segmenter.load`` does.

        ``images``: folder to measure the scale on, unless the scale was passed. ``classes``: classes that count.
        """
        from cellseg_deploy.segmenter import Segmenter

        engine = self.engine
        segmenter = Segmenter.load(
            engine["model"],
            engine=console.engine_options(engine, self.thread_plan),
            classes=classes,
            **console.segmenter_options(engine),
        )
        if segmenter.auto_scale and images is not None:
            try:
                self._measure(segmenter, images)
            except BaseException:
                segmenter.close()
                raise
        return segmenter

    def _measure(self, segmenter: Segmenter, folder: Path) -> None:
        """Measure the scale of the images in ``folder``, once per image size."""
        from cellseg_deploy.images import groups
        from cellseg_deploy.images.find import find_images

        for group, images in groups.groups_of(find_images([folder], follow_links=True)).items():
            sample = list(groups.sample(images, self.reading))
            choice = segmenter.find_scale(sample, field=self.field)
            segmenter.measured_scales |= {image.shape[:2]: choice.scale for image in sample}
            if not self.quiet:
                console.say(choice.summary(group, segmenter.backend.spec.cell_diameter_px))

    @property
    def thread_plan(self) -> ThreadPlan:
        """Threads for the engine and for the rest."""
        engine = self.engine
        return console.plan_threads(
            engine["threads"], device=engine["device"], model=engine["model"], backend=engine["backend"]
        )

    @property
    def reading(self) -> ReadOptions:
        """Settings for reading images."""
        return console.read_options(vars(self))

    def predictor(self, segmenter: Segmenter, *, keep_probabilities: bool = False) -> Predictor:
        """Return ``segmenter`` with the settings for reading."""
        from cellseg_deploy.evaluate.score import Predictor

        return Predictor(
            segmenter,
            self.thread_plan,
            self.reading,
            keep_probabilities=keep_probabilities,
            mask_foreground=self.mask_foreground,
            field=self.field,
        )

    def truths(self, pairs: Sequence[Pair], spec: ModelSpec | None) -> tuple[SpeckLimit, Truths]:
        """Read all masks of ``pairs``; return their speck limit and the masks.

        ``spec``: of the model, which may hold the share of the median object; None if labels are judged.
        """
        from cellseg_deploy.evaluate import specks
        from cellseg_deploy.evaluate.truths import Truths
        from cellseg_deploy.models.spec import MIN_OBJECT_REL

        share = None if spec is None else spec.min_object_rel
        share = MIN_OBJECT_REL if share is None else share
        truths = Truths(pairs, self.mask_foreground)
        return specks.speck_limit(truths.areas, share=share, given_px=self.min_area), truths


def with_progress(images: Iterable[T], total: int, quiet: bool) -> Iterator[T]:
    """Yield ``images`` and show progress, unless ``quiet``."""
    from cellseg_deploy.cli.progress import Progress

    if quiet:
        yield from images
        return
    with Progress(total) as progress:
        for image in images:
            yield image
            progress.advance()


def is_model_file(path: Path) -> bool:
    """Return whether ``path`` is named like a model file that can be described."""
    return path.suffix.lower() in _MODEL_FILES


def refuse_engine_options(context: click.Context, because: str) -> None:
    """Raise click's usage error if an option was passed that only a network uses."""
    refuse_options(context, ("task", *_OF_THE_ENGINE), because)


def check_score(context: click.Context, given: Mapping[str, Any]) -> tuple[Path, Kind]:
    """Return the folder to judge, and what it holds. Raises click's usage error if options contradict.

    ``given``: the options by name. Afterwards ``output`` is a path, and exactly one truth is set.
    """
    judged, kind = _judged_folder(context, given)
    truths = [name for name in ("masks", "boxes", "points", "counts") if given[name] is not None]
    if not truths:
        raise click.UsageError("give --masks DIR, the ground truth (or --boxes, --points or --counts FILE.csv)")
    if len(truths) > 1:
        raise click.UsageError(f"{_flag(truths[0])} and {_flag(truths[1])} exclude each other; give one truth")
    (truth,) = truths
    for name in _EXTRAS:
        if given[name] and truth == "counts":
            raise click.UsageError(f"{_flag(name)} and --counts exclude each other: counts do not say where cells are")
        if given[name] and truth != "masks":
            raise click.UsageError(f"{_flag(name)} needs --masks, not {_flag(truth)}")
    if given["unmarked"] is not None and truth != "points":
        raise click.UsageError(f"--unmarked needs --points, not {_flag(truth)}")
    if truth in ("boxes", "points"):
        refuse_options(context, ("count_rule",), f"has no effect with {_flag(truth)}: border objects are not scored")
    elif given["classes"] is not None and kind == "labels":
        raise click.UsageError(
            "--classes needs --boxes, --points, or a model that counts: label images have no classes"
        )
    if given["sweep"]:
        refuse_options(context, ("count_rule",), "and --sweep exclude each other: a sweep uses all cells")
    output = given["output"]
    if output is None:
        raise click.UsageError("give -o OUT, the folder for the results")
    if is_model_file(output):
        raise click.UsageError(
            f"OUT is the folder for the results, but {output} is named as a model file, which only the commands "
            "calibrate and describe write"
        )
    return judged, kind


def _judged_folder(context: click.Context, given: Mapping[str, Any]) -> tuple[Path, Kind]:
    images: Path | None = given["images"]
    labels: Path | None = given["labels"]
    if labels is None:
        if images is None:
            raise click.UsageError("give --images DIR for a model to count, or --labels DIR with label images to score")
        return images, "images"
    if images is not None:
        raise click.UsageError("--images and --labels exclude each other: score either a model or label images")
    without_model = "and --labels exclude each other: label images are scored without a model"
    refuse_options(context, _OF_THE_MODEL, without_model)
    return labels, "labels"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
