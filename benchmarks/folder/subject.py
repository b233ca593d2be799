"""The folder run as shipped, opened in a worker: files in, label images, overlays and tables out."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cellseg_benchmarks.harness import memory
from cellseg_benchmarks.harness.images import max_pixels_for
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy import threads as thread_plans
from cellseg_deploy.backends import EngineOptions, default_device
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.segmenter import Segmenter


def subject(
    settings: Mapping[str, Any],
    threads: int | None,
    work: str,
    timed: str | None = None,
    save: Sequence[str] | None = None,
    report: bool = True,
) -> Subject:
    """A ``Segmenter`` of ``settings``: fields of ``EngineOptions``, arguments of ``Segmenter.load``, and ``path``, the
    model.

    ``threads``: total, None for one per core. ``work``: folder for the output of runs, deleted afterwards. ``timed``:
    folder of images whose run is the call ``folder``, None for no call. ``save``, ``report``: as in ``RunOptions``.

    The question ``run`` runs the images in ``paths`` once and returns the summary of the run, with the memory it
    took. An image that fails fails the measurement: its time would be that of another, smaller job.
    """
    since = stopwatch()
    of_engine = {field.name for field in fields(EngineOptions)} & settings.keys()
    engine = EngineOptions(**{name: settings[name] for name in of_engine})
    others = {"scale": None} | {name: value for name, value in settings.items() if name not in of_engine}
    path = others.pop("path", None)
    device = engine.device or default_device(None if path is None else Path(path), engine.backend)
    plan = thread_plans.plan(threads, device=device)
    segmenter = Segmenter.load(path, engine=replace(engine, threads=plan.engine), **others)
    opened = since()
    place = tempfile.TemporaryDirectory(dir=work, prefix="run-")
    out = Path(place.name) / "out"

    def options(max_pixels: int) -> RunOptions:
        saved = RunOptions().save if save is None else tuple(save)
        return RunOptions(save=saved, reading=ReadOptions(max_pixels_for(max_pixels)), report=report)

    def run_once(paths: Sequence[str], max_pixels: int = 0) -> RunSummary:
        images = find_images([Path(path) for path in paths], follow_links=True)
        summary = run_folder(segmenter, images, out, options=options(max_pixels), threads=plan)
        if summary.failed:
            raise DataError(
                f"{summary.failed} of {summary.found} images failed; a time without them would be too short"
            )
        return summary

    def run(paths: Sequence[str], max_pixels: int = 0) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        before = memory.rss_bytes()
        was_reset = memory.reset_peak()
        seconds, cpu_before = stopwatch(), time.process_time()
        summary = run_once(paths, max_pixels)
        return {
            "seconds": seconds(),
            "cpu_seconds": time.process_time() - cpu_before,
            "wall_seconds": summary.wall_seconds,
            "engine_seconds": summary.engine_seconds,
            "stage_seconds": summary.stage_seconds,
            "images": summary.done,
            "cells": summary.cells,
            "rss_before_bytes": before,
            "peak_rss_bytes": memory.peak_rss_bytes(),
            "peak_is_of_this_run": was_reset,
        }

    def folder() -> None:
        shutil.rmtree(out, ignore_errors=True)
        run_once([str(timed)])

    backend, spec = segmenter.backend, segmenter.backend.spec
    facts = {
        "model": spec.name,
        "engine": f"{backend.name} {backend.precision} on {backend.device}",
        "verified": backend.verified,
        "choice": backend.choice,
        "channels": len(spec.channels),
        "scale": segmenter.scale,
        "tile_size": spec.tile_size,
        "halo": segmenter.halo,
        "precision": backend.precision,
        "device": backend.device.partition(":")[0],
        "cell_diameter_px": spec.cell_diameter_px,
        "threads": {"engine": plan.engine, "helpers": plan.helpers},
        "open_seconds": opened,
    }
    calls = {} if timed is None else {"folder": folder}

    def close() -> None:
        segmenter.close()
        place.cleanup()

    return Subject(calls=calls, facts=facts, questions={"run": run}, close=close)
