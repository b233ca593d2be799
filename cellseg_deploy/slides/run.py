"""Count one image in bounded memory: network, labels block by block, files; resumed where a killed run ended.

    region --network, band by band--> probabilities on disk --blocks, twice--> cells --strip by strip--> files

The labels are those of ``Segmenter(image, field="full")``, pixel for pixel, whatever the memory. Statistics of the
whole image come from one definition each: the scale from the same crop in the image's middle, the typical cell area
from all cells before small ones are dropped (``cells.blocks``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import alone
from cellseg_deploy.cells import blocks
from cellseg_deploy.cells import scale as scales
from cellseg_deploy.cells.blocks import BlockSettings
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule, counted
from cellseg_deploy.cells.image_tiles import StageClock
from cellseg_deploy.cells.measure import CellTable, in_micrometres
from cellseg_deploy.cells.notes import Note, kind_of
from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder, remove_stale, write_bytes, writing
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.images.resolution import PixelSize, checked_by_cells
from cellseg_deploy.models.spec import to_json
from cellseg_deploy.outputs.segmented import COUNTED, LEFT_OUT_BY
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import files
from cellseg_deploy.slides.found_cells import STRIP_ROWS, FoundCells
from cellseg_deploy.slides.label_file import LabelFile, bytes_of_labels
from cellseg_deploy.slides.network import ProbabilityFile, bands_of, run_network
from cellseg_deploy.slides.region import Region
from cellseg_deploy.slides.samples import Samples

LABELS, CELLS, IMAGES, OVERVIEW, RECORD = "labels.tif", "cells.csv", "images.csv", "overview.png", "slide.json"
UNFINISHED = "unfinished"
_OVERLAP_DIAMETERS = 6
_LEAST_ROWS = 64


@dataclass(frozen=True)
class Progress:
    """What a run reports: ``started(stage, steps)`` and ``advanced(steps)`` within it."""

    started: Callable[[str, int], None] = lambda *_: None
    advanced: Callable[[int], None] = lambda _: None


_SILENT = Progress()
_NO_RESULT = ("threads", "model_path")  # of what a backend tells of itself: changes no result


@dataclass(frozen=True)
class SlideResult:
    """``cells``: labelled, ``counted``: those that count. ``row``: of images.csv. ``notes``: for the user."""

    cells: int
    counted: int
    row: dict[str, Any]
    notes: tuple[str, ...]
    out: Path


def half_of_free_memory() -> int:
    """Half of the bytes of memory that are available now."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def run_slide(
    segmenter: Segmenter,
    region: Region,
    out: Path,
    *,
    memory: int | None = None,
    count_rule: CountRule = DEFAULT_RULE,
    overwrite: bool = False,
    progress: Progress = _SILENT,
) -> SlideResult:
    """Count the cells of ``region`` into the folder ``out``; a run that was stopped is resumed.

    ``memory``: bytes that windows may take, None for half of what is free. It changes no result. ``overwrite``: replace
    an earlier result, or an unfinished run of other settings.

    Raises ``OutputError`` for the folder, ``DataError`` for the image, or if touching cells do not fit into memory.
    """
    check_rule(count_rule)
    memory = half_of_free_memory() if memory is None else memory
    make_folder(out)
    with exclusive(out):
        remove_stale(out)
        work = out / UNFINISHED
        if (out / RECORD).exists() and not overwrite:
            raise OutputError(f"{out}: holds a finished result ({RECORD}); choose another folder, or give `overwrite`")
        _begin(work, _identity(segmenter, region), overwrite)
        with writing(out / RECORD):
            (out / RECORD).unlink(missing_ok=True)  # from here on the folder holds no finished result
        result = _run(segmenter, region, out, work, memory, count_rule, progress)
        with writing(work):
            shutil.rmtree(work)
        return result


