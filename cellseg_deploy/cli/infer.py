"""``cellseg-infer``: count and outline the cells of a folder of images."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cellseg_deploy.cli import _common

if TYPE_CHECKING:
    from cellseg_deploy.counting import CountRule
    from cellseg_deploy.folder_run import RunSummary

_log = logging.getLogger(__name__)

_EPILOG = """\b
Examples:
  cellseg-infer smears/ -o counts/
  cellseg-infer a.png b.tif -o counts/ --task confluence
  cellseg-infer smears/ -o counts/ --cell-diameter 60      cells are about 60 px wide
  cellseg-infer smears/ -o counts/ --overwrite --json > summary.json
  cellseg-infer --explain --model my.onnx                  which engine would run it, and why

\b
Results:
  OUT/labels/NAME.tif     label image: 0 background, 1..n the cells
  OUT/overlays/NAME.jpg   the image with outlines and count
  OUT/cells.csv           a row a cell          OUT/images.csv   a row an image
  OUT/run.json            what ran, with what, how long by stage, and how busy the network was
Different images are read, run and written at the same time; no result depends on it, on --threads or --batch-size.

\b
Exit codes: 0 all done, 2 usage, 3 some images failed (see images.csv), 4 no image found, 5 model refused,
6 output folder unusable, 7 output folder in use, 8 engine or device not available, 130 interrupted, 143/129
terminated or terminal closed (what is done is kept).
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("paths", metavar="PATH...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="Output folder.")
@_common.model_options
@_common.reading_options
@_common.count_options
@click.option(
    "--save",
    default="labels,overlays",
    show_default=True,
    help="Files to write, with commas between: labels, overlays, numbered, rois, geojson, coco, probabilities, "
    "confluence, parquet; or all, or none. Tables are always written.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run in OUT.")
@click.option("--follow-links", is_flag=True, help="Follow links that lead out of the given folders.")
@click.option("--explain", is_flag=True, help="Show which engine would be taken and why, and end; needs no PATH.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary for machines to stdout instead of the table.")
@_common.log_options
@click.pass_context
def command(
    context: click.Context,
    paths: tuple[Path, ...],
    output: Path | None,
    model: Path | None,
    task: str,
    scale: float | None,
    cell_diameter: float | Literal["auto"] | None,
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
    count_rule: CountRule,
    save: str,
    overwrite: bool,
    follow_links: bool,
    explain: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> int:
    """Count and outline the cells of images (PNG, JPEG, TIFF): files, or folders with all that is in them."""
    _common.set_up_logging(verbose)
    if explain:
        unused = ("ort_provider", "rebuild", "cuda_graph", "streams")
        _common.refuse_options(context, unused, "and --explain exclude each other: it shows what is chosen without")
        click.echo(_explanation(model, backend, device or "cpu", precision))
        return _common.EXIT_OK
    if not paths or output is None:
        missing = next(p for p in context.command.params if p.name == ("output" if paths else "paths"))
        raise click.MissingParameter(ctx=context, param=missing)

    from cellseg_deploy import folder_run
    from cellseg_deploy.errors import NothingToDoError
    from cellseg_deploy.images import MAX_PIXELS, SUFFIXES, find_images
    from cellseg_deploy.models import default_model_path
    from cellseg_deploy.outputs.folder import check_apart
    from cellseg_deploy.outputs.formats import parse_names
    from cellseg_deploy.outputs.resume import check_usable, look_at
    from cellseg_deploy.pipeline import Segmenter
    from cellseg_deploy.run_identity import engine_to_go_on_with

    options = folder_run.RunOptions(
        save=parse_names(save),
        overwrite=overwrite,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
        bit_depth=bit_depth,
        count_rule=count_rule,
    )
    plan = _common.plan_threads(threads, device=device, model=model, backend=backend)
    check_apart(paths, output)
    images = find_images(paths, follow_links=follow_links)
    if not images:
        where = ", ".join(_common.printable(path) for path in paths)
        raise NothingToDoError(f"{where}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    state = look_at(output)
    if state.kind == "foreign" or not overwrite:
        check_usable(state, output)
    engine_asked: dict[str, Any] = {"path": model, "backend": backend, "device": device, "precision": precision}
    is_free = backend == "auto" and (device, precision, ort_provider, rebuild) == (None, None, None, False)
    if is_free and state.journal is not None and not overwrite:
        engine_asked = engine_to_go_on_with(state.journal.identity, model or default_model_path()) or engine_asked
    with (
        Segmenter.from_file(
            **engine_asked,
            task=task,
            scale=scale,
            cell_diameter_px=cell_diameter,
            batch_size=batch_size,
            halo=halo,
            threads=plan.engine,
            rebuild=rebuild,
            cuda_graph=cuda_graph,
            ort_provider=ort_provider,
            streams=streams,
        ) as segmenter,
        _progress(len(images), quiet) as progress,
    ):
        engine = segmenter.backend
        _log.info("engine: %s %s on %s, %s", engine.name, engine.precision, engine.device, engine.choice)
        summary = folder_run.run_folder(segmenter, images, output, options=options, threads=plan, on_result=progress)
    if as_json:
        click.echo(json.dumps(_for_machines(summary)))
    elif not quiet:
        _print_table(summary)
    return _common.EXIT_SOME_FAILED if summary.failed else _common.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(_common.run(command))


def _explanation(model: Path | None, backend: str, device: str, precision: str | None) -> str:
    """The candidates of ``--backend auto`` and the choice among them."""
    from cellseg_deploy.backends import auto
    from cellseg_deploy.backends.selection import table
    from cellseg_deploy.models import default_model_path

    if backend != "auto":
        raise click.UsageError(f"--explain shows what --backend auto chooses; {backend} was named")
    selection, here = auto.select(model or default_model_path(), device=device, precision=precision)
    return table(selection, here)


def _progress(total: int, quiet: bool) -> AbstractContextManager[Any]:
    from cellseg_deploy.cli._progress import RunProgress, say_failures

    return nullcontext(say_failures) if quiet else RunProgress(total)


def _for_machines(summary: RunSummary) -> dict[str, Any]:
    return {
        "found": summary.found,
        "done": summary.done,
        "failed": summary.failed,
        "cells": summary.cells,
        "counted": summary.counted,
        "wall_seconds": round(summary.wall_seconds, 3),
        "output": str(summary.output),
    }


def _print_table(summary: RunSummary) -> None:
    seconds = summary.wall_seconds
    rate = f", {summary.found / seconds:.2f} images/s" if seconds > 0 else ""
    rows = [
        ("images", f"{summary.done} of {summary.found}" if summary.failed else str(summary.done)),
        (
            "cells",
            f"{summary.cells}, {summary.counted} counted" if summary.counted != summary.cells else str(summary.cells),
        ),
        ("failed", f"{summary.failed} (named in images.csv)" if summary.failed else "0"),
        ("time", f"{seconds:.1f} s{rate}"),
        ("results", _common.printable(summary.output)),
    ]
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
