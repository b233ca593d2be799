"""StarDist in a worker: its network alone, with random weights, at the size of cells that its models are made for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy.errors import BackendUnavailableError
from cellseg_deploy.segmenter import resize

CELL_PX = 30.0
"""Diameter that cells are brought to; the nuclei of its published models are about as wide."""
RAYS, GRID = 32, (2, 2)  # of its model for stained tissue


def subject(
    images: Sequence[str], labels: str | None, diameter: float, device: str, threads: int | None, weights: str | None
) -> Subject:
    """As ``peer_cellpose.subject``; there are no masks, for its search among random candidates has no end."""
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
