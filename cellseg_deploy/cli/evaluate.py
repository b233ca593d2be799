"""``cellseg-evaluate``: how well do labels agree with masks drawn by people?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cellseg_deploy.cli import console, evaluate_options

if TYPE_CHECKING:
    from cellseg_deploy.cells.count_rules import CountRule
    from cellseg_deploy.cells.field_of_view import Field
    from cellseg_deploy.cells.instances import BorderCells
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

_EPILOG = """\b
Examples:
  cellseg-evaluate --images val/images --masks val/masks -o scores/        the model that ships with the package
  cellseg-evaluate --model my.onnx --images val/images --masks val/masks -o scores/
  cellseg-evaluate --labels other-tool/ --masks val/masks -o scores/       any tool's label images
  cellseg-evaluate --images val/images --masks val/masks -o scores/ --sweep --anatomy
  cellseg-evaluate --images val/images --counts by-hand.csv -o agreement/  counts by hand: image,count
  cellseg-evaluate --calibrate --model my.onnx --images val/images --masks val/masks -o calibrated.onnx
  cellseg-evaluate --describe --images new/ -o about-new/
  cellseg-evaluate --describe --model my.onnx --images train/images --masks train/masks -o described.onnx

\b
Files pair by name without ending: a.png, a.tif and a.png.tif belong together. Masks may be binary (cells are then
the 4-connected components) or label images.

\b
Results (those of an earlier evaluation are replaced):
  OUT/metrics.json   all images together            OUT/metrics.csv   a row an image
  OUT/labels/        with --save-labels, the label images that were judged
  OUT/sweep.png      with --sweep, the figure; its numbers in sweep.csv; reliability.png, reliability.json: are the
                     probabilities true
  OUT/anatomy/       with --anatomy, contact sheets by kind of error; each error with its place in anatomy.csv
