"""Unattended runs over a folder of images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellseg_deploy.run.folder import RunOptions as RunOptions
    from cellseg_deploy.run.folder import plan_folder as plan_folder
    from cellseg_deploy.run.folder import run_folder as run_folder
    from cellseg_deploy.run.watch import watch_folder as watch_folder

__all__ = ["RunOptions", "plan_folder", "run_folder", "watch_folder"]

# Loaded on first access: a command's --help imports modules of this package without numpy.
_HOMES = {
    "RunOptions": "cellseg_deploy.run.folder",
    "plan_folder": "cellseg_deploy.run.folder",
    "run_folder": "cellseg_deploy.run.folder",
    "watch_folder": "cellseg_deploy.run.watch",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
