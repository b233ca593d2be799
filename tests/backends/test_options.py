"""EngineOptions and ReadOptions: defaults, and values that are refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from cellseg_deploy import EngineOptions, ReadOptions
from cellseg_deploy.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "torch"}, "unknown backend 'torch'; expected one of auto, onnxruntime"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"streams": 0}, "streams must be at least 1, got 0"),
    ],
)
def test_engine_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EngineOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
        ({"bit_depth": 8}, "bit depth must be 9 to 16, got 8"),
        ({"pixel_size_um": float("nan")}, "pixel size must be above 0"),
    ],
)
def test_settings_of_reading_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ReadOptions(**settings)


def test_settings_are_values() -> None:
    assert EngineOptions(threads=2) == EngineOptions("auto", None, None, 2)
    assert len({ReadOptions(), ReadOptions(bit_depth=12), ReadOptions(bit_depth=12)}) == 2
    with pytest.raises(FrozenInstanceError):
        EngineOptions().threads = 3  # type: ignore[misc]
