"""``cellseg-infer``: count and outline the cells of a folder of images."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli import cluster_options as clusters
from cellseg_deploy.cli import console
from cellseg_deploy.cli.cluster_options import cluster_options
from cellseg_deploy.errors import plural
from cellseg_deploy.files.urls import is_url, text_of

if TYPE_CHECKING:
    from cellseg_deploy.images.find import FoundImage
    from cellseg_deploy.run.plan import RunPlan
    from cellseg_deploy.run.record import RunSummary
    from cellseg_deploy.run.repeat import RecordedRun
    from cellseg_deploy.segmenter import Segmenter

_log = logging.getLogger(__name__)

_ACTIONS = {"work": "to do", "skip": "done", "fail": "fails"}

_EPILOG = """\b
Examples:
  cellseg-infer smears/ -o counts/
  cellseg-infer a.png b.tif -o counts/ --task confluence
  cellseg-infer slides/*.tif -o counts/ --save labels,rois --pixel-size 0.065
  cellseg-infer smears/ -o counts/ --cell-diameter 60      cells are about 60 px wide
  cellseg-infer camera/ -o counts/ --watch                 follow a folder that a microscope fills
  cellseg-infer more/ -o again/ --like counts/run.json     with the model and settings of an earlier run
  cellseg-infer smears/ -o part-2/ --shard 2/4            the second of four jobs; then cellseg-merge
  cellseg-infer smears/ -o counts/ --scheduler local --workers 2     on a Dask cluster
  cellseg-infer --explain --model my.onnx                  which engine would run it, and why

\b
Results:
  OUT/labels/NAME.tif     label image: 0 background, 1..n the cells
  OUT/overlays/NAME.jpg   the image with outlines and count
  OUT/cells.csv           one row per cell      OUT/images.csv   one row per image
  OUT/summary.csv         one row per group (folder, or --group-by): counts with sd and interval
  OUT/report.html         all of it on one page: what needs a look, sums, figures, pictures
  OUT/run.json            what ran, its settings, time per stage, and how busy the network was
  OUT/journal.jsonl       what is done: one line per image, as it is finished
The same command resumes a run that ended early; finished images are not done again. Different images are read, run
and written at the same time; results do not depend on that, on --threads, --batch-size or the order of the images.

\b
Exit codes: 0 all done, 2 usage, 3 some images failed (see images.csv), 4 no image found, 5 model refused,
6 output folder unusable or of another run, 7 output folder in use, 8 engine, device or cluster not available,
130 interrupted, 143/129 terminated or terminal closed (what is done is kept).
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("paths", metavar="PATH...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="Output folder.")
@console.model_options
@console.reading_options
@console.memory_option
@console.count_options
@click.option(
    "--classes",
    metavar="A,B",
    help="Classes of the model that count as cells; the others are labelled too.  [default: all but platelet]",
)
@click.option(
    "--save",
    default="labels,overlays",
    show_default=True,
    help="Files to write, with commas between: labels, overlays, numbered, rois, geojson, coco, probabilities, "
    "confluence, parquet, xlsx; or all, or none. Tables are always written. Kinds that a finished "
    "run lacks are made from its label images.",
)
@console.report_options
@click.option(
    "--report-thresholds",
    type=int,
    default=0,
    metavar="N",
    help="Number of images (at most 24) with a slider in report.html: counts, outlines at 19 thresholds.",
)
@click.option(
    "--pixel-size",
    type=float,
    metavar="UM",
    help="Pixel size in micrometres, for columns in micrometres.  [default: as in the TIFF]",
)
@click.option(
    "--list",
    "list_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Text file with one path per line, in addition to PATH...; - for stdin.",
)
@click.option(
    "--watch", is_flag=True, help="Watch the folder PATH and process files once they are complete; stop with Ctrl-C."
)
@click.option("--watch-idle", type=float, metavar="SECONDS", help="Stop --watch after SECONDS without a new file.")
@click.option(
    "--watch-settle",
    type=float,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="A file is complete when it has not changed for this long and its header can be read.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="RUN.JSON",
    help="Use the model, engine and settings of an earlier run: its run.json, or its output folder.",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Do only the I-th of N parts of the images, for job arrays; each into an OUT of its own. cellseg-merge joins "
    "them.",
)
@cluster_options
@click.option(
    "--upload",
    type=click.Path(path_type=Path),
    metavar="URL",
    help="Copy OUT to s3://BUCKET/FOLDER when the run has finished.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done with each image, and exit.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in OUT.  [default: resume it]")
@click.option("--follow-links", is_flag=True, help="Follow links that lead outside the input folders.")
@click.option("--explain", is_flag=True, help="Show which engine would be chosen and why, and exit; needs no PATH.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary to stdout instead of the table.")
@console.log_options
@click.pass_context
def command(context: click.Context, /, paths: tuple[Path, ...], output: Path | None, **asked: Any) -> int:
    """Count and outline the cells of images (PNG, JPEG, TIFF): files, or folders with everything in them."""
    console.set_up_logging(asked["verbose"])
    if asked["explain"]:
        unused = ("rebuild", "cuda_graph", "streams", "like")
        console.refuse_options(context, unused, "and --explain exclude each other: --explain ignores them")
        click.echo(_explanation(asked["model"], asked["backend"], asked["device"] or "cpu", asked["precision"]))
        return console.EXIT_OK
    recorded = None if asked["like"] is None else _take_from(asked["like"], context, asked)
    if output is None or not (paths or asked["list_file"]):
        missing = next(p for p in context.command.params if p.name == ("paths" if output else "output"))
        raise click.MissingParameter(ctx=context, param=missing)

    from cellseg_deploy.files.apart import check_apart
    from cellseg_deploy.images.find import paths_in_list, require_images
    from cellseg_deploy.run.upload import check_url

    if is_url(output):
        raise click.UsageError(f"OUT must be a folder on disk, got {text_of(output)}; to copy it there add --upload")
    given = [*paths, *(paths_in_list(asked["list_file"]) if asked["list_file"] else ())]
    if asked["upload"] is not None:
        check_url(asked["upload"], given)
    check_apart(given, output)
    _check_watch(context, given)
    clusters.check(context)
    images = [] if asked["watch"] else require_images(given, follow_links=asked["follow_links"])
    summary = _run(given, images, output, asked, recorded)
    if summary is None:
        return console.EXIT_OK
    if asked["as_json"]:
        click.echo(json.dumps(_for_machines(summary)))
    elif not asked["quiet"]:
        _print_table(summary)
    return console.EXIT_SOME_FAILED if summary.failed else console.EXIT_OK


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))


def _run(
    paths: list[Path], images: list[FoundImage], output: Path, asked: dict[str, Any], recorded: RecordedRun | None
) -> RunSummary | None:
    """Open the model and do what was requested; None if it was only to be shown."""
    from cellseg_deploy.outputs.formats import parse_names
    from cellseg_deploy.run.folder import RunOptions, plan_folder, run_folder
    from cellseg_deploy.run.record import Inputs, identity_of
    from cellseg_deploy.run.shard import Shard
    from cellseg_deploy.run.upload import check_writable, upload
    from cellseg_deploy.run.watch import CompleteFiles, watch_folder
    from cellseg_deploy.segmenter import Segmenter

    options = RunOptions(
        save=parse_names(asked["save"]),
        overwrite=asked["overwrite"],
        reading=console.read_options(asked),
        count_rule=asked["count_rule"],
        field_of_view=asked["field"],
        group_by=asked["group_by"],
        report=asked["report"],
        report_thresholds=asked["report_thresholds"],
        scales={} if recorded is None else recorded.scales,
        memory=asked["memory"],
        shard=None if asked["shard"] is None else Shard.parse(asked["shard"]),
    )
    complete = CompleteFiles(asked["watch_settle"])
    form, n_recorded = _form(output, asked, recorded)
    threads = console.plan_threads(asked["threads"], device=form["device"], model=form["path"], backend=form["backend"])
    inputs = Inputs.of(paths, follow_links=asked["follow_links"])
    classes = console.names_in(asked["classes"])
    engine = console.engine_options(asked | form, threads)
    with (
        Segmenter.load(
            form["path"], engine=engine, given=form.get("given"), classes=classes, **console.segmenter_options(asked)
        ) as segmenter,
        _progress(asked["quiet"]) as progress,
    ):
        opened = segmenter.backend
        _log.info("engine: %s %s on %s, %s", opened.name, opened.precision, opened.device, opened.choice)
        if not asked["quiet"]:
            console.say(_heading(segmenter))
        if recorded is not None:
            recorded.check(identity_of(segmenter, options, inputs))
        if n_recorded and not asked["quiet"]:  # takes a second per gigabyte of images
            console.say(
                f"comparing the images with {plural(n_recorded, 'image')} recorded in {console.printable(output)}"
            )
        if asked["dry_run"]:
            plan = plan_folder(segmenter, images, output, options=options, inputs=inputs)
            click.echo(json.dumps(plan.to_json())) if asked["as_json"] else _print_plan(plan)
            return None
        if asked["upload"] is not None:
            check_writable(asked["upload"], identity_of(segmenter, options, inputs))
        common: dict[str, Any] = {
            "options": options,
            "threads": threads,
            "on_result": progress.result,
            "on_plan": progress.planned,
            "on_stream": progress.streamed,
            "on_scale": None if asked["quiet"] else console.say,
        }
        if asked["watch"]:
            only_here = {"follow_links": asked["follow_links"], "idle_seconds": asked["watch_idle"]}
            return watch_folder(segmenter, paths[0], output, complete=complete, **only_here, **common)
        with clusters.opened(asked) as elsewhere:
            summary = run_folder(segmenter, images, output, inputs=inputs, elsewhere=elsewhere, **common)
    if asked["upload"] is not None:
        n_copied = upload(output, asked["upload"])
        if not asked["quiet"]:
            console.say(f"copied {plural(n_copied, 'file')} to {console.printable(text_of(asked['upload']))}")
    return summary


def _form(output: Path, asked: dict[str, Any], recorded: RecordedRun | None) -> tuple[dict[str, Any], int]:
    """Choose the file to open and its engine: those of the run in ``output`` if it is resumed, otherwise as requested.
    Return them, and the number of images that the resumed run recorded.

    For a ``recorded`` run, return the form of the model that was opened then. Raises ``OutputError`` for a folder
    that cannot be used in any case, before a model is loaded needlessly.
    """
    from cellseg_deploy.run.repeat import engine_to_resume
    from cellseg_deploy.run.resume import check_usable, look_at

    state = look_at(output)
    if state.kind == "foreign" or not asked["overwrite"]:
        check_usable(state, output)
    names = ("backend", "device", "precision")
    form = {"path": asked["model"], **{name: asked[name] for name in names}}
    if recorded is not None:
        form = engine_to_resume(recorded.identity, asked["model"]) or form
    if state.journal is None or asked["overwrite"]:
        return form, 0
    is_free = (asked["backend"], asked["device"], asked["precision"]) == ("auto", None, None) and not asked["rebuild"]
    of_run = engine_to_resume(state.journal.identity, asked["model"]) if is_free else None
    return of_run or form, len(state.journal.entries)


def _take_from(file: Path, context: click.Context, asked: dict[str, Any]) -> RecordedRun:
    """Copy the settings in the run.json ``file`` into ``asked``; refuse passed options that results depend on."""
    from cellseg_deploy.run.repeat import read_run

    recorded = read_run(file)
    of_results = recorded.result_options()
    console.refuse_options(context, tuple(of_results), "and --like exclude each other: run.json already sets it")
    asked |= of_results | {"model": recorded.model_file(asked["model"])}
    for name, value in (("save", ",".join(recorded.identity.saved) or "none"), ("max_pixels", recorded.max_pixels)):
        if context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            asked[name] = value
    return recorded


def _check_watch(context: click.Context, paths: list[Path]) -> None:
    asked = context.params
    if not asked["watch"]:
        console.refuse_options(context, ("watch_idle", "watch_settle"), "needs --watch")
    elif asked["shard"]:
        raise click.UsageError("--shard and --watch exclude each other: parts are made of images that are there")
    elif asked["dry_run"]:
        raise click.UsageError("--dry-run and --watch exclude each other: future files are unknown")
    elif asked["upload"]:
        raise click.UsageError("--upload and --watch exclude each other: OUT is copied when a run has finished")
    elif len(paths) != 1 or not os.path.isdir(paths[0]):  # noqa: PTH112
        raise click.UsageError(f"--watch follows one folder; got {', '.join(map(console.printable, paths))}")


def _explanation(model: Path | None, backend: str, device: str, precision: str | None) -> str:
    """Describe the candidates of ``--backend auto`` and the choice among them."""
    from cellseg_deploy.backends.selection import select, table
    from cellseg_deploy.models import default_model_path

    if backend != "auto":
        raise click.UsageError(f"--explain shows what --backend auto chooses; {backend} was named")
    selection, here = select(model or default_model_path(), device=device, precision=precision)
    return console.in_options(table(selection, here))


def _progress(quiet: bool) -> AbstractContextManager[Any]:
    from cellseg_deploy.cli.progress import QuietProgress, RunProgress

    return nullcontext(QuietProgress()) if quiet else RunProgress()


def _for_machines(summary: RunSummary) -> dict[str, Any]:
    """Return totals: ``found`` is the sum of ``done`` (now), ``skipped`` (done before) and ``failed``."""
    return {
        "found": summary.found,
        "done": summary.done,
        "skipped": summary.skipped,
        "failed": summary.failed,
        "others": summary.others,
        "cells": summary.cells,
        "counted": summary.counted,
        **({"by_class": summary.by_class} if summary.classes else {}),
        "wall_seconds": round(summary.wall_seconds, 3),
        "warnings": summary.warnings,
        "edited": summary.edited_files,
        "output": console.printable(summary.output),
    }


def _print_table(summary: RunSummary) -> None:
    """Print totals for people."""
    seconds, done = summary.wall_seconds - summary.idle_seconds, summary.done + summary.skipped
    worked = summary.done + summary.failed
    waited = f" of work in {summary.wall_seconds:.1f} s" if summary.idle_seconds >= 1 else ""
    rate = f", {worked / seconds:.2f} images/s" if seconds > 0 and worked else ""
    images = f"{done} of {summary.found}" if summary.failed else str(done)
    if summary.skipped:
        images += f", {summary.skipped} of them before this run"
    counted = f", {summary.counted} counted" if summary.counted != summary.cells else ""
    rows = [
        ("images", images),
        ("cells", f"{summary.cells}{counted}"),
        ("failed", f"{summary.failed} (named in images.csv)" if summary.failed else "0"),
        ("time", f"{seconds:.1f} s{waited}{rate}"),
        ("results", console.printable(summary.output)),
    ]
    if summary.classes:
        kinds = [
            f"{console.printable(name)} {number}" + ("" if name in summary.counting else ", not counted")
            for name, number in summary.by_class.items()
        ]
        rows.insert(2, ("classes", "; ".join(kinds)))
    if summary.others:
        rows.insert(-2, ("kept", f"{plural(summary.others, 'row')} of earlier images (not part of this run)"))
    if summary.edited:
        files = plural(len(summary.edited), "file")
        rows.insert(-1, ("edited", f"{files}, kept (named in run.json)"))
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
    for kind, found in summary.warnings.items():
        click.echo(f"warning  {console.warning_words(kind, found)}")


def _heading(segmenter: Segmenter) -> str:
    """Return one line printed before the work: model, device, arithmetic and scale."""
    backend, spec = segmenter.backend, segmenter.backend.spec
    if segmenter.auto_scale:
        scale = "scale to be measured"
    else:
        scale = f"scale {segmenter.scale:g} (cells about {spec.cell_diameter_px / segmenter.scale:.0f} px wide)"
    classes = f", counts {' and '.join(map(console.printable, segmenter.counting_classes))}" if spec.classes else ""
    name = console.printable(spec.name)
    return f"model {name}, {backend.name} {backend.precision} on {backend.device}, {scale}{classes}"


def _print_plan(plan: RunPlan) -> None:
    """Print one line per image, and the number of images per planned action."""
    for item in plan.items:
        reason = f" ({console.printable(console.in_options(item.explanation))})" if item.explanation else ""
        click.echo(f"{_ACTIONS[item.action]:<6} {console.printable(item.image.name)}{reason}")
    counts = plan.counts
    done = f"{counts['work']} to do, {counts['skip']} done"
    click.echo(f"{plural(len(plan.items), 'image')}: {done}, {counts['fail']} would fail")
