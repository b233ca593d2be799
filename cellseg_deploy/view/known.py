"""Classes of the corrected cells of a run, for whoever measures its corrected label images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cellseg_deploy.cells.measure import measure
from cellseg_deploy.errors import DataError
from cellseg_deploy.run.known_classes import KnownClasses, RecordedCells, folders_around, known_classes
from cellseg_deploy.view.corrections import FOLDER, JOURNAL, Corrections, numbered
from cellseg_deploy.view.source import open_source


def classes_around(labels: Path) -> KnownClasses | None:
    """Return ``known_classes`` of ``labels``, with the classes that a person corrected if they lie in OUT/corrections.

    Raises as it, and ``DataError`` if corrections no longer fit their labels.
    """
    of_run = known_classes(labels)
    for folder in folders_around(labels):
        if folder.name == FOLDER and (folder.parent / JOURNAL).is_file():
            return _corrected(folder.parent, of_run)
    return of_run


def _corrected(out: Path, of_run: KnownClasses | None) -> KnownClasses | None:
    source = open_source(out)
    corrections = Corrections(out, source.classes)
    if behind := corrections.behind:
        raise DataError(
            f"{out / JOURNAL}: edits of {', '.join(sorted(behind)[:3])} are not in the label images yet; open the "
            "folder with cellseg-view and end it, then measure"
        )
    if not corrections.class_names:
        return of_run
    images = {image.name: image for image in source.images.values()}

    def cells_of(name: str) -> RecordedCells | None:
        if name not in images or name not in corrections.recorded:
            return None if of_run is None else of_run.cells_of(name)
        labels, classes = numbered(corrections.image(images[name], lambda: source.classes_of(images[name])))
        table = measure(labels)
        known = [classes.get(number, ("", 1.0)) for number in range(1, len(table) + 1)]
        names, shares = zip(*known, strict=True) if known else ((), ())
        return RecordedCells(table.boxes, table.columns["area_px"], names, np.array(shares, np.float64))

    base = KnownClasses((), source.counting or None, "", cells_of) if of_run is None else of_run
    return replace(base, names=corrections.class_names, origin=f"the corrections in {out}", cells_of=cells_of)
