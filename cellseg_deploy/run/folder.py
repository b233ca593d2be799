"""The folder run: many images in, labels, pictures and tables out; one bad image never stops it.

OUT/labels/NAME.tif      label image                  OUT/cells.csv      one row per cell
OUT/overlays/NAME.jpg    outlines and count           OUT/images.csv     one row per image, failed images too
OUT/KIND/NAME...         see ``outputs.formats``      OUT/run.json       model, engine, settings, times
                                                      OUT/journal.jsonl  finished images, to resume an interrupted run

Images overlap (see ``batching``): helper threads read, label and encode; the network takes tiles of several images at a
time. Only the caller's thread writes, image by image in the order of the images, so that at any time the folder holds
what a run over fewer images would have left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.errors import NothingToDoError
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.files.urls import text_of
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.run.added_kinds import add_kinds, kinds_to_save
from cellseg_deploy.run.elsewhere import Elsewhere
from cellseg_deploy.run.output_folder import check_no_links
from cellseg_deploy.run.plan import RunPlan, plan
from cellseg_deploy.run.record import ImageResult, Inputs, RunOptions, RunSetup, RunSummary, identity_of
from cellseg_deploy.run.resume import FolderKind, check_usable, classify, look_at
from cellseg_deploy.run.session import run
from cellseg_deploy.run.state import RunState
from cellseg_deploy.run.streamed import OnStream
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

__all__ = ["ImageResult", "RunOptions", "RunSummary", "plan_folder", "run_folder"]


def run_folder(
    segmenter: Segmenter,
    images: Sequence[FoundImage],
    out: Path,
    *,
    options: RunOptions | None = None,
    threads: ThreadPlan | None = None,
    on_result: Callable[[ImageResult], None] | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
    on_scale: Callable[[str], None] | None = None,
    on_stream: OnStream | None = None,
    inputs: Inputs | None = None,
    elsewhere: Elsewhere | None = None,
) -> RunSummary:
    """Segment ``images`` into the folder ``out``; ``on_result`` is called with each processed image, in order.

    If the folder holds a run with the same model, engine and settings, it is resumed: finished images are skipped,
    failed images are retried. Kinds of files that it lacks are made from its label images (``added_kinds``).
    ``on_plan`` is called with the plan before the work begins, ``on_scale`` with one line per measured scale,
    ``on_stream`` for each image that is read by region (``streamed.OnStream``).
    ``inputs``: the paths that were passed, for run.json; by default the folders of ``images``.

    An image that cannot be read, or fails for any reason of its own, is recorded and the run continues. If the run is
    interrupted (KeyboardInterrupt) or stopped by an error that concerns the whole run or comes from ``on_result``, the
    tables of the finished images are written before the exception propagates. ``threads``: see ``threads.plan``.
    ``elsewhere``: does the images, such as a ``cluster.engine.ClusterEngine``.
    Neither the threads nor the order of the images change a result.

    Raises ``NothingToDoError`` without images, ``OutputError`` / ``OutputInUseError`` for the folder, ``UsageError``
    if ``out`` lies inside the input or vice versa.
    """
    if not images:
        raise NothingToDoError("no image to work on; expected PNG, JPEG or TIFF files")
    options = options or RunOptions()
    threads = threads or thread_plans.plan(device=segmenter.backend.device)
    check_apart([image.path for image in images], out)
    inputs = inputs or inputs_of(images)
    save = kinds_to_save(out, identity_of(segmenter, options, inputs), overwrite=options.overwrite)
    if save is not None:
        options = replace(options, save=save)
        add_kinds(segmenter, images, out, options)
    setup = RunSetup(
        segmenter,
        out,
        options,
        threads,
        inputs,
        on_result=on_result,
        on_plan=on_plan,
        on_scale=on_scale,
        on_stream=on_stream,
        elsewhere=elsewhere,
    )
    return run(setup, [images])


def plan_folder(
    segmenter: Segmenter,
    images: Sequence[FoundImage],
    out: Path,
    *,
    options: RunOptions | None = None,
    inputs: Inputs | None = None,
) -> RunPlan:
    """Return what ``run_folder`` would do, without touching ``out``. Raises like it, except for a folder in use."""
    options = options or RunOptions()
    check_apart([image.path for image in images], out)
    asked = identity_of(segmenter, options, inputs or inputs_of(images))
    save = kinds_to_save(out, asked, overwrite=options.overwrite)
    state = look_at(out) if save is not None else classify(out, asked)
    if state.kind == "foreign" or not options.overwrite:
        check_usable(state, out)
    if state.kind != "fresh":
        check_no_links(out)
    folder: FolderKind = "fresh" if options.overwrite else state.kind
    known = RunState.of(state.journal if folder == "resume" else None)
    return plan(images, out, folder, known, chosen_formats(options.save if save is None else save), options.shard)


def inputs_of(images: Sequence[FoundImage]) -> Inputs:
    """Return the folders of ``images`` as inputs, for when the paths that were passed are unknown."""
    roots = tuple(sorted({text_of(image.root) for image in images}))
    return Inputs(roots, roots)
