"""``cellseg-evaluate score --counts``: do the counts agree with counts by hand?

OUT/agreement.json   bias, limits of agreement and errors      OUT/agreement.csv   one row per image
OUT/agreement.png    each image's difference against its count (Bland-Altman plot)
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Job, Network
from cellseg_deploy.cells.count_rules import CountRule, counted
from cellseg_deploy.cells.measure import boxes
from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate_options import Kind, Shared, with_progress
from cellseg_deploy.cli.evaluate_remarks import Remarks
from cellseg_deploy.errors import plural
from cellseg_deploy.evaluate import agreement, plots, score
from cellseg_deploy.evaluate.count_table import CountedImage, pair_with_counts
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.files import atomic
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.read import declared_pixels, read_image, read_labels
from cellseg_deploy.outputs import tables

if TYPE_CHECKING:
    from cellseg_deploy.evaluate.agreement import Agreement, Estimate
    from cellseg_deploy.segmenter import Segmenter

AGREEMENT_JSON, AGREEMENT_CSV, AGREEMENT_PNG = "agreement.json", "agreement.csv", "agreement.png"
FILES = (AGREEMENT_JSON, AGREEMENT_CSV, AGREEMENT_PNG)
COLUMNS = ("image", "count", "found", "difference", "ratio")


def run(shared: Shared, folder: Path, kind: Kind, by_hand: Path, rule: CountRule) -> int:
    """Compare the cells counted in the images of ``folder`` with the table ``by_hand``; return the exit code."""
    check_apart([folder, by_hand], shared.output)
    images = pair_with_counts(folder, by_hand)
    about: dict[str, Any] = {"data": {kind: str(folder), "counts": str(by_hand)}}
    remarks = Remarks()
    with ExitStack() as stack:
        if kind == "images":
            segmenter = stack.enter_context(shared.open_segmenter(folder, shared.classes))
            about["model"] = score.describe_model(segmenter)
            counts = stack.enter_context(closing(_of_model(images, segmenter, shared, rule, remarks)))
        else:
            counts = stack.enter_context(closing(_of_labels(images, rule, shared.min_area or 0)))
        place = stack.enter_context(report_folder(shared.output, score.PROGRAM, FILES))
        found = list(with_progress(counts, len(images), shared.quiet))
        result = agreement.agree([image.count for image in images], found)
        about |= {
            "count_rule": rule,
            "field_of_view": shared.field,
            "min_area_px": shared.min_area or 0,
            "warnings": remarks.by_kind(),
        }
        _write(place, images, found, result, about)
    remarks.say()
    if not shared.quiet:
        _print(result, shared.output)
    return console.EXIT_OK


def count_cells(labels: npt.NDArray[np.int32], rule: CountRule, min_area_px: int) -> int:
    """Count cells of ``labels`` (h, w) with at least ``min_area_px`` that count under ``rule``."""
    area = np.bincount(labels.ravel())
    area[:1] = 0
    numbers = np.flatnonzero(area >= max(1, min_area_px))
    kept = np.where(np.isin(labels, numbers), labels, 0)
    hw = (labels.shape[0], labels.shape[1])
    return int(counted(boxes(kept, numbers), hw, rule, areas_px=area[numbers]).sum())


def _of_model(
    images: Sequence[CountedImage], segmenter: Segmenter, shared: Shared, rule: CountRule, remarks: Remarks
) -> Generator[int, None, None]:
    def work(image: CountedImage, network: Network) -> int:
        loaded = read_image(image.path, shared.reading)
        found = segmenter.segment(loaded.pixels_hwc, network, field=shared.field)
        remarks.add(image.stem, (*loaded.notes, *found.notes))
        large = found.table.columns["area_px"] >= (shared.min_area or 0)
        return int((found.counted(rule) & large).sum())

    def nbytes(image: CountedImage) -> int:
        return segmenter.bytes_in_flight(declared_pixels(image.path))

    jobs = [Job(partial(work, image), partial(nbytes, image)) for image in images]
    return segmenter.results(jobs, shared.thread_plan)


def _of_labels(images: Sequence[CountedImage], rule: CountRule, min_area_px: int) -> Generator[int, None, None]:
    for image in images:
        yield count_cells(read_labels(image.path), rule, min_area_px)


def _write(
    out: Path, images: Sequence[CountedImage], found: Sequence[int], result: Agreement, about: dict[str, Any]
) -> None:
    rows: list[list[Any]] = [list(COLUMNS)]
    for image, ours in zip(images, found, strict=True):
        rows.append([image.stem, image.count, ours, ours - image.count, ours / image.count if image.count else None])
    record = {"program": score.PROGRAM, **_defined(asdict(result)), **about}
    by_hand = np.array([image.count for image in images])
    atomic.write_bytes(out / AGREEMENT_CSV, tables.csv_rows(rows))
    atomic.write_bytes(out / AGREEMENT_PNG, plots.agreement_png(by_hand, np.array(found), result.difference))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(out / AGREEMENT_JSON, text.encode("utf-8", "backslashreplace"))


def _defined(value: Any) -> Any:
    """Return ``value`` with None for undefined or infinite numbers, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _defined(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(result: Agreement, out: Path) -> None:
    for name, value in _rows(result):
        click.echo(f"{name:<8} {value}")
    click.echo(f"results  {console.printable(out)}")


def _rows(result: Agreement) -> Iterator[tuple[str, str]]:
    difference, ratio = result.difference, result.ratio
    yield "images", f"{result.n_images}"
    yield "cells", f"{result.found} found, {result.true} by hand"
    yield "bias", f"{_words(difference.bias, '+.2f')} cells per image"
    if math.isfinite(difference.sd):
        yield "limits", "of agreement, between which 95 % of the differences are expected:"
        yield "  lower", f"{_words(difference.lower, '+.2f')}"
        yield "  upper", f"{_words(difference.upper, '+.2f')}"
    if math.isfinite(ratio.sd):
        left_out = result.n_images - ratio.n
        without = f"; without {plural(left_out, 'image')} in which a count is 0" if left_out else ""
        yield (
            "ratio",
            f"{_words(ratio.bias, '.3f')} found / by hand, limits {ratio.lower.value:.3f} to "
            + (f"{ratio.upper.value:.3f}{without}"),
        )
    yield "error", f"{result.mae:.2f} cells off per image{_share(result.mape)}"
    for third in result.by_density:
        cells = f"{third.least}" if third.least == third.most else f"{third.least} to {third.most}"
        yield (
            "  cells",
            f"{cells}: {third.mae:.2f} off{_share(third.mape)}, bias {third.bias:+.2f}, {plural(third.n, 'image')}",
        )


def _words(one: Estimate, style: str) -> str:
    known = math.isfinite(one.low)
    return f"{one.value:{style}}" + (f" (95 % CI {one.low:{style}} to {one.high:{style}})" if known else "")


def _share(mape: float) -> str:
    return f" ({mape:.1%})" if math.isfinite(mape) else ""
