"""What one large image takes in a folder run: bytes per pixel, by Python's own account of what it allocates."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from cellseg_benchmarks.folder.processes import StubEngine
from cellseg_benchmarks.harness import images
from cellseg_deploy.batching import alone
from cellseg_deploy.images.find import find_images
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.run.image_work import ImageWork
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.segmenter import Segmenter

MOST_BYTES_PER_PIXEL = 9.0
"""The image, 3, and its labels, 4; and at the model's scale what cannot be freed before the labels are there."""
OF_ANY_IMAGE = 16 << 20
"""Bytes for the bands of rows in which a large image is processed, whatever its size."""


def test_a_pixel_of_a_large_image_takes_nine_bytes_at_most(tmp_path: Path) -> None:
    """With label image and overlay, for the channels of the shipped model at its own scale."""
    smear = next(images.smears(1))
    segmenter = Segmenter(StubEngine(read_model_file(default_model_path()).spec, 0.0))
    options = RunOptions(report=False)
    work = ImageWork(segmenter, options, chosen_formats(options.save))
    network = alone(segmenter.backend.predict, segmenter.batch_size)

    def peak(megapixels: float) -> tuple[int, int]:
        hw = images.size_for(megapixels)
        path = tmp_path / f"{megapixels:g}.tif"
        images.write_mirrored(path, smear, hw)
        tracemalloc.start()
        try:
            finished = work(find_images([path])[0], "a", None, network)
            found = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert finished.record.result["cells"] > 20 * megapixels
        return hw[0] * hw[1], found

    peak(0.3)  # modules load on first use
    pixels, found = peak(12)
    assert 7 * pixels < found <= MOST_BYTES_PER_PIXEL * pixels + OF_ANY_IMAGE
