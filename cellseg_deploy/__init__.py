"""Cell segmentation from a model file to counts, without PyTorch.

>>> from cellseg_deploy import Segmenter
>>> segmentation = Segmenter.load()("smear.png")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellseg_deploy.backends import EngineOptions, open_backend
    from cellseg_deploy.errors import CellsegError
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.models.spec import ModelSpec
    from cellseg_deploy.segmenter import Segmentation, Segmenter

    __version__: str

__all__ = [
    "CellsegError",
    "EngineOptions",
    "ModelSpec",
    "ReadOptions",
    "Segmentation",
    "Segmenter",
    "__version__",
    "open_backend",
]

# Loaded when first asked for, so that `cellseg-infer --help` and `import cellseg_deploy` cost nothing.
_HOMES = {
    "CellsegError": "cellseg_deploy.errors",
    "EngineOptions": "cellseg_deploy.backends",
    "ModelSpec": "cellseg_deploy.models.spec",
    "ReadOptions": "cellseg_deploy.images.options",
    "Segmentation": "cellseg_deploy.segmenter",
    "Segmenter": "cellseg_deploy.segmenter",
    "open_backend": "cellseg_deploy.backends",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cellseg-deploy")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
