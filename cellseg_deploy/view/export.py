"""The corrected cells of images as the files that a run writes: label images, ROIs, GeoJSON, overlays and tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.count_rules import CountRule
from cellseg_deploy.cells.field_of_view import Mask
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.images.read import LoadedImage
from cellseg_deploy.outputs.formats import CELLS_CSV, IMAGES_CSV, chosen_formats
from cellseg_deploy.outputs.segmentation import Segmentation, of_labels
from cellseg_deploy.run import tables
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.journal import Journal
from cellseg_deploy.run.output_folder import make_place
from cellseg_deploy.run.record import program
from cellseg_deploy.segmenter import as_read
from cellseg_deploy.view.corrections import numbered
from cellseg_deploy.view.edited import EditedImage

FOLDER = "corrected"
KINDS = ("labels", "overlays", "numbered", "rois", "geojson", "coco")
_MODEL = "corrected by hand"


def segmentation(
    edited: EditedImage,
    loaded: LoadedImage,
    *,
    names: tuple[str, ...],
    counting: tuple[str, ...],
    field: Mask | None,
    scale: float,
    model_cell_px: float | None,
    name: str,
    count_rule: CountRule,
) -> Segmentation:
    """Return the cells of ``edited`` as those of a run. ``names``: of classes, empty for none.

    A cell without a class gets the first one.
    """
    labels, class_of = numbered(edited)
    table = measure(labels)
    classes = None
    if names:
        said = [class_of.get(number, (names[0], 0.0)) for number in range(1, len(table) + 1)]
        classes = CellClasses(
            names,
            counting,
            np.array([names.index(each) for each, _ in said], np.int64),
            np.array([probability for _, probability in said], np.float64),
        )
    found = of_labels(
        *(labels, table, loaded.pixels_hwc),
        field=field,
        classes=classes,
        model=_MODEL,
        scale=scale,
        model_cell_px=model_cell_px,
    )
    return as_read(found, loaded, name=name, count_rule=count_rule)


def write(
    out: Path,
    kinds: Sequence[str],
    images: Sequence[tuple[str, str]],
    cells: Callable[[int], tuple[Segmentation, LoadedImage]],
) -> list[str]:
    """Write the files of ``kinds`` of each of ``images`` (name, output name), and the tables, to ``out/FOLDER``.

    ``cells(index)``: its corrected cells. Returns the paths relative to ``out``. Raises ``UsageError`` for an unknown
    kind, ``BackendUnavailableError`` for a missing package, ``OutputError``.
    """
    formats = [format for format in chosen_formats(list(kinds)) if format.folder]
    written = []
    identity = RunIdentity(program(), {}, {}, "", {}, {}, tuple(kinds), {}, ())
    with tempfile.TemporaryDirectory() as folder, Journal.create(Path(folder), identity) as journal:
        entries = []
        for index, (_, output_name) in enumerate(images):
            found, loaded = cells(index)
            for format in formats:
                relative = f"{FOLDER}/{format.place(output_name)}"
                write_bytes(make_place(out, relative), format.encode(found.segmented))
                written.append(relative)
            record = tables.done(
                found.segmented, source=loaded.source, output_name=output_name, outputs=(), notes=found.notes
            )
            entries.append(journal.append(record))
        for name in (CELLS_CSV, IMAGES_CSV):
            relative = f"{FOLDER}/{name}"
            tables.write(make_place(out, relative), name, journal.path, entries)
            written.append(relative)
    return written
