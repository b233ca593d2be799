"""``cellseg-evaluate``: compare labels with cells that people drew, marked or counted. The commands' options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from cellseg_deploy.cli import console, evaluate_options
from cellseg_deploy.cli.evaluate_options import Shared

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_PATH = click.Path(path_type=Path)
_EXIT_CODES = """\b
Exit codes: 0 done, 2 usage, 3 a file is damaged, mis-sized or has no partner, 4 no image found, 5 model refused,
6 output folder unusable, 7 output folder in use, 8 engine or device not available, 130 interrupted, 143/129 terminated
or terminal closed.
"""
_PAIRS = """\b
Files pair by name without ending: a.png, a.tif, a.png.tif and a_masks.tif belong together. Masks may be binary (cells
are then the 4-connected components), label images, colour-coded, or files of Cellpose, ImageJ, QuPath, COCO or YOLO:
see docs/annotations.md.
"""
_EPILOG = f"""\b
Examples:
  cellseg-evaluate --images val/images --masks val/masks -o scores/        the model that ships with the package
  cellseg-evaluate --labels other-tool/ --masks val/masks -o scores/       any tool's label images
  cellseg-evaluate calibrate --model my.onnx --images val/images --masks val/masks -o calibrated.onnx
  cellseg-evaluate describe --images new/ -o about-new/

\b
Without a command, score runs: see cellseg-evaluate score --help. The former flags --calibrate and --describe still run
these commands.

{_EXIT_CODES}"""
_SCORE_EPILOG = f"""\b
Examples:
  cellseg-evaluate score --images val/images --masks val/masks -o scores/        the model that ships with the package
  cellseg-evaluate score --model my.onnx --images val/images --masks val/masks -o scores/
  cellseg-evaluate score --labels other-tool/ --masks val/masks -o scores/       any tool's label images
  cellseg-evaluate score --images val/images --masks val/masks -o scores/ --sweep --anatomy
  cellseg-evaluate score --images val/images --counts by-hand.csv -o agreement/  counts by hand: image,count

{_PAIRS}
\b
Results (those of an earlier evaluation are replaced once all are written):
  OUT/metrics.json   all images together            OUT/metrics.csv   one row per image
  OUT/labels/        with --save-labels, the label images that were scored
  OUT/sweep.png      with --sweep, the figure; its numbers in sweep.csv; reliability.png, reliability.json: are the
                     probabilities calibrated
  OUT/anatomy/       with --anatomy, contact sheets by kind of error; each error with its place in anatomy.csv
With --counts instead:
  OUT/agreement.json bias and limits of agreement   OUT/agreement.csv  one row per image
  OUT/agreement.png  the differences against the counts (Bland and Altman's plot)

{_EXIT_CODES}"""
_CALIBRATE_EPILOG = f"""\b
Example:
  cellseg-evaluate calibrate --model my.onnx --images val/images --masks val/masks -o calibrated.onnx

{_PAIRS}
\b
Results:
  OUT.onnx               the model with the chosen operating points
  OUT.calibration.json   what was chosen, and how good it is on images not used to choose it
  OUT.calibration.png    how well probabilities are calibrated

{_EXIT_CODES}"""
_DESCRIBE_EPILOG = f"""\b
Examples:
  cellseg-evaluate describe --images new/ -o about-new/
  cellseg-evaluate describe --model my.onnx --images train/images --masks train/masks -o described.onnx

{_PAIRS}
\b
Results:
  OUT/data.png       the figure; its numbers in data.json and data.csv
  OUT.onnx           or OUT.safetensors: the model, with a description of these images as its training images

{_EXIT_CODES}"""

_min_area_option = click.option(
    "--min-area",
    "--min-object",
    "min_area",
    type=click.IntRange(min=0),
    metavar="PX",
    help="Ignore smaller objects as specks, in truth and result.  [default: the share of the masks' median "
    "object that the model was trained with, else 2.45 %; 0 with --boxes, --points]",
)


def _shared_options(function: console.F) -> console.F:
    options = (console.model_options, console.reading_options, console.mask_options, console.count_options)
    return console.with_options(function, (*options, console.log_options))


class _Commands(click.Group):
    """Group whose default command is ``score``, and whose former flags still work as commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_command(args))


def with_command(arguments: list[str]) -> list[str]:
    """Put the command first in ``arguments``: as named, from a flag ``--calibrate`` or ``--describe``, or ``score``."""
    if arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help", "--version")):
        return arguments
    flags = [flag for flag in ("--describe", "--calibrate") if flag in arguments]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)} exclude each other; run the command twice")
    command = flags[0].removeprefix("--") if flags else "score"
    return [command, *(argument for argument in arguments if argument not in flags)]


