"""A synthetic slide is its fields next to each other, and its count is theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_deploy.errors import UsageError
from cellseg_deploy.samples.params import random_params
from cellseg_deploy.samples.slide import write_slide
from cellseg_deploy.samples.smear import make_smear
from cellseg_deploy.slides.open import open_image

PARAMS = replace(random_params(np.random.default_rng(1)), size_hw=(512, 512), n_cells=12, cell_diameter_px=60.0)


def test_a_slide_is_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    smear = make_smear(PARAMS, 3)
    assert write_slide(path, (2, 3), PARAMS, 3, distinct=1, um=0.5) == 6 * smear.n_cells
    assert np.array_equal(tifffile.imread(path), np.tile(smear.image_hwc, (2, 3, 1)))
    reader = open_image(path)
    assert reader.pixel_size.um == 0.5
    assert reader.levels == ((1024, 1536),)
    reader.close()


def test_fields_that_are_no_whole_tiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 512 px"):
        write_slide(tmp_path / "a.tif", (1, 1), replace(PARAMS, size_hw=(500, 512)), 3)
