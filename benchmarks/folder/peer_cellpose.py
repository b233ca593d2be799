"""Cellpose 4 in a worker: its network alone, with its masks, and its masks alone from the flows of true cells.

Without its weights, which cannot be had from a package index, the network has random ones: its time is the same, what
it finds is noise. Masks made of noise take another time than masks of cells, so what a trained network would leave to
do is timed apart, from the flows that Cellpose itself computes of the true cells.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy.errors import BackendUnavailableError

CELL_PX = 30.0
"""Diameter that Cellpose brings cells to."""
_TRUE_FLOW, _TRUE_LOGIT = 5.0, 6.0  # its network is taught 5 times the flow; a logit of 6 is a sure cell
_STEPS = 200  # of the flow, at 30 px cells; Cellpose takes more the larger the image is


def subject(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """``images``: .npy files of RGB uint8 (h, w, 3). ``labels``: .npy of the first one's true cells. ``diameter``: of
    cells in them, px. ``weights``: file of a Cellpose 4 model, None for random ones."""
    try:
        import torch
        from cellpose import dynamics, models
    except ImportError as error:
        raise BackendUnavailableError(f"Cellpose cannot be imported ({error}): pip install cellpose") from error
    number = version("cellpose")
    if int(number.partition(".")[0]) < 4:
        raise BackendUnavailableError(f"Cellpose {number} is installed, expected 4: pip install -U cellpose")
    logging.getLogger("cellpose").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="cellseg-cellpose-") as folder:
        file = weights or str(random_weights(Path(folder) / "random"))
        model = models.CellposeModel(pretrained_model=file, device=torch.device(device))
    arrays = [np.load(path) for path in images]

    def run(compute_masks: bool) -> None:
        for image in arrays:
            model.eval(image, diameter=diameter, compute_masks=compute_masks)

    calls: dict[str, Callable[[], object]] = {"network": lambda: run(False), "network and masks": lambda: run(True)}
    if labels is not None:
        true = np.load(labels)
        flows = dynamics.labels_to_flows([true.astype(np.int32)])[0]
        inside = np.where(true > 0, _TRUE_LOGIT, -_TRUE_LOGIT).astype(np.float32)
        steps = int(_STEPS * diameter / CELL_PX)

        def masks() -> None:
            for _ in arrays:
                dynamics.compute_masks(_TRUE_FLOW * flows[2:4], inside, niter=steps, device=model.device)

        calls["masks of true cells"] = masks
    return Subject(
        calls=calls,
        facts={
            "library": f"Cellpose {number}",
            "details": f"{type(model.net).__name__}, {str(model.net.dtype).removeprefix('torch.')}, "
            f"{'given' if weights else 'random'} weights, cells brought to {CELL_PX:g} px",
            "images": len(arrays),
        },
        sync=torch.cuda.synchronize if device != "cpu" else lambda: None,
    )


def random_weights(path: Path) -> Path:
    """A file of the network with random weights, as ``CellposeModel`` reads it."""
    import torch

    torch.manual_seed(0)
    _network()().save_model(str(path))
    return path


def _network() -> Any:
    """The class of the network, whose name changed within version 4."""
    try:
        from cellpose.vit import CPSAM

        return CPSAM
    except ImportError:
        from cellpose.vit_sam import Transformer

        return Transformer