def _identity(segmenter: Segmenter, region: Region) -> dict[str, Any]:
    """What an unfinished run must have in common with this one."""
    spec = segmenter.backend.spec
    return {
        "program": "cellseg-slide",
        "image": region.reader.name,
        "levels": [list(hw) for hw in region.reader.levels],
        "stamp": list(region.reader.stamp),
        "region": [region.level, region.y, region.x, region.height, region.width],
        "model": hashlib.sha256(to_json(spec).encode()).hexdigest(),
        "engine": {
            "kind": [type(segmenter.backend).__name__, segmenter.backend.device, segmenter.backend.precision],
            **{name: str(value) for name, value in segmenter.backend.describe().items() if name not in _NO_RESULT},
        },
        "settings": [repr(segmenter.params), segmenter.halo, segmenter.border_cells, segmenter.auto_scale],
        "scale": segmenter.scale,
    }


def _begin(work: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Prepare the folder ``work``: as a killed run of the same identity left it, or empty."""
    record = work / "identity.json"
    earlier = content_of(record)
    if work.exists() and earlier != identity:
        if earlier and not overwrite:
            different = sorted(name for name in identity if identity[name] != earlier.get(name))
            raise OutputError(
                f"{work.parent}: holds an unfinished run with another {', '.join(different)}; use the same settings, "
                "choose another folder, or give `overwrite`"
            )
        with writing(work):
            shutil.rmtree(work)
    if not work.exists():
        make_folder(work)
        write_bytes(record, json.dumps(identity).encode())


def _run(
    segmenter: Segmenter, region: Region, out: Path, work: Path, memory: int, count_rule: CountRule, progress: Progress
) -> SlideResult:
    spec, clock, notes = segmenter.backend.spec, StageClock(), list(region.reader.notes)
    network = alone(segmenter.backend.predict, segmenter.batch_size)
    scale = segmenter.scale
    if segmenter.auto_scale:
        most = round(spec.tile_size * max(scales.SEARCH_DIAMETERS_PX) / spec.cell_diameter_px)
        choice = segmenter.find_scale([region.part(*scales.crop_of(region.hw, most, 0))], network, clock, field="full")
        scale = choice.scale
        notes += [choice.note] if choice.note else []
    settings = block_settings(segmenter, region.hw, scale, memory)
    stored = ProbabilityFile(
        work / "probabilities.f32", len(spec.channels), settings.hw, spare_bytes=bytes_of_labels(settings)
    )
    samples = Samples(region)
    bands, across = (len(bands_of((n, 1), spec.tile_size, segmenter.halo)) for n in settings.hw)
    progress.started("tiles", bands * across)
    run_network(
        *(region.hw, samples.rows, scale, network, stored),
        tile_size=spec.tile_size,
        halo=segmenter.halo,
        clock=clock,
        on_tiles=progress.advanced,
    )
    n_blocks = -(-settings.hw[0] // settings.block_rows)
    progress.started("blocks", 2 * n_blocks)
    with clock("label"):
        with LabelFile(work / "first-labels.i32") as kept:
            first = blocks.first_pass(stored.read, settings, kept.keep, lambda: progress.advanced(1))
            found = FoundCells(work, settings)
            for part in blocks.cells(stored.read, settings, first, lambda: progress.advanced(1)):
                found.add(part)
        table, classes = found.finish(segmenter.counting_classes)
    whole = table.columns["area_px"][~table.columns["touches_border"]]
    if not segmenter.auto_scale and scale == spec.image_scale:
        notes.append(scales.size_of_areas_note(whole, spec.cell_diameter_px, scale))
    share = found.pixels / (region.height * region.width)
    seen = stored.share_from(spec.channels.index("foreground"), segmenter.params.foreground_threshold)
    notes.append(scales.lost_share_note(seen, share))
    size = checked_by_cells(region.pixel_size, table.columns["equivalent_diameter_px"])
    if size.note:
        notes.append(Note(size.note, "pixel size"))
    progress.started("strips", -(-region.height // STRIP_ROWS))

    def strip(number: int) -> npt.NDArray[np.int32]:
        labels = found.strip(number)
        samples.add(number * STRIP_ROWS, labels)
        progress.advanced(1)
        return labels

    files.write_labels(out / LABELS, region.hw, strip, pixel_size_um=size.um)
    files.write_overview(out / OVERVIEW, *samples.overview())
    notes += samples.notes()
    notes = [note for note in notes if note]
    boxes, area = table.boxes, table.columns["area_px"]
    rule = counted(
        *(boxes, region.hw, count_rule),
        areas_px=area,
        model_cell_px=segmenter.model_cell_px(scale),
        class_of=None if classes is None else classes.index,
    )
    counts = rule if classes is None else rule & classes.counts
    columns = {**table.columns, COUNTED: counts}
    if classes is not None:
        columns[LEFT_OUT_BY] = np.select([~classes.counts, ~counts], ["class", "border"], "")
    if size.um is not None:
        columns |= in_micrometres(table, size.um)
    files.write_cells(out / CELLS, region.reader.name, columns)
    by_class = {} if classes is None else classes.numbers(rule)
    of_class = area if classes is None else area[classes.counts]
    row = _row(region, table, counts, share, of_class, scale, by_class, size, notes)
    files.write_row(out / IMAGES, row)
    result = SlideResult(len(table), int(counts.sum()), row, tuple(notes), out)
    about = {**_identity(segmenter, region), "scale": scale, "result": row, "seconds": clock.seconds}
    write_bytes(out / RECORD, json.dumps(about, indent=1).encode())
    return result


def block_settings(segmenter: Segmenter, image_hw: tuple[int, int], scale: float, memory: int) -> BlockSettings:
    """Return the settings of the blocks for an image of ``image_hw`` at ``scale``, whose windows fit into ``memory``
    bytes. Raises ``UsageError`` if not even the lowest block does."""
    spec = segmenter.backend.spec
    hw = scaled_size(image_hw, scale)
    overlap = round(_OVERLAP_DIAMETERS * spec.cell_diameter_px)
    # A window's probabilities, its labels and their temporaries, and the labels at the image's size.
    per_px = 8 * len(spec.channels) + blocks.BYTES_PER_PIXEL + 12 / scale**2
    most_px = int(memory / per_px)
    rows = most_px // hw[1] - overlap - 16
    if rows < _LEAST_ROWS:
        needed = per_px * hw[1] * (_LEAST_ROWS + overlap + 16)
        raise UsageError(
            f"memory of {memory / 1e9:.2f} GB does not hold one block of this image; rows of {image_hw[1]} px need "
            f"{needed / 1e9:.2f} GB: give `memory`, or a part of the image"
        )
    return BlockSettings(
        *(spec.channels, segmenter.params, spec.cell_diameter_px, hw, image_hw),
        *(segmenter.border_cells, tuple(spec.classes)),
        block_rows=rows,
        overlap_rows=overlap,
        most_px=most_px,
    )


def _row(
    region: Region,
    table: CellTable,
    counts: npt.NDArray[np.bool_],
    share: float,
    areas_px: npt.NDArray[Any],
    scale: float,
    by_class: dict[str, int],
    size: PixelSize,
    notes: list[str],
) -> dict[str, Any]:
    """The row of images.csv, with the columns of a folder run."""
    median = float(np.median(areas_px)) if len(areas_px) else None
    n_counted = int(counts.sum())
    row: dict[str, Any] = {
        "image": region.reader.name,
        "status": "done",
        "cells": len(table),
        "counted": n_counted,
        "confluence": share,
        "field_of_view_share": 1.0,
        "median_cell_area_px": median,
        "scale": float(scale),
        **{f"count_{name}": number for name, number in by_class.items()},
    }
    if size.um is not None:
        row |= {
            "pixel_size_um": size.um,
            "pixel_size_source": size.source,
            "median_cell_area_um2": None if median is None else median * size.um**2,
            "counted_per_mm2": n_counted / (region.height * region.width * size.um**2) * 1e6,
        }
    return row | {"warning": "; ".join(" ".join(note.split()) for note in notes), "error": ""}


def warnings_of(result: SlideResult) -> list[str]:
    """Notes of ``result`` that are warnings."""
    return [note for note in result.notes if kind_of(note) != "conversion"]
