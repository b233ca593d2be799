"""The parity gate with everything around it: which forms, which images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellseg_deploy.backends import open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.images import find_images, read_image
from cellseg_deploy.model_spec import ModelSpec
from cellseg_deploy.parity import NamedImage, ParityPolicy, ParityReport, compare, middle_tile
from cellseg_deploy.samples import SmearParams, make_smear, random_params

if TYPE_CHECKING:
    from cellseg_train.checkpoint import LoadedNetwork

SAMPLE_SEED = 20261
N_SAMPLES = 4
_SMALLEST_CELL_PX = 12.0  # SmearParams draws no smaller ones


@dataclass(frozen=True)
class GateImages:
    """Images for a gate, made or read one at a time. ``source``: what the report says of them."""

    source: str
    load: Callable[[], Iterator[NamedImage]]


def sample_images(spec: ModelSpec, n: int = N_SAMPLES) -> GateImages:
    """``n`` synthetic smears, always the same for one model, with cells as large as those it was trained on.

    Every other one comes from another laboratory, so that colours vary; about 90 cells in an image.
    """
    # About cells of 90 px, in an image of 1600 x 1200, everything else follows in proportion.
    diameter = max(spec.cell_diameter_px / spec.image_scale, _SMALLEST_CELL_PX)
    zoom = diameter / SmearParams().cell_diameter_px
    height, width = (max(64, round(side * zoom)) for side in SmearParams().size_hw)

    def load() -> Iterator[NamedImage]:
        for i in range(n):
            if i % 2:
                rng = np.random.default_rng((SAMPLE_SEED, i))
                params = random_params(rng, size_hw=(height, width), cell_diameter_px=diameter)
                params = replace(params, n_cells=SmearParams().n_cells)
            else:
                params = replace(SmearParams(), size_hw=(height, width), cell_diameter_px=diameter)
            yield f"sample-{i}", make_smear(params, SAMPLE_SEED + i).image_hwc

    return GateImages(f"sample smears made by the package, seed {SAMPLE_SEED}, cells of {diameter:.0f} px", load)


def folder_images(folder: Path) -> GateImages:
    """The images in ``folder``. Raises ``NothingToDoError`` if there is none; one that cannot be read is an error when
    its turn comes, for a gate that skips images proves less than it says."""
    found = find_images([folder])
    if not found:
        raise NothingToDoError(f"{folder}: no image found to compare the two forms on")

    def load() -> Iterator[NamedImage]:
        for image in found:
            if image.problem:
                raise DataError(f"{image.path}: {image.problem}")
            yield image.name, read_image(image.path).pixels_hwc

    return GateImages(f"folder {folder.name}", load)


def open_form(path: Path, *, device: str = "cpu", threads: int | None = None) -> Backend:
    """Open any form of a network: a training run or its ``.safetensors`` in PyTorch, an ``.onnx`` in its engine."""
    if path.suffix.lower() == ".onnx":
        return open_backend(path, device=device, threads=threads)
    if path.is_dir() or path.suffix.lower() == ".safetensors":
        from cellseg_export.torch_backend import TorchBackend
        from cellseg_train.checkpoint import load_network

        return TorchBackend(load_network(path), device)
    raise UsageError(f"{path}: expected a training run folder, its model.safetensors, or an .onnx file")


def verify(
    reference: Backend,
    candidate: Backend,
    images: GateImages,
    policy: ParityPolicy | None = None,
    *,
    batch_size: int = 8,
    on_image: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """``parity.compare`` on ``images``; the report names their source."""
    return compare(
        reference,
        candidate,
        images.load(),
        policy,
        images_from=images.source,
        batch_size=batch_size,
        on_image=on_image,
    )


def look_inside(report: ParityReport, network: LoadedNetwork, path: Path, images: GateImages) -> ParityReport:
    """``report``, which compared ``network`` with the ``.onnx`` file ``path``, with the module at which the two part.

    Unchanged if it passed. Close the candidate first: a large model would be in memory twice.
    """
    from cellseg_export.locate import locate_fault

    if report.verdict == "passed":
        return report
    _, image_hwc = next(images.load())
    return replace(report, parts_at=locate_fault(network, path, middle_tile(network.spec, image_hwc)))
