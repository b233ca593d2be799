"""Cells of a training at a size that makes no sense are met before it starts."""

from __future__ import annotations

import pytest

from cellseg_deploy.errors import UsageError
from cellseg_train.cell_size import check_cell_size
from cellseg_train.config import DataConfig, TrainConfig


def config(image_scale: float, weights: str = "none") -> TrainConfig:
    return TrainConfig(data=DataConfig(image_scale=image_scale), weights=weights)


@pytest.mark.parametrize(
    ("diameter", "scale", "taught"), [(100, 0.5, None), (100, 0.5, 48), (20, 1, None), (60, 1, 48)]
)
def test_sensible_cells_are_not_remarked_upon(diameter: float, scale: float, taught: float | None) -> None:
    assert check_cell_size(config(scale), diameter * scale, taught) == ""


@pytest.mark.parametrize(
    ("diameter", "scale", "taught", "advice"),
    [(20, 0.5, None, "2.5"), (300, 0.5, None, "0.167"), (100, 1, 48, "0.48"), (20, 1, 48, "2.4")],
)
def test_odd_sizes_are_warned_of_with_what_to_give(
    diameter: float, scale: float, taught: float | None, advice: str
) -> None:
    assert f"--image-scale {advice} for" in check_cell_size(config(scale), diameter * scale, taught)


@pytest.mark.parametrize(("diameter", "scale", "taught"), [(500, 0.5, None), (20, 0.5, 48), (400, 0.5, 48)])
def test_impossible_sizes_are_refused_with_what_to_give(diameter: float, scale: float, taught: float | None) -> None:
    with pytest.raises(UsageError, match="give --image-scale"):
        check_cell_size(config(scale, "shipped"), diameter * scale, taught)
