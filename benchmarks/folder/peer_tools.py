"""Other tools in a worker, for ``peers``: one function each, with the same signature.

Cellpose 4: the network alone, the network with its masks, and the masks alone from the flows of true cells. Its weights
are not available from a package index; without them the network has random weights: same time, meaningless output.
Masks of noise do not take the same time as masks of cells, so the work after a trained network is timed separately,
from the flows that Cellpose itself computes of the true cells.

StarDist and InstanSeg: the networks alone, with random weights, at the cell size that their models are made for.
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
from cellseg_deploy.samples.params import RED_CELL_DIAMETER_UM
from cellseg_deploy.segmenter import resize

CELL_PX = 30.0
"""Diameter to which cells are scaled for Cellpose and StarDist; nuclei of StarDist's published models are similar."""
_TRUE_FLOW, _TRUE_LOGIT = 5.0, 6.0  # Cellpose trains on 5 times the flow; a logit of 6 is a certain cell
_STEPS = 200  # of the flow, at 30 px cells; Cellpose takes more the larger the image is
RAYS, GRID = 32, (2, 2)  # of StarDist's model for stained tissue
MICROMETRES_PER_PX = 0.5
LAYERS, OUTPUTS = [256, 128, 64, 32], [[2, 2, 1]]  # defaults of InstanSeg's training: coordinates, sigmas, seeds
_MULTIPLE = 8  # of its three poolings


def cellpose(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """``images``: .npy files of RGB uint8 (h, w, 3). ``labels``: .npy of the first image's true cells. ``diameter``: of
    its cells, px. ``weights``: file of a Cellpose 4 model, None for random weights."""
    try:
        import torch
        from cellpose import dynamics, models

        from cellseg_train.fp32 import full_fp32
    except ImportError as error:
        raise BackendUnavailableError(f"Cellpose cannot be imported ({error}): pip install cellpose") from error
    number = version("cellpose")
    if int(number.partition(".")[0]) < 4:
        raise BackendUnavailableError(f"Cellpose {number} is installed, expected 4: pip install -U cellpose")
    logging.getLogger("cellpose").setLevel(logging.ERROR)
    full_fp32()
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
    """Write a file of the network with random weights, as read by ``CellposeModel``."""
    import torch

    torch.manual_seed(0)
    _network()().save_model(str(path))
    return path


def _network() -> Any:
    """The network's class, whose name changed within version 4."""
    try:
        from cellpose.vit import CPSAM

        return CPSAM
    except ImportError:
        from cellpose.vit_sam import Transformer

        return Transformer


def stardist(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """As ``cellpose``, without masks: the search among random candidates would not end."""
    del labels
    if weights is not None or device != "cpu":
        raise BackendUnavailableError("StarDist is timed here on the CPU and with random weights only")
    try:
        import tensorflow as tf
        from stardist.models import Config2D, StarDist2D
    except ImportError as error:
        raise BackendUnavailableError(
            f"StarDist cannot be imported ({error}): pip install stardist tensorflow-cpu"
        ) from error
    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    model = StarDist2D(Config2D(n_rays=RAYS, grid=GRID, n_channel_in=3), name=None, basedir=None)
    arrays = [resize(np.load(path), CELL_PX / diameter).astype(np.float32) / 255 for path in images]

    def network() -> None:
        for image in arrays:
            model.predict(image)

    return Subject(
        calls={"network": network},
        facts={
            "library": f"StarDist {version('stardist')}",
            "details": f"U-Net, {RAYS} rays, float32, random weights, cells brought to {CELL_PX:g} px",
            "images": len(arrays),
        },
    )


def instanseg(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """As ``cellpose``, without masks: random weights say nothing about their time."""
    del labels
    if weights is not None:
        raise BackendUnavailableError("InstanSeg is timed here with random weights only")
    try:
        import torch
        from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet

        from cellseg_train.fp32 import full_fp32
    except ImportError as error:
        raise BackendUnavailableError(f"InstanSeg cannot be imported ({error}): pip install instanseg-torch") from error
    full_fp32()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = InstanSeg_UNet(3, OUTPUTS, layers=LAYERS).eval().to(device)
    scale = RED_CELL_DIAMETER_UM / MICROMETRES_PER_PX / diameter
    arrays = [_padded(resize(np.load(path), scale)) for path in images]

    def network() -> None:
        with torch.inference_mode():
            for image in arrays:
                net(torch.from_numpy(image).to(device)).cpu()

    return Subject(
        calls={"network": network},
        facts={
            "library": f"InstanSeg {version('instanseg-torch')}",
            "details": f"U-Net, float32, random weights, {MICROMETRES_PER_PX:g} micrometres a px: cells of "
            f"{scale * diameter:.0f} px",
            "images": len(arrays),
        },
        sync=torch.cuda.synchronize if device != "cpu" else lambda: None,
    )


def _padded(image_hwc: np.ndarray) -> np.ndarray:
    """float32 (1, 3, h, w), mirrored at the far edges up to a multiple of the network's downsampling."""
    missing = [(0, -side % _MULTIPLE) for side in image_hwc.shape[:2]]
    padded = np.pad(image_hwc, [*missing, (0, 0)], mode="symmetric").astype(np.float32) / 255
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])
