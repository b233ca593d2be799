"""Reader for napari: the output folder of a run as photographs, labels and tables. Needs no napari to be imported.

Of each image an Image layer and a Labels layer, whose features are the columns of cells.csv, by label. If the image was
corrected with ``cellseg-view``, its corrected labels are a layer of their own. A folder opens ``MOST_IMAGES`` images,
as every layer lies in memory; ``OUT/labels/NAME.tif`` opens one image alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellseg_deploy.view.source import Source, ViewedImage

MOST_IMAGES = 12
OUTLINE_PX = 2
_TRUTHS = {"true": True, "false": False}

Layer = tuple[Any, dict[str, Any], str]
"""Data, arguments and type of a layer, as napari takes them."""


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[Layer]] | None:
    """Return ``read`` if ``path`` is the output folder of a run, or a label image in one; otherwise None."""
    from cellseg_deploy.run.journal import JOURNAL

    if not isinstance(path, str):
        return None
    place = Path(os.path.abspath(path))  # noqa: PTH100  (links stay)
    return read if (place / JOURNAL).is_file() or _out_of(place) is not None else None


def read(path: str | Sequence[str]) -> list[Layer]:
    """Return the layers of the run in ``path``, or of the image whose label image ``path`` is.

    Only the first image is visible. Warns of images that are left out. Raises ``OutputError`` for a damaged run,
    ``DataError`` for an image that cannot be read, and ``UsageError`` if ``path`` belongs to no image of the run.
    """
    from cellseg_deploy.errors import UsageError
    from cellseg_deploy.view.source import open_source

    place = Path(os.path.abspath(path if isinstance(path, str) else path[0]))  # noqa: PTH100
    out = _out_of(place)
    source = open_source(place if out is None else out)
    images = [image for image in source.images.values() if image.entry is not None]
    if out is not None:
        images = [image for image in images if image.labels == place.relative_to(out).as_posix()]
        if not images:
            raise UsageError(f"{place}: belongs to no finished image of the run in {out}")
    elif len(images) > MOST_IMAGES:
        warnings.warn(
            f"the first {MOST_IMAGES} of {len(images)} images are opened; open labels/NAME.tif in {place} for another",
            stacklevel=2,
        )
    shown = images[:MOST_IMAGES]
    return [layer for number, image in enumerate(shown) for layer in _layers(source, image, visible=number == 0)]


def _out_of(place: Path) -> Path | None:
    """The output folder of the run whose label image ``place`` is, None if it is none."""
    from cellseg_deploy.run.journal import JOURNAL

    folders = (each.parent for each in place.parents if each.name == "labels")
    return next((out for out in folders if (out / JOURNAL).is_file()), None) if place.is_file() else None


def _layers(source: Source, image: ViewedImage, *, visible: bool) -> list[Layer]:
    from cellseg_deploy.images.read import read_image, read_labels
    from cellseg_deploy.view.corrections import FOLDER
    from cellseg_deploy.view.source import label_path

    common: dict[str, Any] = {"visible": visible, "metadata": {"image": image.name, "out": str(source.out)}}
    layers: list[Layer] = []
    if image.path is not None:
        pixels = read_image(image.path, source.reading).pixels_hwc
        layers.append((pixels, {**common, "name": image.name, "rgb": True}, "image"))
    if image.labels:
        about = {**common, "name": f"{image.name} cells", "features": _features(source, image), "contour": OUTLINE_PX}
        layers.append((read_labels(source.out / image.labels), about, "labels"))
    corrected = source.out / FOLDER / label_path(image)
    if corrected.is_file():
        about = {**common, "name": f"{image.name} corrected", "contour": OUTLINE_PX, "visible": False}
        layers.append((read_labels(corrected), about, "labels"))
    return layers


def _features(source: Source, image: ViewedImage) -> dict[str, list[Any]]:
    """Columns of cells.csv; ``index``: the label that a row belongs to, by which napari finds it."""
    from cellseg_deploy.cells.classes import CLASS
    from cellseg_deploy.outputs.segmented import LEFT_OUT_BY

    rows = source.cells_of(image)
    columns = {
        name: [row[name] if name in (CLASS, LEFT_OUT_BY) else _value(row[name]) for row in rows]
        for name in (rows[0] if rows else ())
    }
    return {"index": columns.get("label", []), **columns}


def _value(text: str) -> Any:
    """Return the number or truth that ``text``, of a column that has no words, stands for; NaN for no text."""
    if text in _TRUTHS:
        return _TRUTHS[text]
    return int(text) if text.lstrip("-").isdigit() else float(text or "nan")
