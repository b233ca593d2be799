"""``--masks``: label images of any program, paired with what they belong to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.annotations.labels import as_label_images
from cellseg_deploy.cli import console
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.images.read import Pair, pair_by_stem, read_labels


@dataclass(frozen=True)
class Paired:
    """``pairs``: as of ``pair_by_stem``. ``said``: what was read from files that are no label images."""

    pairs: list[Pair]
    said: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """The entry for a report; empty for plain label images."""
        return {"read": list(self.said)} if self.said else {}


@contextmanager
def label_pairs(judged: Path, masks: Path, *, are_labels: bool = False, quiet: bool = False) -> Iterator[Paired]:
    """Pair the folder ``judged`` with ``masks``, which may be files of any kind in ``annotations.labels``.

    Label images made from them exist until the block ends. ``are_labels``: ``judged`` holds cells, not
    photographs, in any format if ``masks`` are label images. Says what was read, unless ``quiet``. Raises as
    ``as_label_images`` and ``pair_by_stem``.
    """
    with ExitStack() as stack:

        def place() -> Path:
            return stack.enter_context(workspace(Path(tempfile.gettempdir())))

        size_of = _size_of_labels if are_labels else None
        said = list[str]()
        if are_labels:
            made = as_label_images(masks, judged, place, size_of)
            judged = made.folder
            said += made.said
        made = as_label_images(judged, masks, place, size_of)
        said += made.said
        for line in () if quiet else said:
            console.say(console.printable(line))
        yield Paired(pair_by_stem(judged, made.folder), tuple(said))


def _size_of_labels(path: Path) -> tuple[int, int]:
    height, width = read_labels(path).shape
    return height, width
