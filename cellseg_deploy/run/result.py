"""The folder run as called from Python, and the outcome of each of its images."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.arguments import check_types
from cellseg_deploy.cells.count_rules import CountRule
from cellseg_deploy.cells.field_of_view import Field
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.outputs.formats import IMAGES_CSV
from cellseg_deploy.outputs.tables import format_cell, utf8
from cellseg_deploy.run.folder import run_folder
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import plan_of_engine


@dataclass(frozen=True)
class RunImage:
    """One image of a run. ``name``: its path in the folder. ``error``: why the image failed, empty if it is done.

    ``cells``: all cells found; ``counted``: cells that the count rule includes; both None if the image failed.
    ``warning``: remarks for the user, empty if there are none.
    """

    name: str
    error: str = ""
    warning: str = ""
    cells: int | None = None
    counted: int | None = None


@dataclass(frozen=True)
class FolderResult:
    """A run over a folder. ``images``: in order of name, done now or earlier. ``out``: the output folder.

    >>> result = model.run("photographs", out="counts")
    >>> [(image.name, image.cells > 0) for image in result.done], result.failed
    ([('a.png', True)], ())
    """

    images: tuple[RunImage, ...]
    out: Path

    @property
    def failed(self) -> tuple[RunImage, ...]:
        """Images that could not be segmented."""
        return tuple(image for image in self.images if image.error)

    @property
    def done(self) -> tuple[RunImage, ...]:
        """Images that were segmented."""
        return tuple(image for image in self.images if not image.error)

    @property
    def cells(self) -> int:
        """Cells found in all images."""
        return sum(image.cells or 0 for image in self.images)

    @property
    def counted(self) -> int:
        """Cells that the count rule includes, in all images."""
        return sum(image.counted or 0 for image in self.images)


def run(
    segmenter: Segmenter,
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    save: Sequence[str],
    read: ReadOptions,
    field: Field,
    count_rule: CountRule,
    overwrite: bool,
    follow_links: bool,
    on_image: Callable[[str], None],
) -> FolderResult:
    """See ``Segmenter.run``."""
    check_types("a path or a list of paths", images=paths)
    check_types("a path", out=out)
    check_types("a sequence of names", save=save)
    check_types(ReadOptions, read=read)
    check_types("True or False", overwrite=overwrite, follow_links=follow_links)
    check_types("a function", on_image=on_image)
    segmenter.backend.check_open()  # before a journal says that a run of this engine began
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    images = find_images([Path(path) for path in several], follow_links=follow_links)
    out = Path(out)
    options = RunOptions(
        save=tuple(save),
        overwrite=overwrite,
        max_pixels=read.max_pixels,
        bit_depth=read.bit_depth,
        pixel_size_um=read.pixel_size_um,
        count_rule=count_rule,
        field_of_view=field,
    )
    run_folder(
        segmenter,
        images,
        out,
        options=options,
        threads=plan_of_engine(segmenter.threads),
        on_result=lambda result: on_image(result.image),
    )
    return FolderResult(_rows(out / IMAGES_CSV, [image.name for image in images]), out)


def _rows(table: Path, names: Sequence[str]) -> tuple[RunImage, ...]:
    """Rows of ``table``, an images.csv, for the images ``names``: it may also have rows of earlier images."""
    by_text = {utf8(format_cell(name)): name for name in names}
    with table.open(encoding="utf-8", newline="") as file:
        return tuple(
            RunImage(
                by_text[row["image"]],
                row["error"] or ("failed" if row["status"] == "failed" else ""),
                row["warning"],
                *(int(row[name]) if row[name] else None for name in ("cells", "counted")),
            )
            for row in csv.DictReader(file)
            if row["image"] in by_text
        )
