"""Classes of the cells in a run's label images, which hold numbers only: from the journal or the tables beside them.

A cell belongs to the recorded cell whose box overlaps its own best, by half at least (intersection over union); equal
overlaps are decided by area. No two cells belong to one recorded cell. Numbers are not used: programs that edit label
images number the cells differently.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.annotations.read import ImageNames
from cellseg_deploy.cells.classes import CLASS, CLASS_PROBABILITY, Floats
from cellseg_deploy.cells.label_runs import Ints
from cellseg_deploy.cells.measure import CellTable
from cellseg_deploy.errors import DataError
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.files.text import read_text
from cellseg_deploy.outputs.formats import CELLS_CSV
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.journal import JOURNAL
from cellseg_deploy.run.tables import BY_CLASS, cell_columns

MIN_IOU = 0.5
_SIDES = tuple(f"bbox_{side}_px" for side in ("left", "top", "width", "height"))
_COLUMNS = ("image", "area_px", *_SIDES, CLASS)


@dataclass(frozen=True)
class RecordedCells:
    """Cells of one image. ``boxes``: left, top, width, height, int64 (n, 4); ``areas``: px, int64 (n,).

    ``classes``: n names. ``probability``: float64 (n,), of the class. ``sha256``: of their label image, "" if unknown.
    """

    boxes: Ints
    areas: Ints
    classes: tuple[str, ...]
    probability: Floats
    sha256: str = ""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]], sha256: str = "") -> RecordedCells:
        """Return the cells of ``rows`` of cells.csv. Raises ``ValueError`` for a number that is none."""
        numbers = np.array([[int(row[name]) for name in ("area_px", *_SIDES)] for row in rows], np.int64).reshape(-1, 5)
        probability = np.array([float(row.get(CLASS_PROBABILITY) or 1) for row in rows])
        return cls(numbers[:, 1:], numbers[:, 0], tuple(row[CLASS] for row in rows), probability, sha256)

    def match(self, table: CellTable) -> list[tuple[str, float]]:
        """Return class and probability of each cell of ``table``, "" and 1 for cells that match none of these."""
        unchanged = dict[tuple[int, ...], list[int]]()
        for row, (box, area) in enumerate(zip(self.boxes.tolist(), self.areas.tolist(), strict=True)):
            unchanged.setdefault((*box, area), []).append(row)
        cells = list(zip(table.boxes.tolist(), table.columns["area_px"].tolist(), strict=True))
        row_of = dict[int, int]()
        for cell, (box, area) in enumerate(cells):
            if rows := unchanged.get((*box, area)):
                row_of[cell] = rows.pop(0)
        free = np.ones(len(self.areas), np.bool_)
        free[list(row_of.values())] = False
        pairs = [
            (*rank, cell, row)
            for cell, (box, area) in enumerate(cells)
            if cell not in row_of
            for rank, row in self._alike(box, area, free)
        ]
        for *_, cell, row in sorted(pairs):
            if free[row] and cell not in row_of:
                row_of[cell], free[row] = row, False
        found = [row_of.get(cell) for cell in range(len(cells))]
        return [("", 1.0) if row is None else (self.classes[row], float(self.probability[row])) for row in found]

    def _alike(
        self, box: Sequence[int], area: int, free: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[tuple[float, int], int]]:
        """Yield each row of ``free`` that may be the cell, after its rank: the smallest fits best."""
        (left, top, width, height), (x, y, w, h) = self.boxes.T, box
        common = np.maximum(np.minimum(left + width, x + w) - np.maximum(left, x), 0)
        common *= np.maximum(np.minimum(top + height, y + h) - np.maximum(top, y), 0)
        iou = common / (width * height + w * h - common)
        for row in np.flatnonzero(free & (iou >= MIN_IOU)).tolist():
            known = int(self.areas[row])
            if 0.5 <= area / max(known, 1) <= 2:  # a cell merged with a platelet is no platelet
                yield (-float(iou[row]), abs(known - area)), row


NONE_RECORDED = RecordedCells.of(())


@dataclass(frozen=True)
class KnownClasses:
    """``names``: all classes, in the order of the model. ``counting``: those that counted there, None if that is
    unknown. ``origin``: where the classes come from, for people. ``cells_of``: the cells of an image by its name, None
    if the image is not known there."""

    names: tuple[str, ...]
    counting: tuple[str, ...] | None
    origin: str
    cells_of: Callable[[str], RecordedCells | None]


def known_classes(labels: Path) -> KnownClasses | None:
    """Return the classes that a run recorded for the label images ``labels``, a file or a folder in its output folder.

    A cells.csv without a run must lie beside the label images or beside the folder ``labels`` that they are in: another
    one above may be of anything. None if neither is there, or the model tells no classes apart. Raises ``OutputError``
    or ``DataError`` if it is there and cannot be read.
    """
    for folder in folders_around(labels):
        if (folder / JOURNAL).is_file():
            return _of_journal(folder)
        inside = _folder_of(labels).relative_to(folder).parts
        if inside[:1] in ((), ("labels",)) and (folder / CELLS_CSV).is_file():
            return _of_table(folder / CELLS_CSV)
    return None


def folders_around(labels: Path) -> tuple[Path, ...]:
    """The folder of ``labels``, absolute, and those above that may be a run's: label images lie in OUT/labels/SUB."""
    here = _folder_of(labels)
    return (here, *here.parents)[:4]


