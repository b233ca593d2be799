"""What a viewer opened: a run of cellseg-infer, or images that were not counted yet."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.classes import CLASS, CLASS_PROBABILITY
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule
from cellseg_deploy.cells.field_of_view import Field
from cellseg_deploy.errors import CellsegError, NothingToDoError, OutputError, UsageError
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.images.find import find_images, input_roots
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.outputs.names import LABEL_SUFFIX, output_names
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.journal import JOURNAL, Entry
from cellseg_deploy.run.output_folder import RUN_JSON
from cellseg_deploy.run.repeat import RecordedRun, read_run
from cellseg_deploy.run.tables import BY_CLASS, WARNINGS, cell_columns

UPLOADS = "uploads"
"""Folder in OUT for images that were dragged into the page."""


@dataclass(frozen=True)
class ViewedImage:
    """One image. ``id``: its name in addresses, made from ``name``. ``path``: the file, None if it is not there.

    ``output_name``: name of its files in OUT without suffix. ``labels``: its label image, relative to OUT, empty if it
    has none yet. ``entry``: its line in the run's journal. ``result``: of that line. ``error``: why it failed.
    """

    id: str
    name: str
    path: Path | None
    output_name: str
    labels: str = ""
    entry: Entry | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def warnings(self) -> dict[str, str]:
        """Kind of warning -> text."""
        return dict(self.result.get(WARNINGS, {}))


@dataclass
class Source:
    """``out``: folder of the run, where ``corrections/`` goes. ``inputs``: files and folders of the images.

    ``is_run``: whether it is a run. ``recorded``: its model and settings, None if they are unknown. ``classes``,
    ``counting``: names of the model's classes, and of those that count. ``images``: by id, in order of name.
    """

    out: Path
    inputs: tuple[str, ...]
    images: dict[str, ViewedImage]
    is_run: bool = False
    recorded: RecordedRun | None = None
    classes: tuple[str, ...] = ()
    counting: tuple[str, ...] = ()
    reading: ReadOptions = field(default_factory=ReadOptions)
    count_rule: CountRule = DEFAULT_RULE
    field_of_view: Field = "auto"

    def cells_of(self, image: ViewedImage) -> list[dict[str, str]]:
        """Rows of cells.csv of ``image``, as text by column; empty without a run."""
        if image.entry is None:
            return []
        (record,) = journals.whole_records(self.out / JOURNAL, [image.entry])
        columns = cell_columns([image.entry])
        return [dict(zip(columns, row, strict=True)) for row in csv.reader(record.cells.splitlines())]

    def classes_of(self, image: ViewedImage) -> dict[int, tuple[str, float]]:
        """Class and its probability by label, as the run found them; empty without classes."""
        if not self.classes:
            return {}
        return {int(row["label"]): (row[CLASS], float(row[CLASS_PROBABILITY])) for row in self.cells_of(image)}


def open_source(path: Path, out: Path | None = None) -> Source:
    """Open ``path``: the folder of a run, a folder that an earlier viewer made, or images (a file or a folder).

    ``out``: where corrections of images without a run go, None for NAME-view beside them. Raises ``UsageError``,
    ``OutputError`` for a damaged run, ``NothingToDoError`` without images.
    """
    if (path / JOURNAL).is_file():
        if out is not None:
            raise UsageError(f"{path} is a run, whose corrections go into it; leave out the output folder")
        return _of_run(path)
    viewed = content_of(path / "view.json").get("inputs")
    if isinstance(viewed, list) and out is None:
        return _of_images([Path(str(each)) for each in viewed], path)
    if out is None:
        absolute = Path(os.path.abspath(path))  # noqa: PTH100  (links stay)
        out = absolute.with_name(f"{absolute.stem if absolute.is_file() else absolute.name}-view")
    return _of_images([path], out)


def image_id(name: str) -> str:
    """Return the id of the image ``name``: hexadecimal digits, which tell nothing about folders."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def uploaded(out: Path, name: str) -> ViewedImage:
    """Return the image that was uploaded as ``name``, a file in ``UPLOADS``."""
    return ViewedImage(image_id(f"{UPLOADS}/{name}"), f"{UPLOADS}/{name}", out / UPLOADS / name, f"{UPLOADS}/{name}")


def _of_run(out: Path) -> Source:
    content = journals.read(out / JOURNAL)
    said = content_of(out / RUN_JSON).get("inputs", {})
    paths = [Path(path) for path in said.get("paths", content.identity.inputs)]
    files: dict[str, Path] = {}
    if present := [path for path in paths if os.path.lexists(path)]:
        # Names begin with their folder's name if several were given, so all roots must be known for that.
        together = len(present) == len(paths) or len(input_roots(present)) == len(content.identity.inputs)
        found = find_images(present, follow_links=bool(said.get("follow_links")), is_silent=True) if together else []
        files = {image.name: image.path for image in found if not image.problem}
    images = []
    for name, entry in sorted(content.entries.items()):
        record = entry.record
        labels = next((file.path for file in record.outputs if file.path.startswith("labels/")), "")
        images.append(
            ViewedImage(
                image_id(name),
                name,
                files.get(name),
                record.output_name or name,
                labels,
                entry if record.status == "done" else None,
                record.result,
                str(record.result.get("error", "")),
            )
        )
    if not images:
        raise NothingToDoError(f"{out}: the run has no image yet")
    try:
        recorded = read_run(out / RUN_JSON)
    except CellsegError:  # without the model relabelling is unavailable; everything else works
        recorded = None
    settings = content.identity.settings
    classes = next((tuple(image.result[BY_CLASS]) for image in images if BY_CLASS in image.result), ())
    return Source(
        out=out,
        inputs=tuple(map(str, paths)),
        images={image.id: image for image in [*images, *_uploads(out)]},
        is_run=True,
        recorded=recorded,
        classes=classes,
        counting=tuple(settings.get("classes", classes)),
        reading=ReadOptions(bit_depth=settings.get("bit_depth"), pixel_size_um=settings.get("pixel_size_um")),
        count_rule=settings.get("count_rule", DEFAULT_RULE),
        field_of_view=settings.get("field_of_view", "auto"),
    )


def _of_images(paths: list[Path], out: Path) -> Source:
    found = find_images(paths)
    if not found:
        raise NothingToDoError(f"{', '.join(map(str, paths))}: no image found, and no run of cellseg-infer")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: a file, where the folder for corrections should go; choose another one")
    names = output_names([image.name for image in found])
    images = [
        ViewedImage(image_id(each.name), each.name, each.path, names[each.name], error=each.problem) for each in found
    ]
    inputs = tuple(os.path.abspath(path) for path in paths)  # noqa: PTH100
    return Source(out=out, inputs=inputs, images={image.id: image for image in [*images, *_uploads(out)]})


def _uploads(out: Path) -> list[ViewedImage]:
    folder = out / UPLOADS
    files = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    return [
        uploaded(out, file.name)
        for file in files
        if file.is_file() and not file.is_symlink() and not file.name.startswith(".")
    ]


def original_of(source: Source, name: str, recorded: str) -> Path | None:
    """Return the photograph of the image ``name``; ``recorded``: where it was when it was corrected. None if lost."""
    found = next((image.path for image in source.images.values() if image.name == name), None)
    places = [path for path in (found, Path(recorded) if recorded else None) if path is not None]
    return next((path for path in places if path.is_file()), None)


def label_path(image: ViewedImage) -> str:
    """Return the path in ``corrections/`` of the corrected label image of ``image``."""
    return f"{image.output_name}{LABEL_SUFFIX}"
