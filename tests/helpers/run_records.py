"""A run made of its parts, for tests of what survives: three images, their files, their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from segmented_images import odd_labels, segmented

from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.fingerprint import of_bytes
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import tables
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.journal import ImageRecord, Journal, OutputFile
from cellseg_deploy.run.output_folder import make_place, sweep
from cellseg_deploy.run.resume import check_usable, classify, decide
from cellseg_deploy.run.state import RunState

NAMES = ("a.png", 'q"uo,te\n.png', "z.png")
BAD = "bad.png"


def identity(**changes: Any) -> RunIdentity:
    plain = RunIdentity(
        program="cellseg-infer 1.0",
        model={"name": "stub", "sha256": "ab" * 32},
        backend={"name": "openvino", "device": "cpu", "precision": "fp32", "engine": "openvino 2026.1"},
        task="counting",
        operating_point={"method": "threshold", "foreground_threshold": 0.5},
        settings={
            "scale": None,
            "halo": 8,
            "bit_depth": None,
            "pixel_size_um": None,
            "count_rule": "all",
            "border_cells": "visible",
            "field_of_view": "auto",
        },
        saved=("labels", "overlays"),
        versions={"numpy": "2.4.0"},
        inputs=("/smears",),
    )
    return replace(plain, **changes)


def make_images(folder: Path) -> list[FoundImage]:
    """Files whose content decides what is found in them."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate((*NAMES, BAD)):
        (folder / name).write_bytes(f"content {number}".encode())
    return [FoundImage(folder / name, name) for name in sorted((*NAMES, BAD))]


def outcome(image: FoundImage, out: Path, step: Callable[[str], None] = lambda _: None) -> ImageRecord:
    """What a run does with one image: two files, and the record that names them."""
    data = image.path.read_bytes()
    if image.name == BAD:
        return tables.failed(image.name, "the file is\ndamaged")
    step("read")
    labels = odd_labels()[: 6 + data[-1] % 3]
    found = segmented(labels, name=image.name, pixel_size_um=0.25 if image.name == "z.png" else None)
    outputs = []
    for path, content in ((f"labels/{image.name}.tif", data * 3), (f"overlays/{image.name}.jpg", data * 5)):
        step(f"before {path}")
        write_bytes(make_place(out, path), content)
        outputs.append(OutputFile.of(path, content))
    step("before the record")
    record = tables.done(
        found,
        source=of_bytes(data, image.path.stat().st_mtime_ns),
        output_name=image.name,
        outputs=outputs,
        notes=["a note,\nof two lines"],
    )
    return replace(record, seconds={"read": 0.1 + 0.2})


def run(images: Sequence[FoundImage], out: Path, step: Callable[[str], None] = lambda _: None) -> list[str]:
    """A run from start to end as the folder run does it; ``step`` is told of each stage. Gives what was worked on."""
    out.mkdir(exist_ok=True)
    state = classify(out, identity())
    check_usable(state, out)
    step("looked")
    entries = {} if state.journal is None else state.journal.entries
    done = {image.name for image in images if decide(image, entries.get(image.name), out).action == "skip"}
    sweep(out, RunState({name: entries[name] for name in done}).image_files)
    step("swept")
    worked = []
    with Journal.create(out, identity()) if state.journal is None else Journal.resume(state.journal) as journal:
        step("journal open")
        for image in images:
            if image.name not in done:
                journal.append(outcome(image, out, step))
                worked.append(image.name)
                step("recorded")
    content = journals.read(out / journals.JOURNAL)
    for name in ("cells.csv", "images.csv"):
        tables.write(out / name, name, content.path, [content.entries[image.name] for image in images])
    step("tables written")
    return worked


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder but the journal, whose times differ."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != journals.JOURNAL
    }


def journal_without_times(out: Path) -> tuple[Any, ...]:
    """What the journal in ``out`` holds, but for times."""
    content = journals.read(out / journals.JOURNAL)
    records = journals.whole_records(content.path, content.entries.values())
    return content.identity, [vars(record) | {"seconds": None} for record in records], content.scales, content.files


def as_plain(record: ImageRecord) -> dict[str, Any]:
    """A record to compare; sums of floats survive JSON exactly."""
    assert np.isfinite(list(record.seconds.values())).all()
    return vars(record)