With --counts instead:
  OUT/agreement.json bias and limits of agreement   OUT/agreement.csv  a row an image
  OUT/agreement.png  the differences against the counts (Bland and Altman's plot)
With --describe instead:
  OUT/data.png       the figure; its numbers in data.json and data.csv
  OUT.onnx           or OUT.safetensors: the model, with what these images, its training images, are like
With --calibrate instead:
  OUT.onnx           the model with the chosen operating points; OUT.calibration.json says how good they are and
                     OUT.calibration.png whether the probabilities are true

\b
Exit codes: 0 done, 2 usage, 3 a file is damaged, mis-sized or has no partner, 4 no image found, 5 model refused,
6 output folder unusable, 7 output folder in use, 8 engine or device not available, 130 interrupted, 143/129 terminated
or terminal closed.
"""


@dataclass(frozen=True)
class Options:
    """The command line as it was given; names as the options' own."""

    images: Path | None
    labels: Path | None
    masks: Path | None
    boxes: Path | None
    points: Path | None
    classes: str | None
    counts: Path | None
    output: Path
    min_area: int | None
    save_labels: bool
    sweep: bool
    anatomy: bool
    calibrate: bool
    describe: bool
    model: Path | None
    task: str
    scale: float | None
    cell_diameter: float | Literal["auto"] | None
    batch_size: int
    device: str | None
    backend: str
    rebuild: bool
    cuda_graph: bool
    precision: str | None
    threads: int | None
    streams: int | None
    halo: int | None
    max_pixels: int
    bit_depth: int | None
    count_rule: CountRule
    border_cells: BorderCells
    field: Field
    mask_foreground: MaskForeground
    quiet: bool
    verbose: int

    def open_segmenter(self) -> Segmenter:
        """The model, or the one that ships with the package. Raises as ``Segmenter.load`` does."""
        from cellseg_deploy.segmenter import Segmenter

        segmenter = Segmenter.load(
            self.model,
            engine=console.engine_options(vars(self), self.thread_plan),
            task=self.task,
            scale=self.scale,
            cell_diameter_px=console.cell_diameter_or_auto(self.scale, self.cell_diameter),
            batch_size=self.batch_size,
            halo=self.halo,
            border_cells=self.border_cells,
            classes=None if self.boxes or self.points else console.names_in(self.classes),
        )
        if segmenter.auto_scale and self.images is not None:
            try:
                self._measure(segmenter, self.images)
            except BaseException:
                segmenter.close()
                raise
        return segmenter

    def _measure(self, segmenter: Segmenter, folder: Path) -> None:
        """Find the scale of the images of ``folder``, once for those of one size."""
        from cellseg_deploy.images.find import find_images
        from cellseg_deploy.run import scales
        from cellseg_deploy.run.record import RunOptions

        options = RunOptions(bit_depth=self.bit_depth, max_pixels=self.max_pixels)
        for group, images in scales.groups_of(find_images([folder])).items():
            sample = list(scales.sample(images, options))
            choice = segmenter.find_scale(sample)
            segmenter.measured_scales |= {image.shape[:2]: choice.scale for image in sample}
            if not self.quiet:
                console.say(scales.said(group, choice, segmenter.backend.spec.cell_diameter_px))

    @property
    def reading(self) -> ReadOptions:
        """How images are read."""
        return console.read_options(vars(self))

    @property
    def thread_plan(self) -> ThreadPlan:
        """Threads for the engine and the rest."""
        return console.plan_threads(self.threads, device=self.device, model=self.model, backend=self.backend)

    def predictor(self, segmenter: Segmenter, *, keep_probabilities: bool = False) -> Predictor:
        """``segmenter`` with the settings for reading."""
        from cellseg_deploy.evaluate.score import Predictor

        return Predictor(
            segmenter,
            self.thread_plan,
            self.reading,
            keep_probabilities=keep_probabilities,
            mask_foreground=self.mask_foreground,
            field=self.field,
        )

    @property
    def given_masks(self) -> Path:
        """The masks, where ``_modes.check`` let no command pass without."""
        if self.masks is None:
            raise RuntimeError("masks are needed here")
        return self.masks

    def measured(self, pairs: Sequence[Pair], spec: ModelSpec | None) -> tuple[Options, SpeckLimit, Truths]:
        """These options with the limit of specks set by the masks of ``pairs``, that limit, and the masks as read.

        ``spec``: of the model, which may know the share of the median object; None where labels are judged.
        """
        from cellseg_deploy.evaluate import specks
        from cellseg_deploy.evaluate.truths import Truths
        from cellseg_deploy.models.spec import MIN_OBJECT_REL

        share = None if spec is None else spec.min_object_rel
        share = MIN_OBJECT_REL if share is None else share
        truths = Truths(pairs, self.mask_foreground)
        limit = specks.speck_limit(truths.areas, share=share, given_px=self.min_area)
        return replace(self, min_area=limit.px), limit, truths

    @property
    def wanted_classes(self) -> tuple[str, ...]:
        """Names of ``--classes``; none: all count."""
        return console.names_in(self.classes) or ()

    @property
    def min_area_px(self) -> int:
        """Limit of specks in px, once it is ``measured``."""
        if self.min_area is None:
            raise RuntimeError("the limit of specks was not measured")
        return self.min_area


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path), help="Photographs for the model to count.")
@click.option("--labels", metavar="DIR", type=click.Path(path_type=Path), help="Label images to judge, no model.")
@click.option("--masks", metavar="DIR", type=click.Path(path_type=Path), help="The truth.")
@click.option(
    "--boxes", metavar="PATH", type=click.Path(exists=True, path_type=Path), help="Boxes as truth: CSV, YOLO, COCO."
)
@click.option(
    "--points",
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="Points as truth: CSV image,class,x,y.",
)
@click.option(
    "--classes",
    metavar="A,B",
    help="Classes that count. Of boxes or points, others count neither way; A=B: the model's class A is B there, "
    "and is scored by itself. With --masks or --counts: classes of the model.  [default: all but platelet]",
)
@click.option(
    "--counts",
    metavar="FILE.csv",
    type=click.Path(path_type=Path),
    help="Counts by hand instead of --masks: columns image and count. Every object counts, specks only with "
    "--min-area not.",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Output folder, or the model file to write: with --calibrate, and with --describe of training images.  "
    "[required]",
)
@click.option(
    "--min-area",
    "--min-object",
    "min_area",
    type=click.IntRange(min=0),
    metavar="PX",
    help="Smaller objects are specks, neither true nor predicted cells.  [default: the share of the masks' median "
    "object that the model was trained with, else 2.45 %; 0 with --boxes, --points]",
)
@click.option("--save-labels", is_flag=True, help="Write the model's label images too.")
@click.option("--sweep", is_flag=True, help="Metrics against the threshold for every method: figure and table.")
@click.option("--anatomy", is_flag=True, help="Every error with its place and kind, and contact sheets of them.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Choose the operating points on these images and write them into the model file OUT.onnx.",
)
@click.option(
    "--describe",
    is_flag=True,
    help="What the images are like (cells of --masks, else those found) and whether the model has seen their like. "
    "With a model file as OUT they are its training images, and that is written into it.",
)
@console.model_options
@console.reading_options
@console.mask_options
@console.count_options
@console.log_options
@click.pass_context
def command(context: click.Context, /, **given: Any) -> int:
    """Judge the cells of a model, or of any tool's label images, by masks drawn by people."""
    console.set_up_logging(given["verbose"])
    judged = evaluate_options.check(context, given)
    options = Options(**given)
    if (
        options.counts
        or options.sweep
        or options.calibrate
        or (options.describe and not evaluate_options.is_model_file(options.output))
    ):
        console.require_packages("plots", "matplotlib")
    if options.counts is not None:
        from cellseg_deploy.cli import evaluate_counts

        return evaluate_counts.run(options, judged)
    if options.calibrate:
        from cellseg_deploy.cli import calibrate as _calibrate

        return _calibrate.run(options, judged)
    if options.describe:
        from cellseg_deploy.cli import describe as _describe

        return _describe.run(options, judged)
    if options.masks is None:
        from cellseg_deploy.cli import evaluate_marks

        return evaluate_marks.run(options, judged)
    return _evaluate(options, judged)