def _folder_of(labels: Path) -> Path:
    return labels.absolute() if labels.is_dir() else labels.absolute().parent


def is_edited(file: Path, cells: RecordedCells) -> bool:
    """Whether the label image ``file`` may differ from the one whose ``cells`` were recorded."""
    try:
        return not cells.sha256 or sha256_of(file) != cells.sha256
    except OSError:
        return True


def _same_image(known: ImageNames, image: str, place: Path) -> str | None:
    """Return the name in ``known`` of ``image``; one of the same name in another folder is another image."""
    name = known.find(image, str(place))
    alike = name is not None and (f"/{name}".endswith(f"/{image}") or f"/{image}".endswith(f"/{name}"))
    return name if alike else None


def _of_journal(out: Path) -> KnownClasses | None:
    content = journals.read(out / JOURNAL)
    done = {name: entry for name, entry in content.entries.items() if BY_CLASS in entry.record.result}
    if not done:
        return None
    names = tuple(next(iter(done.values())).record.result[BY_CLASS])
    columns = cell_columns(list(done.values()))
    known = ImageNames(done)

    def cells_of(image: str) -> RecordedCells | None:
        name = _same_image(known, image, out / JOURNAL)
        if name is None:
            return None
        (record,) = journals.whole_records(out / JOURNAL, [done[name]])
        rows = [dict(zip(columns, row, strict=True)) for row in csv.reader(record.cells.splitlines())]
        sha256 = next((file.sha256 for file in record.outputs if file.path.startswith("labels/")), "")
        return RecordedCells.of(rows, sha256)

    counting = content.identity.settings.get("classes")
    return KnownClasses(names, tuple(counting) if counting else None, f"the run in {out}", cells_of)


def _of_table(table: Path) -> KnownClasses | None:
    reader = csv.DictReader(read_text(table, "a table of cells").splitlines())
    if CLASS not in (reader.fieldnames or ()):
        return None
    if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
        raise DataError(f"{table}: no column {', '.join(missing)}; expected a cells.csv as a run writes it")
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in reader:
        by_image.setdefault((row["image"] or "").removeprefix("'"), []).append(row)
    try:
        cells = {image: RecordedCells.of(rows) for image, rows in by_image.items()}
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{table}: was changed and cannot be read ({error}); give the one that the run wrote"
        ) from error
    known = ImageNames(cells)

    def cells_of(image: str) -> RecordedCells | None:
        name = _same_image(known, image, table)
        return None if name is None else cells[name]

    names = tuple(dict.fromkeys(name for each in cells.values() for name in each.classes))
    return KnownClasses(tuple(sorted(names)), None, str(table), cells_of)
