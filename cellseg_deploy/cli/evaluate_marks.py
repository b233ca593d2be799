"""``cellseg-evaluate score --boxes`` and ``--points``: judge labels by cells that were marked, not drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.annotations.class_score import class_pairs, names_in_file, pool_classes, score_classes
from cellseg_deploy.annotations.objects import Annotations, Kind, Points, check_classes
from cellseg_deploy.annotations.read import read_annotations
from cellseg_deploy.annotations.score import HIT_IOU, Bools, MarkScore, pool_marks, score_marks, unmarked
from cellseg_deploy.batching import Job, Network
from cellseg_deploy.cells.classes import counting_labels
from cellseg_deploy.cli import console
from cellseg_deploy.cli import score as score_command
from cellseg_deploy.cli.evaluate_options import Kind as Judged
from cellseg_deploy.cli.evaluate_options import Shared, with_progress
from cellseg_deploy.cli.evaluate_remarks import Remarks
from cellseg_deploy.errors import DataError, plural
from cellseg_deploy.evaluate import score as evaluation
from cellseg_deploy.evaluate.report_folder import report_folder
from cellseg_deploy.files import atomic
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.find import images_by_stem, require_images, stem_of
from cellseg_deploy.images.read import declared_pixels, read_image, read_labels
from cellseg_deploy.outputs import tables

if TYPE_CHECKING:
    from cellseg_deploy.segmenter import Segmenter

CSV_COLUMNS = (
    *("image", "f1", "precision", "recall", "recall_overlapping", "recall_apart", "n_true", "n_predicted"),
    *("count_bias", "merges", "pieces", "n_overlapping", "n_left_out_true", "n_left_out_predicted"),
)


def run(
    shared: Shared, judged: Path, holds: Judged, path: Path, kind: Kind, *, unmarked_folder: Path | None = None
) -> int:
    """Score every image named in the file ``path``, and write the report. Raises ``CellsegError``.

    ``holds``: what the folder ``judged`` holds. ``unmarked_folder``: masks or label images of all objects; those
    without a point count neither way.
    """
    check_apart([folder for folder in (judged, path, unmarked_folder) if folder and folder.is_dir()], shared.output)
    found = {image.name: image.path for image in require_images([judged], follow_links=True)}
    sizes = {name: _size_hw(file, holds, shared) for name, file in found.items()}
    truth = read_annotations(path, kind, sizes)
    asked = shared.classes or ()
    check_classes(truth, names_in_file(asked))
    if holds == "labels" and asked != names_in_file(asked):
        raise click.UsageError(f"--classes {','.join(asked)} names classes of a model, but label images have none")
    if not shared.quiet:
        console.say(f"{path}: {truth}")
        for remark in truth.remarks:
            console.say(f"  {remark}")
    about: dict[str, Any] = {"data": {holds: str(judged), kind: str(path)}}
    about |= {"classes": list(names_in_file(asked)), "read": str(truth), "remarks": list(truth.remarks)}
    files = {name: found[name] for name in truth.by_image}
    objects = None
    if unmarked_folder is not None:
        about["data"]["unmarked"] = str(unmarked_folder)
        objects = _Objects(unmarked_folder, truth, sizes)
    remarks = Remarks()
    with ExitStack() as stack:
        place = stack.enter_context(report_folder(shared.output, evaluation.PROGRAM, score_command.FILES))
        if holds == "images":
            segmenter = stack.enter_context(shared.open_segmenter(judged))
            pairs, wanted = _classes(segmenter, truth, asked)
            about["model"] = evaluation.describe_model(segmenter)
            about["classes"] = list(wanted)
            scored = stack.enter_context(
                closing(_by_model(files, truth, shared, segmenter, pairs, wanted, remarks, objects))
            )
        else:
            pairs = {}
            scored = stack.enter_context(closing(_by_labels(files, truth, shared, names_in_file(asked), objects)))
        scores = list(with_progress(scored, len(files), shared.quiet))
        pooled = pool_marks(scores)
        if pairs:
            pooled["of_model"] = pool_classes([score.of_model for score in scores], pairs)
        about["warnings"] = remarks.by_kind()
        _write(place, shared, list(files), scores, pooled, about)
    remarks.say()
    if not shared.quiet:
        _print_table(pooled, shared.output, kind)
    return console.EXIT_OK


def _classes(
    segmenter: Segmenter, truth: Annotations, asked: tuple[str, ...]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Map the model's classes to their names in ``truth``, and return the names there that count (empty: all).

    Makes ``segmenter`` count the requested classes ``asked``. Marks of classes that it does not count are neutral.
    """
    of_marks = truth.class_names
    pairs = class_pairs(asked, segmenter.backend.spec.classes, of_marks)
    if asked:
        if pairs:
            segmenter.counting_classes = tuple(pairs)
        return pairs, names_in_file(asked)
    not_counted = {each for name, called in pairs.items() if name not in segmenter.counting_classes for each in called}
    return pairs, tuple(name for name in of_marks if name not in not_counted) if not_counted else ()


def _size_hw(file: Path, holds: Judged, shared: Shared) -> tuple[int, int]:
    read = read_labels(file) if holds == "labels" else read_image(file, shared.reading).pixels_hwc
    return read.shape[0], read.shape[1]


