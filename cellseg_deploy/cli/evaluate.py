"""``cellseg-evaluate``: how well do labels agree with masks drawn by people?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cellseg_deploy.cli import _common

if TYPE_CHECKING:
    from cellseg_deploy.counting import CountRule
    from cellseg_deploy.pipeline import Segmenter

T = TypeVar("T")

_ONLY_WITH_A_MODEL = (
    *("model", "task", "scale", "cell_diameter", "batch_size", "device", "backend", "precision"),
    *("ort_provider", "rebuild", "cuda_graph", "threads", "streams", "halo", "max_pixels", "bit_depth", "save_labels"),
    *("sweep", "calibrate", "describe"),
)

_EPILOG = """\b
Examples:
  cellseg-evaluate --images val/images --masks val/masks -o scores/        the model that ships with the package
  cellseg-evaluate --model my.onnx --images val/images --masks val/masks -o scores/
  cellseg-evaluate --labels other-tool/ --masks val/masks -o scores/       any tool's label images
  cellseg-evaluate --images val/images --masks val/masks -o scores/ --sweep --anatomy
  cellseg-evaluate --calibrate --model my.onnx --images val/images --masks val/masks -o calibrated.onnx
  cellseg-evaluate --describe --images new/ -o about-new/

\b
Files pair by name without ending: a.png, a.tif and a.png.tif belong together. Masks may be binary (cells are then
the 4-connected components) or label images.

\b
Results (those of an earlier evaluation are replaced):
  OUT/metrics.json   all images together            OUT/metrics.csv   a row an image
  OUT/labels/        with --save-labels, the label images that were judged
  OUT/sweep.png      with --sweep, the figure; its numbers in sweep.csv; reliability.png, reliability.json: are the
                     probabilities true
  OUT/data.png       with --describe, and nothing else: the figure; its numbers in data.json and data.csv
  OUT/anatomy/       with --anatomy, contact sheets by kind of error; each error with its place in anatomy.csv

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
    ort_provider: str | None
    rebuild: bool
    cuda_graph: bool
    precision: str | None
    threads: int | None
    streams: int | None
    halo: int | None
    max_pixels: int | None
    bit_depth: int | None
    count_rule: CountRule
    quiet: bool
    verbose: int

    def open_segmenter(self) -> Segmenter:
        """The model, or the one that ships with the package. Raises as ``Segmenter.from_file`` does."""
        from cellseg_deploy.pipeline import Segmenter

        return Segmenter.from_file(
            self.model,
            backend=self.backend,
            device=self.device,
            task=self.task,
            scale=self.scale,
            cell_diameter_px=self.cell_diameter,
            batch_size=self.batch_size,
            halo=self.halo,
            threads=self.threads,
            ort_provider=self.ort_provider,
            rebuild=self.rebuild,
            cuda_graph=self.cuda_graph,
            precision=self.precision,
            streams=self.streams,
        )

    @property
    def given_masks(self) -> Path:
        """The masks, which every mode that judges needs. Raises ``UsageError`` without."""
        if self.masks is None:
            raise click.UsageError("give --masks DIR, the truth to judge by")
        return self.masks

    @property
    def min_area_px(self) -> int:
        """Limit of specks in px."""
        from cellseg_deploy.metrics import MIN_AREA_PX

        return MIN_AREA_PX if self.min_area is None else self.min_area


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path), help="Photographs for the model to count.")
@click.option("--labels", metavar="DIR", type=click.Path(path_type=Path), help="Label images to judge, no model.")
@click.option("--masks", metavar="DIR", type=click.Path(path_type=Path), help="The truth.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Output folder; with --calibrate the model file to write.",
)
@click.option(
    "--min-area",
    type=click.IntRange(min=0),
    metavar="PX",
    help="Smaller objects are specks, neither true nor predicted cells.  [default: 200]",
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
    help="What the images are like (cells of --masks, else those found) and whether the model has seen their like.",
)
@_common.model_options
@_common.reading_options
@_common.count_options
@_common.log_options
@click.pass_context
def command(context: click.Context, /, **given: Any) -> int:
    """Judge the cells of a model, or of any tool's label images, by masks drawn by people."""
    options = Options(**given)
    _common.set_up_logging(options.verbose)
    judged = _judged_folder(context, options)
    _check_modes(options)
    if options.sweep or options.calibrate or options.describe:
        _common.require_packages("plots", "matplotlib")
    if options.calibrate:
        from cellseg_deploy.cli import _calibrate

        return _calibrate.run(options, judged)
    if options.describe:
        from cellseg_deploy.cli import _describe

        return _describe.run(options, judged)
    return _evaluate(options, judged)


