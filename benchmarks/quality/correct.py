"""What correcting a few fields and training on them brings: the truth plays the corrector, and a table of the scores.

``correct play`` gives the images of a run their true labels as corrections, as a person would in ``cellseg-view``.
``correct table`` reads what ``cellseg-evaluate`` wrote before and after the training: docs/correct.md has all commands.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.report import table
from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cells.label_runs import renumber
from cellseg_deploy.errors import DataError, UsageError, plural
from cellseg_deploy.files.atomic import make_folder
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.files.text import read_text
from cellseg_deploy.images.find import by_partner, images_by_stem, stem_of
from cellseg_deploy.images.read import read_labels

WHEN = ("before", "after")
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "F1": lambda scores: f"{scores['f1']:.3f}",
    "precision": lambda scores: f"{scores['precision']:.3f}",
    "recall": lambda scores: f"{scores['recall']:.3f}",
    "overlapping cells found": lambda scores: f"{scores['recall_overlapping']:.2f}",
    "merged cells": lambda scores: f"{scores['merges']}",
    "white cells whole": lambda scores: f"{scores['by_class']['WBC']['found']} of {scores['by_class']['WBC']['n']}",
    "pieces in white cells": lambda scores: f"{scores['by_class']['WBC']['pieces']}",
    "count off, cells per field": lambda scores: f"{scores['count_mae']:.2f}",
}


@dataclass(frozen=True)
class Loop:
    """``cells``: of each corrected field, by its name. ``tiles``: trained on, in all epochs. ``scores``: fields ->
    ``WHEN`` -> metrics."""

    cells: Mapping[str, int]
    tiles: int
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def to_markdown(self) -> str:
        """Return a line on what was corrected, and a table for each set of fields."""
        corrected = f"{plural(len(self.cells), 'corrected field')} with {plural(sum(self.cells.values()), 'cell')}"
        lines = [f"{corrected}, {plural(self.tiles, 'tile')} of training", ""]
        for fields, scores in self.scores.items():
            first = scores[WHEN[0]]
            lines += [f"**{fields}**: {first['n_images']} other fields, {first['n_true']} cells", ""]
            rows = [[when, *(column(scores[when]) for column in _COLUMNS.values())] for when in WHEN]
            lines += [*table(["", *_COLUMNS], rows), ""]
        return "\n".join(lines)


def read_loop(folder: Path) -> Loop:
    """Read ``folder``, as ``correct table`` takes it. Raises ``UsageError`` for a missing file, ``DataError`` for one
    that is not what it should be."""
    files = sorted(folder.glob("*/*/metrics.json"))
    fields = sorted({file.parent.name for file in files if file.parent.parent.name in WHEN})
    wanted = [folder / name for name in ("fields.csv", "config.json")]
    wanted += [folder / when / name / "metrics.json" for name in fields for when in WHEN]
    if not fields or (missing := [file for file in wanted if not file.is_file()]):
        raise UsageError(
            f"{folder}: {missing[0].relative_to(folder) if fields else 'before/FIELDS/metrics.json'} is missing; "
            "expected fields.csv, config.json, before/FIELDS/metrics.json and after/FIELDS/metrics.json"
        )
    scores = {name: {when: content_of(folder / when / name / "metrics.json") for when in WHEN} for name in fields}
    for name, both in scores.items():
        for when, metrics in both.items():
            if "recall_overlapping" not in metrics or "WBC" not in metrics.get("by_class", {}):
                where = folder / when / name / "metrics.json"
                raise DataError(f"{where}: expected an evaluation with --boxes and --classes RBC,WBC")
        if len({(metrics["n_images"], metrics["n_true"]) for metrics in both.values()}) > 1:
            raise DataError(f"{folder}: {name} before and after are not of the same fields; score both on the same")
    rows = csv.DictReader(read_text(folder / "fields.csv", "CSV image,cells").splitlines())
    try:
        cells = {row["image"]: int(row["cells"]) for row in rows}
        config = content_of(folder / "config.json")["config"]
        tiles = len(cells) * int(config["data"]["patches_per_image"]) * int(config["optim"]["epochs"])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder}: fields.csv or config.json is not what `correct play` and cellseg-train wrote ({error!r})"
        ) from error
    return Loop(cells, tiles, scores)


def play(out: Path, masks: Path) -> dict[str, int]:
    """Give each finished image of the run in ``out`` its label image in the folder ``masks`` as a confirmed correction.

    Cells of unknown outline (label 65535) become background. Returns the number of cells by image name. Raises
    ``DataError`` for an image without a label image, ``UsageError`` for a run that has corrections.
    """
    from cellseg_deploy.view.corrections import FOLDER, JOURNAL, Corrections
    from cellseg_deploy.view.source import open_source

    source = open_source(out)
    images = sorted((each for each in source.images.values() if each.labels), key=lambda each: each.name)
    stems = [stem_of(image.name) for image in images]
    found = by_partner(images_by_stem(masks), stems)
    if lonely := [image.name for image, stem in zip(images, stems, strict=True) if stem not in found]:
        raise DataError(f"{lonely[0]}: no label image of the same name in {masks}; add it, or run without that image")
    make_folder(out / FOLDER)
    with exclusive(out / FOLDER):
        if (out / JOURNAL).exists():
            raise UsageError(f"{out} has corrections already; take a run that nobody corrected")
        corrections = Corrections(out, source.classes)
        cells = {}
        for image, stem in zip(images, stems, strict=True):
            true = read_labels(found[stem])
            labels = renumber(np.where(true == IGNORED, 0, true).astype(np.int32))
            edited = corrections.image(image, dict)
            corrections.edit(image, edited, corrections.add_labels(image, labels, {}, as_edit=True))
            corrections.confirm(image, edited, value=True)
            cells[image.name] = int(labels.max(initial=0))
        corrections.save_labels(images, lambda _: {})
        corrections.close()
    return cells


@click.group("correct", context_settings=shared.SETTINGS)
def correct_command() -> None:
    """Correct, train, compare, with the truth as the corrector."""


@correct_command.command("play", context_settings=shared.SETTINGS)
@click.argument("out", metavar="OUT", type=shared.FOLDER)
@click.option("--masks", required=True, metavar="DIR", type=shared.FOLDER, help="True label images, by stem.")
def play_command(out: Path, masks: Path) -> None:
    """Correct every image of the run in OUT with its true labels. Prints CSV image,cells."""
    click.echo("image,cells")
    for name, cells in play(out, masks).items():
        click.echo(f"{name},{cells}")


@correct_command.command("table", context_settings=shared.SETTINGS)
@click.argument("folder", metavar="FOLDER", type=shared.FOLDER)
def table_command(folder: Path) -> None:
    """Print the scores before and after.

    FOLDER has fields.csv, printed by ``correct play``; config.json of the training; before/FIELDS/metrics.json and
    after/FIELDS/metrics.json, written by cellseg-evaluate with --boxes and --classes RBC,WBC.
    """
    click.echo(read_loop(folder).to_markdown())
