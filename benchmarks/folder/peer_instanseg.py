"""InstanSeg in a worker: its network alone, with random weights, at the pixel size that its models are made for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy.errors import BackendUnavailableError
from cellseg_deploy.samples.params import RED_CELL_DIAMETER_UM
from cellseg_deploy.segmenter import resize

MICROMETRES_PER_PX = 0.5
LAYERS, OUTPUTS = [256, 128, 64, 32], [[2, 2, 1]]  # defaults of its training: coordinates, sigmas, seeds
_MULTIPLE = 8  # of its three poolings


def subject(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """As ``peer_cellpose.subject``; there are no masks, which random weights say nothing about."""
    del labels
    if weights is not None:
        raise BackendUnavailableError("InstanSeg is timed here with random weights only")
    try:
        import torch
        from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet
    except ImportError as error:
        raise BackendUnavailableError(f"InstanSeg cannot be imported ({error}): pip install instanseg-torch") from error
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
    """float32 (1, 3, h, w), mirrored at the far edges up to a multiple of what the network halves."""
    missing = [(0, -side % _MULTIPLE) for side in image_hwc.shape[:2]]
    padded = np.pad(image_hwc, [*missing, (0, 0)], mode="symmetric").astype(np.float32) / 255
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])