@click.group(cls=_Commands, epilog=_EPILOG, context_settings=_SETTINGS)
@click.version_option(package_name="cellseg-deploy")
def command() -> None:
    """Score the cells of a model, or any tool's label images, against masks drawn by people."""


@command.command("score", epilog=_SCORE_EPILOG, context_settings=_SETTINGS)
@click.option("--images", metavar="DIR", type=_PATH, help="Photographs for the model to count.")
@click.option("--labels", metavar="DIR", type=_PATH, help="Label images to score, without a model.")
@click.option("--masks", metavar="PATH", type=_PATH, help="The truth: label images, or files of other programs.")
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
    "--unmarked",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --points: masks or label images of all objects, marked or not. Cells found on objects without a point "
    "are not scored.",
)
@click.option(
    "--classes",
    metavar="A,B",
    help="Classes that count. With boxes or points, other classes are ignored; A=B: class A is called B in the "
    "file, and scored separately. With --masks or --counts: classes of the model.  [default: all but platelet]",
)
@click.option(
    "--counts",
    metavar="FILE.csv",
    type=_PATH,
    help="Counts by hand instead of --masks: columns image and count. Every object counts, except specks "
    "if --min-area is given.",
)
@click.option("-o", "--output", metavar="OUT", type=_PATH, help="Output folder.  [required]")
@_min_area_option
@click.option("--save-labels", is_flag=True, help="Write the model's label images too.")
@click.option("--sweep", is_flag=True, help="Metrics against the threshold for every method: figure and table.")
@click.option("--anatomy", is_flag=True, help="Every error with its place and kind, and contact sheets of them.")
@_shared_options
@click.pass_context
def score_command(context: click.Context, /, **given: Any) -> int:
    """Count cells, or take label images, and compare them with the truth."""
    console.set_up_logging(given["verbose"])
    judged, kind = evaluate_options.check_score(context, given)
    shared = Shared.of(given)
    if given["counts"] or given["sweep"]:
        console.require_packages("plots", "matplotlib")
    if given["counts"] is not None:
        from cellseg_deploy.cli import evaluate_counts

        return evaluate_counts.run(shared, judged, kind, given["counts"], given["count_rule"])
    if given["masks"] is None:
        from cellseg_deploy.cli import evaluate_marks

        mark: Literal["boxes", "points"] = "points" if given["boxes"] is None else "boxes"
        return evaluate_marks.run(shared, judged, kind, given[mark], mark, unmarked_folder=given["unmarked"])

    from cellseg_deploy.cli import score

    return score.run(
        shared,
        judged,
        kind,
        given["masks"],
        given["count_rule"],
        score.Extras(labels=given["save_labels"], sweep=given["sweep"], anatomy=given["anatomy"]),
    )


@command.command("calibrate", epilog=_CALIBRATE_EPILOG, context_settings=_SETTINGS)
@click.option("--images", metavar="DIR", required=True, type=_PATH, help="Photographs to choose on.")
@click.option("--masks", metavar="DIR", required=True, type=_PATH, help="The truth.")
@click.option("-o", "--output", metavar="OUT.onnx", required=True, type=_PATH, help="Model file to write.")
@_min_area_option
@_shared_options
def calibrate_command(images: Path, masks: Path, **given: Any) -> int:
    """Choose the operating points on images with masks, and write them into a copy of the model."""
    console.set_up_logging(given["verbose"])
    console.require_packages("plots", "matplotlib")
    from cellseg_deploy.cli import calibrate

    return calibrate.run(Shared.of(given), images, masks)


@command.command("describe", epilog=_DESCRIBE_EPILOG, context_settings=_SETTINGS)
@click.option("--images", metavar="DIR", required=True, type=_PATH, help="Photographs to describe.")
@click.option("--masks", metavar="DIR", type=_PATH, help="Their cells.  [default: those that the model finds]")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    required=True,
    type=_PATH,
    help="Output folder, or a model file to write, with these images described as its training images.",
)
@_min_area_option
@_shared_options
@click.pass_context
def describe_command(context: click.Context, /, images: Path, masks: Path | None, **given: Any) -> int:
    """Describe images, and show whether the model was trained on similar ones."""
    console.set_up_logging(given["verbose"])
    if masks is not None:
        evaluate_options.refuse_engine_options(
            context, "and --masks exclude each other: the cells are those of the masks, and no model is run"
        )
    shared = Shared.of(given)
    if not evaluate_options.is_model_file(shared.output):
        console.require_packages("plots", "matplotlib")
    from cellseg_deploy.cli import describe

    return describe.run(shared, images, masks)


def _leave_out(command: click.Command, *names: str) -> None:
    """Remove options that shared groups add but that have no meaning for ``command``."""
    command.params = [parameter for parameter in command.params if parameter.name not in names]


_leave_out(calibrate_command, "task", "count_rule", "border_cells")
_leave_out(describe_command, "count_rule")


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
