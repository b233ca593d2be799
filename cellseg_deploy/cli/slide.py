"""``cellseg-slide``: count one image that may be larger than memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import cluster_options as clusters
from cellseg_deploy.cli import console

if TYPE_CHECKING:
    from cellseg_deploy.slides.counting import Progress
    from cellseg_deploy.slides.run import SlideResult

_EPILOG = """\b
Examples:
  cellseg-slide slide.ome.tif -o counts/
  cellseg-slide slide.svs -o counts/ --level 1 --memory 4GB
  cellseg-slide slide.svs -o counts/ --scheduler local --workers 2     on several processes
  cellseg-slide slide.ome.zarr -o corner/ --region 0,0,20000,10000

\b
IMAGE: TIFF, BigTIFF and OME-TIFF in tiles or strips; with cellseg-deploy[slides] also OME-Zarr (a folder) and slides
that OpenSlide reads (.svs .ndpi .mrxs .scn .bif .vms); with cellseg-deploy[czi] also Zeiss .czi. PNG and JPEG are read
whole, up to --max-pixels.

\b
Results: OUT/labels.tif (tiled BigTIFF)  OUT/cells.csv  OUT/images.csv  OUT/overview.png  OUT/slide.json
--save: labels; zarr: OUT/labels.ome.zarr (NGFF 0.4, pyramid); geojson: OUT/cells.geojson; parquet: OUT/cells.parquet
The labels are those of cellseg-infer --field full, whatever the memory. A stopped run is resumed by the same command.

\b
Exit codes: 0 done, 2 usage or too little memory, 3 image unusable, 5 model unusable, 6 output folder unusable or of
another run, 7 output folder in use, 8 engine or package missing, 130 interrupted, 143/129 terminated or terminal
closed.
"""


def _region(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, int, int, int] | None:
    """Parse left,top,width,height."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", value.replace(" ", ""))
    if found is None:
        raise click.BadParameter(f"{value!r} is not a region; expected left,top,width,height in px: 0,0,8000,6000")
    x, y, w, h = map(int, found.groups())
    return x, y, w, h


def _without_field(function: console.F) -> console.F:
    function = console.count_options(function)
    parameters: list[click.Option] = function.__click_params__  # type: ignore[attr-defined]
    parameters[:] = [parameter for parameter in parameters if parameter.name != "field"]
    return function


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("image", metavar="IMAGE", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Output folder.")
@console.memory_option
@click.option(
    "--region", callback=_region, metavar="X,Y,W,H", help="Count only this part, in px of the level.  [default: all]"
)
@click.option("--level", type=int, default=0, show_default=True, help="Level of the pyramid; 0 is the full resolution.")
@console.model_options
@console.reading_options
@click.option("--pixel-size", type=float, metavar="UM", help="Side of a pixel of level 0 in µm.  [default: the file's]")
@_without_field
@click.option("--classes", metavar="A,B", help="Classes that count as cells.  [default: all but platelet]")
@click.option(
    "--save",
    default="labels",
    show_default=True,
    help="Files to write, with commas between: labels, zarr, geojson, parquet; or all, or none. Tables and overview "
    "are always written.",
)
@click.option(
    "--skip-blank",
    is_flag=True,
    help="Do not run the network on tiles without contrast, such as bare glass. Faster on sparse slides; pale cells "
    "may be lost there.  [default: skip tiles of one colour only, which changes nothing]",
)
@clusters.cluster_options
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in OUT, or an unfinished run.")
@click.option("--json", "as_json", is_flag=True, help="Print the row of images.csv for machines instead of the table.")
@console.log_options
@click.pass_context
def command(context: click.Context, /, image: Path, output: Path, memory: int | None, **asked: Any) -> int:
    """Count the cells of one image that may be larger than memory: a scanned slide, a stitched mosaic."""
    console.set_up_logging(asked["verbose"])
    clusters.check(context)
    from cellseg_deploy.files.apart import check_apart
    from cellseg_deploy.segmenter import Segmenter
    from cellseg_deploy.slides.files import parse_kinds
    from cellseg_deploy.slides.memory import half_of_free_memory
    from cellseg_deploy.slides.open import open_image
    from cellseg_deploy.slides.region import region_of
    from cellseg_deploy.slides.run import run_slide

    save = parse_kinds(asked["save"])
    threads = console.plan_threads(
        asked["threads"], device=asked["device"], model=asked["model"], backend=asked["backend"]
    )
    check_apart([image], output)
    reading = console.read_options(asked)
    reader = open_image(image, reading)
    try:
        part = region_of(reader, asked["level"], asked["region"])
        memory = half_of_free_memory() if memory is None else memory
        if not asked["quiet"]:
            size = f"{part.width} x {part.height} px of level {part.level}"
            console.say(f"{console.printable(image.name)}: {size}, in blocks that take up to {memory / 1e9:.1f} GB")
        with (
            Segmenter.load(
                asked["model"],
                engine=console.engine_options(asked, threads),
                classes=console.names_in(asked["classes"]),
                **console.segmenter_options(asked),
            ) as segmenter,
            clusters.opened(asked) as cluster,
        ):
            result = run_slide(
                segmenter,
                part,
                output,
                save=save,
                skip_blank=asked["skip_blank"],
                memory=memory,
                count_rule=asked["count_rule"],
                overwrite=asked["overwrite"],
                progress=_progress(quiet=asked["quiet"]),
                elsewhere=None if cluster is None else cluster.slide(image, reading),
            )
    finally:
        reader.close()
    if asked["as_json"]:
        click.echo(json.dumps(result.row))
    elif not asked["quiet"]:
        _print(result)
    return console.EXIT_OK


def _progress(*, quiet: bool) -> Progress:
    """A bar or lines per stage, in tiles, blocks and strips."""
    from cellseg_deploy.slides.counting import Progress

    if quiet:
        return Progress()
    from cellseg_deploy.cli import progress as bars

    shown: list[bars.Progress] = []
    clock = bars.TimeLeft()

    def started(stage: str, steps: int) -> None:
        while shown:
            shown.pop().__exit__(None, None, None)
        shown.append(bars.Progress(steps, stage).__enter__())
        clock.start(steps)

    def advanced(steps: int) -> None:
        said = clock.advance(steps)
        for _ in range(steps):
            shown[0].advance(said)
        if shown[0].seen == shown[0].total:
            shown.pop().__exit__(None, None, None)

    return Progress(started, advanced)


def _print(result: SlideResult) -> None:
    from cellseg_deploy.slides.run import warnings_of

    for note in warnings_of(result):
        console.say(f"warning: {console.printable(console.in_options(note))}")
    row = result.row
    density = [("density", f"{row['counted_per_mm2']:.1f} per mm2")] if "counted_per_mm2" in row else []
    for name, value in [
        ("cells", f"{result.cells}, {result.counted} counted"),
        ("covered", f"{row['confluence']:.1%}"),
        ("skipped", f"{row['blank_share']:.1%} of the tiles are blank"),
        *density,
        ("scale", f"{row['scale']:.4g}"),
        ("results", console.printable(result.out)),
    ]:
        click.echo(f"{name:<8} {value}")


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
