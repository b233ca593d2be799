"""``cellseg-convert``: annotations of one program as those of another."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.annotations.labels import LabelSource
    from cellseg_deploy.outputs.segmented import SegmentedImage

_EPILOG = """\b
Examples:
  cellseg-convert masks/ -o rois/ --to rois                          label images to ImageJ ROIs
  cellseg-convert rois/ --images photographs/ -o masks/ --to labels  back again
  cellseg-convert counts/labels -o qupath/ --to geojson

\b
IN: as LABELS in cellseg-measure. Results: OUT/NAME.tif (labels; classes in OUT/classes.csv), OUT/NAME.zip (rois),
OUT/NAME.geojson, or OUT/coco.json. All four keep the pixels exactly.

\b
Exit codes: 0 done, 2 usage, 3 a file cannot be used, 4 no image found, 6 output folder unusable, 8 package missing.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("given", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The photographs, for their sizes; not needed for label images and files of Cellpose.",
)
@click.option("-o", "--output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option(
    "--to", "kind", required=True, type=click.Choice(["labels", "rois", "geojson", "coco"]), help="Kind to write."
)
@console.mask_options
@console.log_options
def command(given: Path, images: Path | None, output: Path, kind: str, **asked: Any) -> int:
    """Convert cells drawn in one program to the files of another."""
    console.set_up_logging(asked["verbose"])
    from cellseg_deploy.annotations.labels import find_labels, find_labels_alone
    from cellseg_deploy.errors import OutputError
    from cellseg_deploy.files.apart import check_apart
    from cellseg_deploy.files.atomic import make_folder, write_bytes
    from cellseg_deploy.files.workspace import workspace
    from cellseg_deploy.outputs.encoders import merge_coco
    from cellseg_deploy.outputs.formats import chosen_formats

    (format,) = chosen_formats([kind])
    check_apart([given] if images is None else [given, images], output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not an empty folder; name a new one")
    source = find_labels_alone(given) if images is None else find_labels(images, given)
    make_folder(output)
    rows = [("image", "label", "class")]
    with workspace(output) as parts:
        written = []
        for stem, image in _segmented(source, asked["mask_foreground"]):
            place = (parts if format.run_file else output) / f"{stem}{format.suffix}"
            make_folder(place.parent)
            write_bytes(place, format.encode(image))
            written.append(place)
            if image.classes is not None:
                labels = enumerate((image.classes.names[at] for at in image.classes.index.tolist()), start=1)
                rows += [(image.name, str(label), name) for label, name in labels]
        if format.run_file:
            merge_coco(output, written, output / format.run_file)
    if kind == "labels" and len(rows) > 1:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_bytes(output / "classes.csv", text.getvalue().encode())
    if not asked["quiet"]:
        for line in source.said:
            console.say(console.printable(line))
        click.echo(f"results  {console.printable(output)}")
    return console.EXIT_OK


def _segmented(source: LabelSource, foreground: Any) -> Iterator[tuple[str, SegmentedImage]]:
    """Yield stem and cells of each image, on grey pixels: no format here shows the photograph."""
    from dataclasses import replace

    import numpy as np

    from cellseg_deploy.images.read import LoadedImage, read_image
    from cellseg_deploy.run.measured import class_names, segmentation

    classes = class_names(source)
    for stem, image in source.images.items():
        size = None if source.is_alone else read_image(image).pixels_hwc.shape[:2]
        painted = source.read(stem, size, foreground)
        grey = np.full((*painted.labels.shape, 3), 128, np.uint8)
        name = stem if source.is_alone else image.relative_to(source.root).as_posix()
        cells = segmentation(
            painted,
            LoadedImage(grey, ()),
            name=name,
            model=f"converted from {source.kind}",
            inside=None,
            classes=classes,
        )
        yield stem, replace(cells, count_rule="all").segmented


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
