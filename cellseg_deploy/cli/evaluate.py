"""``cellseg-evaluate``: how well do labels agree with masks drawn by people?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import _common

if TYPE_CHECKING:
    from cellseg_deploy.evaluation import ScoredImage

_ONLY_WITH_A_MODEL = (
    *("model", "task", "scale", "cell_diameter", "batch_size", "device", "backend", "precision"),
    *("ort_provider", "rebuild", "cuda_graph", "threads", "streams", "halo", "max_pixels", "bit_depth", "save_labels"),
)

_EPILOG = """\b
Examples:
  cellseg-evaluate --images val/images --masks val/masks -o scores/        the model that ships with the package
  cellseg-evaluate --model my.onnx --images val/images --masks val/masks -o scores/
  cellseg-evaluate --labels other-tool/ --masks val/masks -o scores/       any tool's label images

\b
Files pair by name without ending: a.png, a.tif and a.png.tif belong together. Masks may be binary (cells are then
the 4-connected components) or label images.

\b
Results (those of an earlier evaluation are replaced):
  OUT/metrics.json   all images together            OUT/metrics.csv   a row an image
  OUT/labels/        with --save-labels, the label images that were judged

\b
Exit codes: 0 done, 2 usage, 3 a file is damaged, mis-sized or has no partner, 4 no image found, 5 model refused,
6 output folder unusable, 7 output folder in use, 8 engine or device not available, 130 interrupted, 143/129 terminated
or terminal closed.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path), help="Photographs for the model to count.")
@click.option("--labels", metavar="DIR", type=click.Path(path_type=Path), help="Label images to judge, no model.")
@click.option("--masks", metavar="DIR", required=True, type=click.Path(path_type=Path), help="The truth.")
@click.option("-o", "--output", required=True, metavar="OUT", type=click.Path(path_type=Path), help="Output folder.")
@click.option(
    "--min-area",
    type=click.IntRange(min=0),
    metavar="PX",
    help="Smaller objects are specks, neither true nor predicted cells.  [default: 200]",
)
@click.option("--save-labels", is_flag=True, help="Write the model's label images too.")
@_common.model_options
@_common.reading_options
@_common.log_options
@click.pass_context
def command(
    context: click.Context,
    images: Path | None,
    labels: Path | None,
    masks: Path,
    output: Path,
    min_area: int | None,
    save_labels: bool,
    model: Path | None,
    task: str,
    scale: float | None,
    cell_diameter: float | None,
    batch_size: int,
    device: str | None,
    backend: str,
    ort_provider: str | None,
    rebuild: bool,
    cuda_graph: bool,
    precision: str | None,
    threads: int | None,
    streams: int | None,
    halo: int | None,
    max_pixels: int | None,
    bit_depth: int | None,
    quiet: bool,
    verbose: int,
) -> int:
    """Judge the cells of a model, or of any tool's label images, by masks drawn by people."""
    _common.set_up_logging(verbose)
    judged = _judged_folder(context, images, labels)

    from cellseg_deploy import evaluation
    from cellseg_deploy.images import pair_by_stem
    from cellseg_deploy.metrics import MIN_AREA_PX
    from cellseg_deploy.outputs.folder import check_apart

    min_area_px = MIN_AREA_PX if min_area is None else min_area
    check_apart([judged, masks], output)
    pairs = pair_by_stem(judged, masks)
    about: dict[str, Any] = {"data": {"labels" if labels else "images": str(judged), "masks": str(masks)}}
    with ExitStack() as stack:
        if labels:
            labels_of: Any = evaluation.read_predicted
        else:
            from cellseg_deploy.pipeline import Segmenter

            segmenter = stack.enter_context(
                Segmenter.from_file(
                    model,
                    backend=backend,
                    device=device,
                    task=task,
                    scale=scale,
                    cell_diameter_px=cell_diameter,
                    batch_size=batch_size,
                    halo=halo,
                    threads=threads,
                    rebuild=rebuild,
                    cuda_graph=cuda_graph,
                    ort_provider=ort_provider,
                    precision=precision,
                    streams=streams,
                )
            )
            labels_of = evaluation.Predictor(segmenter, bit_depth=bit_depth, max_pixels=max_pixels)
            about["model"] = evaluation.describe_model(segmenter)
        stack.enter_context(evaluation.report_folder(output))
        write_labels = evaluation.LabelWriter(output, [pair.stem for pair in pairs])
        scores = []
        for image in _with_progress(
            evaluation.score_pairs(pairs, labels_of, min_area_px=min_area_px), len(pairs), quiet
        ):
            if save_labels:
                write_labels(image)
            scores.append((image.name, image.score))
        pooled = evaluation.write_report(output, scores, min_area_px=min_area_px, about=about)
    if not quiet:
        _print_table(pooled, output)
    return _common.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(_common.run(command))


def _judged_folder(context: click.Context, images: Path | None, labels: Path | None) -> Path:
    """The folder to judge, after a check that the options are of one kind."""
    if labels is None:
        if images is None:
            raise click.UsageError("give --images DIR for a model to count, or --labels DIR with label images to judge")
        return images
    if images is not None:
        raise click.UsageError("--images and --labels exclude each other: a model's cells are judged, or given labels")
    without_model = "and --labels exclude each other: given labels are judged without a model"
    _common.refuse_options(context, _ONLY_WITH_A_MODEL, without_model)
    return labels


def _with_progress(images: Iterable[ScoredImage], total: int, quiet: bool) -> Iterator[ScoredImage]:
    """Hand ``images`` on and show how far it is, unless ``quiet``."""
    from cellseg_deploy.cli._progress import Progress

    if quiet:
        yield from images
        return
    with Progress(total) as progress:
        for image in images:
            yield image
            progress.advance()


def _print_table(pooled: dict[str, float], output: Path) -> None:
    rows = [
        ("images", f"{pooled['n_images']}"),
        ("cells", f"{pooled['n_predicted']} found, {pooled['n_true']} true"),
        ("dice", f"{pooled['dice']:.4f}"),
        ("f1", f"{pooled['f1']:.4f}   precision {pooled['precision']:.4f}, recall {pooled['recall']:.4f}"),
        ("map", f"{pooled['map']:.4f}   IoU 0.50 to 0.95"),
        ("count", f"{pooled['count_mae']:.2f} cells off an image, bias {pooled['count_bias']:+.2f}"),
        ("merges", f"{pooled['merges']}, splits {pooled['splits']}"),
        ("results", _common.printable(output)),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