def _evaluate(options: Options, judged: Path) -> int:
    """Score every pair, with the extras that were asked for, and write the report."""
    from cellseg_deploy import evaluation
    from cellseg_deploy.cli._extras import ANATOMY_FILES, SWEEP_FILES, Anatomy, Sweep, remove_stale
    from cellseg_deploy.images import pair_by_stem
    from cellseg_deploy.outputs.folder import check_apart
    from cellseg_deploy.outputs.workspace import workspace

    output, masks = options.output, options.given_masks
    check_apart([judged, masks], output)
    pairs = pair_by_stem(judged, masks)
    kind = "images" if options.labels is None else "labels"
    about: dict[str, Any] = {"data": {kind: str(judged), "masks": str(masks)}, "count_rule": options.count_rule}
    with ExitStack() as stack:
        labels_of: Any = evaluation.read_predicted
        sweep: Sweep | None = None
        if options.labels is None:
            segmenter = stack.enter_context(options.open_segmenter())
            sweep = stack.enter_context(Sweep.opened(segmenter, options.min_area_px)) if options.sweep else None
            labels_of = evaluation.Predictor(
                segmenter,
                bit_depth=options.bit_depth,
                max_pixels=options.max_pixels,
                on_probabilities=None if sweep is None else sweep.take_probabilities,
            )
            about["model"] = evaluation.describe_model(segmenter)
        names = [evaluation.METRICS_JSON, evaluation.METRICS_CSV]
        names += [*SWEEP_FILES, *ANATOMY_FILES]
        stack.enter_context(evaluation.report_folder(output, names))
        anatomy: Anatomy | None = None
        if options.anatomy:
            place = stack.enter_context(workspace(output))
            anatomy = Anatomy(options, place, photographs=options.labels is None)
        write_labels = evaluation.LabelWriter(output, [pair.stem for pair in pairs])
        scores = []
        scored = evaluation.score_pairs(
            pairs, labels_of, min_area_px=options.min_area_px, count_rule=options.count_rule
        )
        for pair, image in zip(pairs, with_progress(scored, len(pairs), options.quiet), strict=True):
            if options.save_labels:
                write_labels(image)
            if anatomy is not None:
                anatomy.add(pair, image)
            if sweep is not None:
                sweep.take_truth(image)
            scores.append((image.name, image.score))
        if anatomy is not None:
            about |= anatomy.finish()
        if sweep is not None:
            about |= sweep.finish(output, quiet=options.quiet)
        remove_stale(output, sweep=options.sweep, anatomy=options.anatomy)
        pooled = evaluation.write_report(output, scores, min_area_px=options.min_area_px, about=about)
    if not options.quiet:
        _print_table(pooled, about, output)
    return _common.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(_common.run(command))


def _judged_folder(context: click.Context, options: Options) -> Path:
    """The folder to judge, after a check that the options are of one kind."""
    if options.labels is None:
        if options.images is None:
            raise click.UsageError("give --images DIR for a model to count, or --labels DIR with label images to judge")
        return options.images
    if options.images is not None:
        raise click.UsageError("--images and --labels exclude each other: a model's cells are judged, or given labels")
    without_model = "and --labels exclude each other: given labels are judged without a model"
    _common.refuse_options(context, _ONLY_WITH_A_MODEL, without_model)
    return options.labels


def _check_modes(options: Options) -> None:
    """Raise a usage error where two modes, or a mode and an option, exclude each other."""
    modes = [name for name in ("calibrate", "describe") if getattr(options, name)]
    if not options.describe:
        _ = options.given_masks
    for mode in ("sweep", *modes):
        if getattr(options, mode) and options.count_rule != "all":
            raise click.UsageError(f"--count-rule and --{mode} exclude each other: it tries settings on all cells")
    for mode in modes:
        for name in ("calibrate", "describe", "sweep", "anatomy", "save_labels"):
            if name != mode and getattr(options, name):
                raise click.UsageError(
                    f"--{name.replace('_', '-')} and --{mode} exclude each other; run the command twice"
                )


def with_progress(images: Iterable[T], total: int, quiet: bool) -> Iterator[T]:
    """Hand ``images`` on and show how far it is, unless ``quiet``."""
    from cellseg_deploy.cli._progress import Progress

    if quiet:
        yield from images
        return
    with Progress(total) as progress:
        for image in images:
            yield image
            progress.advance()


def _print_table(pooled: dict[str, float], about: dict[str, Any], output: Path) -> None:
    from cellseg_deploy.cli._extras import extra_rows

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
        *extra_rows(about),
        ("results", _common.printable(output)),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
