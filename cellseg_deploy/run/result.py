"""The folder run as called from Python, and the outcome of each of its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.errors import check_types
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run.elsewhere import Elsewhere
from cellseg_deploy.run.folder import run_folder
from cellseg_deploy.run.record import ImageResult, RunOptions
from cellseg_deploy.segmenter import Segmenter


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
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    options: RunOptions,
    *,
    follow_links: bool,
    on_image: Callable[[str], None],
    cluster: Elsewhere | None,
) -> FolderResult:
    """See ``Segmenter.run``."""
    check_types("a path or a list of paths", images=images)
    check_types("a path", out=out)
    check_types(ReadOptions, read=options.reading)
    check_types("True or False", report=options.report, overwrite=options.overwrite, follow_links=follow_links)
    check_types("a function", on_image=on_image)
    check_types("an open cluster (with open_cluster(...) as cluster) or None", cluster=cluster)
    segmenter.backend.check_open()  # before a journal says that a run of this engine began
    paths = [images] if isinstance(images, (str, os.PathLike)) else images
    out = Path(out)
    summary = run_folder(
        segmenter,
        find_images([Path(path) for path in paths], follow_links=follow_links),
        out,
        options=options,
        threads=thread_plans.plan_of_engine(segmenter.threads),
        on_result=lambda result: on_image(result.image),
        elsewhere=cluster,
    )
    return FolderResult(tuple(_of(summary.images[name]) for name in sorted(summary.images)), out)


def _of(result: ImageResult) -> RunImage:
    error = result.error or ("failed" if result.status == "failed" else "")
    return RunImage(result.image, error, result.warning, result.cells, result.counted)
