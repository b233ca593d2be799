"""``cellseg-measure``: tables, overlays and formats of a run, from cells that were drawn or edited."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from cellseg_deploy.cli import console

_EPILOG = """\b
Examples:
  cellseg-measure counts/corrections -o corrected/             corrected label images of a run; it knows its photographs
  cellseg-measure rois/ --images photographs/ -o measured/     ImageJ ROIs: NAME.zip for NAME.jpg
  cellseg-measure cells.json --images photographs/ -o measured/ --save labels,overlays,rois
  cellseg-measure rois/ --images photographs/ -o measured/ --group-by 'patient[0-9]+'

\b
LABELS: label images (NAME.png, NAME_masks.tif, NAME.png.tif, colour-coded too), NAME_seg.npy of Cellpose, ImageJ ROIs
(NAME.zip, NAME.roi), QuPath GeoJSON, COCO json, YOLO polygons: a file, or a folder with one kind. No network is run.
Label images hold no classes: they are taken from classes.csv beside them, or from the run or the cells.csv in whose
folder they lie. Otherwise every object is counted, platelets too, and the command says so.

\b
Results, as of cellseg-infer:
  OUT/labels/NAME.tif   OUT/overlays/NAME.jpg   OUT/cells.csv   OUT/images.csv   OUT/summary.csv   OUT/report.html
  OUT/run.json   OUT/journal.jsonl
An earlier measurement in OUT is replaced, unless somebody edited its files.

\b
Exit codes: 0 all done, 2 usage, 3 some images failed (see images.csv) or LABELS cannot be used, 4 no image found,
6 output folder unusable or of another run, 7 output folder in use, 8 package missing, 130 interrupted, 143/129
terminated or terminal closed.
"""


def _without_border_cells(function: console.F) -> console.F:
    function = console.count_options(function)
    parameters: list[click.Option] = function.__click_params__  # type: ignore[attr-defined]
    parameters[:] = [parameter for parameter in parameters if parameter.name != "border_cells"]
    return function


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("labels", metavar="LABELS", type=click.Path(path_type=Path))
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The photographs.  [default: those of the run that LABELS lies in]",
)
@click.option("-o", "--output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Output folder.")
@console.reading_options
@console.mask_options
@_without_border_cells
@click.option(
    "--classes", metavar="A,B", help="Classes that count as cells, if LABELS has classes.  [default: all but platelet]"
)
@click.option(
    "--save",
    default="labels,overlays",
    show_default=True,
    help="Files to write, with commas between: labels, overlays, numbered, rois, geojson, coco, confluence, parquet; "
    "or none. Tables are always written.",
)
@console.report_options
@click.option(
    "--pixel-size",
    type=float,
    metavar="UM",
    help="Side of a pixel in micrometres, for columns in micrometres.  [default: what a TIFF says]",
)
@click.option("--overwrite", is_flag=True, help="Replace any earlier run in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for machines to stdout instead of the table.")
@console.log_options
def command(labels: Path, images: Path | None, output: Path, **asked: Any) -> int:
    """Measure cells that were drawn or edited, as if they had been found: the same tables, overlays and formats."""
    console.set_up_logging(asked["verbose"])
    from cellseg_deploy.annotations.labels import find_labels
    from cellseg_deploy.outputs.formats import parse_names
    from cellseg_deploy.run.measured import MeasureOptions, measure_folder
    from cellseg_deploy.view.known import classes_around

    options = MeasureOptions(
        save=parse_names(asked["save"]),
        reading=console.read_options(asked),
        count_rule=asked["count_rule"],
        field_of_view=asked["field"],
        classes=console.names_in(asked["classes"]),
        mask_foreground=asked["mask_foreground"],
        overwrite=asked["overwrite"],
        group_by=asked["group_by"],
        report=asked["report"],
    )
    images = _images_of_run(labels) if images is None else images
    source = find_labels(images, labels)
    known = classes_around(labels) if source.has_pixels else None
    origins = list[str]()
    measured = partial(measure_folder, source, output, options, known=known, on_classes=origins.append)
    if asked["quiet"]:
        summary = measured()
    else:
        from cellseg_deploy.cli.progress import Progress

        with Progress(len(source.images)) as progress:
            summary = measured(lambda _: progress.advance())
    about = {
        "found": summary.found,
        "done": summary.done,
        "failed": summary.failed,
        "without_labels": len(source.unnamed),
        "cells": summary.cells,
        "counted": summary.counted,
        **({"by_class": summary.by_class} if summary.classes else {}),
        "classes_from": console.printable(origins[0]),
        "read": source.said,
        "warnings": summary.warnings,
        "output": console.printable(output),
    }
    if asked["as_json"]:
        click.echo(json.dumps(about))
    elif not asked["quiet"]:
        _print(about)
    return console.EXIT_SOME_FAILED if summary.failed else console.EXIT_OK


def _images_of_run(labels: Path) -> Path:
    """Return the photographs of the run whose output folder ``labels`` lies in. Raises click's usage error."""
    from cellseg_deploy.files.json_record import content_of
    from cellseg_deploy.run.known_classes import folders_around
    from cellseg_deploy.run.output_folder import RUN_JSON

    for folder in folders_around(labels):
        roots = content_of(folder / RUN_JSON).get("identity", {}).get("inputs", [])
        if len(roots) == 1 and Path(roots[0]).is_dir():
            return Path(roots[0])
        if roots:
            raise click.UsageError(
                f"the run in {folder} has several folders of images, or they moved; give --images DIR"
            )
    raise click.UsageError(f"give --images DIR, the photographs: {labels} lies in no output folder of a run")


def _print(about: dict[str, Any]) -> None:
    for line in about["read"]:
        console.say(console.printable(line))
    console.say(f"classes of the cells: {about['classes_from']}")
    for kind, found in about["warnings"].items():
        console.say(f"warning: {console.warning_words(kind, found)}")
    counted = f", {about['counted']} counted" if about["counted"] != about["cells"] else ""
    without = f", {about['without_labels']} more without labels" if about["without_labels"] else ""
    rows = [
        ("images", f"{about['done']} of {about['found']}{without}"),
        ("cells", f"{about['cells']}{counted}"),
        *(
            (("classes", ", ".join(f"{name} {n}" for name, n in about["by_class"].items())),)
            if "by_class" in about
            else ()
        ),
        ("failed", f"{about['failed']} (named in images.csv)" if about["failed"] else "0"),
        ("results", about["output"]),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
