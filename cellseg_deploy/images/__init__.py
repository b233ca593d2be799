"""From a path to uint8 RGB pixels or to labels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellseg_deploy.images.find import FoundImage as FoundImage
    from cellseg_deploy.images.find import find_images as find_images
    from cellseg_deploy.images.options import MAX_PIXELS as MAX_PIXELS
    from cellseg_deploy.images.options import ReadOptions as ReadOptions
    from cellseg_deploy.images.read import pair_by_stem as pair_by_stem
    from cellseg_deploy.images.read import read_image as read_image
    from cellseg_deploy.images.read import read_labels as read_labels

__all__ = ["MAX_PIXELS", "FoundImage", "ReadOptions", "find_images", "pair_by_stem", "read_image", "read_labels"]

# Loaded on first access: a command's --help imports modules of this package without numpy.
_HOMES = {
    "FoundImage": "cellseg_deploy.images.find",
    "MAX_PIXELS": "cellseg_deploy.images.options",
    "ReadOptions": "cellseg_deploy.images.options",
    "find_images": "cellseg_deploy.images.find",
    "pair_by_stem": "cellseg_deploy.images.read",
    "read_image": "cellseg_deploy.images.read",
    "read_labels": "cellseg_deploy.images.read",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
