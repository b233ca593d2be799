"""``Segmenter.run_slide``: from a path to the files of a streamed image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule
from cellseg_deploy.errors import check_types
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.counting import SILENT, Progress, SlideElsewhere
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.slides.run import DEFAULT_KINDS, SlideResult, run_slide

_READ_DEFAULTS = ReadOptions()


class SlideCluster(Protocol):
    """Runs the network over images outside this process."""

    def slide(self, image: Path, reading: ReadOptions) -> SlideElsewhere:
        """Return what computes the bands of ``image``, read with ``reading``, for ``run_slide``."""


class SlideOptions(TypedDict, total=False):
    """Options of ``run_file``.

    ``region``: left, top, width, height in px of the pyramid's ``level``; None for all, and 0 for the full resolution.
    ``read``: for reading the file. ``save``, ``memory``, ``count_rule``, ``skip_blank``, ``overwrite``, ``progress``:
    see ``run_slide``. ``cluster``: see ``Segmenter.run``.
    """

    region: tuple[int, int, int, int] | None
    level: int
    read: ReadOptions
    save: Sequence[str]
    memory: int | None
    count_rule: CountRule
    skip_blank: bool
    overwrite: bool
    progress: Progress
    cluster: SlideCluster | None


def run_file(
    segmenter: Segmenter,
    image: str | Path,
    out: str | Path,
    *,
    region: tuple[int, int, int, int] | None = None,
    level: int = 0,
    read: ReadOptions = _READ_DEFAULTS,
    save: Sequence[str] = DEFAULT_KINDS,
    memory: int | None = None,
    count_rule: CountRule = DEFAULT_RULE,
    skip_blank: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    cluster: SlideCluster | None = None,
) -> SlideResult:
    """Open ``image``, and count the cells of it or a part into the folder ``out``; see ``run_slide``."""
    check_types("a path", image=image, out=out)
    check_types("a whole number", level=level)
    check_types("a whole number or None", memory=memory)
    check_types(ReadOptions, read=read)
    check_types("True or False", skip_blank=skip_blank, overwrite=overwrite)
    check_types("an open cluster (with open_cluster(...) as cluster) or None", cluster=cluster)
    check_apart([Path(image)], Path(out))
    reader = open_image(Path(image), read)
    try:
        return run_slide(
            segmenter,
            region_of(reader, level, region),
            Path(out),
            save=save,
            memory=memory,
            count_rule=count_rule,
            skip_blank=skip_blank,
            overwrite=overwrite,
            progress=progress,
            elsewhere=None if cluster is None else cluster.slide(Path(image), read),
        )
    finally:
        reader.close()
