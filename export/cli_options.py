"""Shared by the commands of ``cellseg-export``: options, and checks that required packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError

if TYPE_CHECKING:
    from cellseg_deploy.images.mask_foreground import MaskForeground
    from cellseg_export.gate.verify import GateImages

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)

EPILOG = """\b
Exit codes: 0 done, 2 usage, 3 an image cannot be read, 4 no image found, 5 model refused, or the two forms do not
count the same (or too few cells were found to judge), 6 file cannot be written, 8 engine or device not available.
"""

images_option = click.option(
    "--images",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images to compare on; at least 200 cells in all.  [default: sample smears made by the package]",
)
unverified_option = click.option(
    "--unverified",
    is_flag=True,
    help="Write the model even if too few cells are found to judge (an untrained network), once the tensors agree.",
)
batch_option = click.option(
    "--tile-batch", type=click.IntRange(1), default=8, show_default=True, help="Tiles per network call."
)
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per core]")


def masks_option(function: F) -> F:
    """Add ``--masks``, and the option for which mask values are cells."""
    options = [
        click.option(
            "--masks",
            metavar="DIR",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Masks or label images of --images, paired by name: both forms are judged by them too.",
        ),
        console.mask_options,
    ]
    return console.with_options(function, options)


def gate_images(
    folder: Path | None, masks: Path | None = None, foreground: MaskForeground = "auto"
) -> GateImages | None:
    """Images of the gate from ``--images``, ``--masks`` and ``--mask-foreground``, None for the sample smears. Raises
    click's usage error."""
    if folder is None:
        if masks is not None:
            raise click.UsageError("--masks belong to --images; the truth of the sample smears is known")
        return None
    from cellseg_export.gate.verify import folder_images

    return folder_images(folder, masks, foreground)


def set_threads(threads: int | None) -> None:
    """Set the threads of PyTorch, if it is installed; an engine gets its own setting."""
    if threads is not None and importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)


def require_runtime() -> None:
    """Fail before the export, not after it, if no runtime is installed to check the result with."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailableError(
            "ONNX Runtime is not installed, and a model is written only after comparison with its source; run: "
            "pip install 'cellseg-deploy[cpu]' (or [gpu] on a machine with an NVIDIA GPU)"
        )
