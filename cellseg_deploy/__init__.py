"""Cell segmentation from a model file to counts, without PyTorch; see docs/api.md.

>>> import cellseg_deploy as cs
>>> with cs.Segmenter.load() as model:
...     cells = model("smear.png")
>>> cells.count > 0
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellseg_deploy import parity as parity
    from cellseg_deploy.backends import EngineOptions, open_backend
    from cellseg_deploy.cluster.engine import open_cluster
    from cellseg_deploy.errors import CellsegError
    from cellseg_deploy.evaluate.api import Evaluation as Evaluation
    from cellseg_deploy.evaluate.api import evaluate as evaluate
    from cellseg_deploy.images.options import ReadOptions
    from cellseg_deploy.models.spec import ModelSpec
    from cellseg_deploy.outputs.segmentation import Segmentation
    from cellseg_deploy.run.result import FolderResult as FolderResult
    from cellseg_deploy.segmenter import Segmenter

    __version__: str

__all__ = [
    "CellsegError",
    "EngineOptions",
    "Evaluation",
    "FolderResult",
    "ModelSpec",
    "ReadOptions",
    "Segmentation",
    "Segmenter",
    "__version__",
    "evaluate",
    "open_backend",
    "open_cluster",
    "parity",
]

# Loaded when first asked for, so that `cellseg-infer --help` and `import cellseg_deploy` cost nothing.
_HOMES = {
    "CellsegError": "cellseg_deploy.errors",
    "EngineOptions": "cellseg_deploy.backends",
    "Evaluation": "cellseg_deploy.evaluate.api",
    "FolderResult": "cellseg_deploy.run.result",
    "ModelSpec": "cellseg_deploy.models.spec",
    "ReadOptions": "cellseg_deploy.images.options",
    "Segmentation": "cellseg_deploy.outputs.segmentation",
    "Segmenter": "cellseg_deploy.segmenter",
    "open_backend": "cellseg_deploy.backends",
    "open_cluster": "cellseg_deploy.cluster.engine",
}
_ROOMS = ("evaluate", "parity")  # the first is also a function


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cellseg-deploy")
    if name in _ROOMS:
        return import_module(f"cellseg_deploy.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