def _evaluate(options: Options, judged: Path) -> int:
    """Score every pair, with the extras that were asked for, and write the report."""
    from cellseg_deploy.cli.evaluate_extras import ANATOMY_FILES, SWEEP_FILES, Anatomy, Sweep, remove_stale
    from cellseg_deploy.cli.evaluate_remarks import Remarks
    from cellseg_deploy.evaluate import score
    from cellseg_deploy.evaluate.report_folder import report_folder
    from cellseg_deploy.files.workspace import workspace
    from cellseg_deploy.images.read import pair_by_stem
    from cellseg_deploy.run.output_folder import check_apart

    output, masks = options.output, options.given_masks
    check_apart([judged, masks], output)
    pairs = pair_by_stem(judged, masks)
    kind = "images" if options.labels is None else "labels"
    about: dict[str, Any] = {"data": {kind: str(judged), "masks": str(masks)}, "count_rule": options.count_rule}
    about["mask_foreground"] = options.mask_foreground
    with ExitStack() as stack:
        predictor: Predictor | None = None
        sweep: Sweep | None = None
        segmenter = stack.enter_context(options.open_segmenter()) if options.labels is None else None
        if segmenter is not None:
            predictor = options.predictor(segmenter, keep_probabilities=options.sweep)
            about["model"] = score.describe_model(segmenter)
        names = [score.METRICS_JSON, score.METRICS_CSV]
        names += [*SWEEP_FILES, *ANATOMY_FILES]
        stack.enter_context(report_folder(output, score.PROGRAM, names))
        options, limit, truths = options.measured(pairs, None if segmenter is None else segmenter.backend.spec)
        about |= {"min_object_rel": limit.share, "n_true_dropped": limit.dropped}
        if segmenter is not None and options.sweep:
            sweep = stack.enter_context(Sweep.opened(segmenter, options.min_area_px))
        anatomy: Anatomy | None = None
        if options.anatomy:
            place = stack.enter_context(workspace(output))
            anatomy = Anatomy(options, place, photographs=options.labels is None)
        write_labels = score.LabelWriter(output, [pair.stem for pair in pairs])
        scores, remarks = [], Remarks()
        scored = score.score_pairs(
            pairs,
            predictor,
            min_area_px=options.min_area_px,
            count_rule=options.count_rule,
            mask_foreground=options.mask_foreground,
            truths=truths,
        )
        stack.enter_context(closing(scored))
        for pair, image in zip(pairs, with_progress(scored, len(pairs), options.quiet), strict=True):
            if options.save_labels:
                write_labels(image)
            if anatomy is not None:
                anatomy.add(pair, image)
            if sweep is not None:
                sweep.take(image)
            scores.append((image.name, image.score))
            remarks.add(image.name, image.notes)
        about["warnings"] = remarks.by_kind()
        if anatomy is not None:
            about |= anatomy.finish()
        if sweep is not None:
            about |= sweep.finish(output, quiet=options.quiet)
        remove_stale(output, sweep=options.sweep, anatomy=options.anatomy)
        pooled = score.write_report(output, scores, min_area_px=options.min_area_px, about=about)
    remarks.say()
    if not options.quiet:
        click.echo(limit.words)
        _print_table(pooled, about, output)
    return console.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))


def with_progress(images: Iterable[T], total: int, quiet: bool) -> Iterator[T]:
    """Hand ``images`` on and show how far it is, unless ``quiet``."""
    from cellseg_deploy.cli.progress import Progress

    if quiet:
        yield from images
        return
    with Progress(total) as progress:
        for image in images:
            yield image
            progress.advance()


def _print_table(pooled: dict[str, float], about: dict[str, Any], output: Path) -> None:
    from cellseg_deploy.cli.evaluate_extras import extra_rows

    rows = [
        ("images", f"{pooled['n_images']}"),
        ("cells", f"{pooled['n_predicted']} found, {pooled['n_true']} true"),
        ("dice", f"{pooled['dice']:.4f}"),
        ("f1", f"{pooled['f1']:.4f}   precision {pooled['precision']:.4f}, recall {pooled['recall']:.4f}"),
        ("map", f"{pooled['map']:.4f}   IoU 0.50 to 0.95"),
        (
            "count",
            f"{pooled['count_mae']:.2f} cells off an image ({pooled['count_mape']:.1%}), "
            f"bias {pooled['count_bias']:+.2f}",
        ),
        ("merges", f"{pooled['merges']}, splits {pooled['splits']}"),
        ("apart", f"from {pooled['n_clumps']} true components that look like several cells:"),
        ("  f1", f"{pooled['f1_apart']:.4f}"),
        (
            "  count",
            f"{pooled['count_mae_apart']:.2f} cells off an image ({pooled['count_mape_apart']:.1%}), "
            f"bias {pooled['count_bias_apart']:+.2f}",
        ),
        (
            "inner",
            f"f1 {pooled['f1_inner']:.4f}, dice {pooled['dice_inner']:.4f}, count bias "
            f"{pooled['count_bias_inner']:+.2f}: without objects at the border ({pooled['n_border']} true cells)",
        ),
        *extra_rows(about),
        ("results", console.printable(output)),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