class _Objects:
    """Objects of each image, marked or not: label images or masks in ``folder``, by the names of the images.

    Raises ``DataError`` if an image of ``truth`` has none.
    """

    def __init__(self, folder: Path, truth: Annotations, sizes_hw: Mapping[str, tuple[int, int]]) -> None:
        by_stem = images_by_stem(folder)
        self._truth, self._sizes_hw = truth, sizes_hw
        self._files = {name: by_stem.get(stem_of(name)) for name in truth.by_image}
        lonely = [name for name, file in self._files.items() if file is None]
        if lonely:
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise DataError(
                f"{lonely[0]}{more}: no mask or label image of the same name in {folder}; expected {stem_of(lonely[0])}"
            )

    def unmarked(self, name: str) -> Bools:
        """Where the objects of the image ``name`` are that have no point, bool (h, w)."""
        file, marks = self._files[name], self._truth.by_image[name]
        assert file is not None
        assert isinstance(marks, Points)
        labels = read_labels(file, keep_ignored=True)
        if labels.shape != self._sizes_hw[name]:
            (height, width), (rows, columns) = self._sizes_hw[name], labels.shape
            raise DataError(f"{file} has {columns} x {rows} px, expected {width} x {height} px like {name}")
        return unmarked(marks, labels)


def _by_labels(
    files: dict[str, Path], truth: Annotations, shared: Shared, wanted: tuple[str, ...], objects: _Objects | None
) -> Generator[MarkScore, None, None]:
    least = shared.min_area or 0
    for name, file in files.items():
        unmarked_hw = None if objects is None else objects.unmarked(name)
        labels = read_labels(file)
        yield score_marks(truth.by_image[name], labels, classes=wanted, min_area_px=least, unmarked_hw=unmarked_hw)


def _by_model(
    files: dict[str, Path],
    truth: Annotations,
    shared: Shared,
    segmenter: Segmenter,
    pairs: dict[str, tuple[str, ...]],
    wanted: tuple[str, ...],
    remarks: Remarks,
    objects: _Objects | None,
) -> Generator[MarkScore, None, None]:
    def work(name: str, file: Path, network: Network) -> MarkScore:
        loaded = read_image(file, shared.reading)
        found = segmenter.segment(loaded.pixels_hwc, network, field=shared.field)
        remarks.add(name, (*loaded.notes, *found.notes))
        cells, least = counting_labels(found.labels, found.classes), shared.min_area or 0
        marks, unmarked_hw = truth.by_image[name], None if objects is None else objects.unmarked(name)
        score = score_marks(marks, cells, classes=wanted, min_area_px=least, unmarked_hw=unmarked_hw)
        if found.classes is None or not pairs:
            return score
        of_model = score_classes(marks, found.labels, found.classes, pairs, min_area_px=least, unmarked_hw=unmarked_hw)
        return replace(score, of_model=of_model)

    def nbytes(file: Path) -> int:
        return segmenter.bytes_in_flight(declared_pixels(file))

    jobs = [Job(partial(work, name, file), partial(nbytes, file)) for name, file in files.items()]
    yield from segmenter.results(jobs, shared.thread_plan)


def _write(
    place: Path,
    shared: Shared,
    names: list[str],
    scores: list[MarkScore],
    pooled: dict[str, Any],
    about: dict[str, Any],
) -> None:
    rows: list[list[Any]] = [list(CSV_COLUMNS)]
    for name, score in zip(names, scores, strict=True):
        alone = pool_marks([score])
        rows.append([name, *(None if _undefined(alone[key]) else alone[key] for key in CSV_COLUMNS[1:])])
    atomic.write_bytes(place / evaluation.METRICS_CSV, tables.csv_rows(rows))
    record = {
        **pooled,
        "program": evaluation.PROGRAM,
        "min_area_px": shared.min_area or 0,
        "hit_iou": HIT_IOU,
        **about,
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    atomic.write_bytes(place / evaluation.METRICS_JSON, text.encode("utf-8", "backslashreplace"))


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _print_table(pooled: dict[str, Any], output: Path, kind: Kind) -> None:
    rows = [
        ("images", f"{pooled['n_images']}"),
        ("cells", f"{pooled['n_predicted']} found, {pooled['n_true']} true"),
        ("f1", f"{pooled['f1']:.4f}   precision {pooled['precision']:.4f}, recall {pooled['recall']:.4f}"),
        ("count", f"{pooled['count_mae']:.2f} cells off per image, bias {pooled['count_bias']:+.2f}"),
        ("merges", f"{pooled['merges']}, pieces {pooled['pieces']}"),
    ]
    if kind == "boxes":
        apart = f"apart {pooled['recall_apart']:.4f}"
        rows.append(("recall", f"overlapping {pooled['recall_overlapping']:.4f}, {apart}"))
    rows += [
        (name, f"{row['found']} of {row['n']} found ({row['recall']:.1%}), {plural(row['pieces'], 'piece')}")
        for name, row in pooled["by_class"].items()
    ]
    rows += [
        (
            name,
            f"f1 {row['f1']:.4f}   precision {row['precision']:.4f}, recall {row['recall']:.4f} "
            f"({row['n_predicted']} found, {row['n_true']} marked as {', '.join(row['marked'])})",
        )
        for name, row in pooled.get("of_model", {}).items()
    ]
    for name, value in [*rows, ("results", console.printable(output))]:
        click.echo(f"{name:<8} {value}")
