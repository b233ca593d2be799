"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from cellseg_deploy.errors import plural


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((1, "image"), "1 image"),
        ((0, "image"), "0 images"),
        ((2, "object is", "objects are"), "2 objects are"),
        ((1, "object is", "objects are"), "1 object is"),
    ],
)
def test_one_is_no_plural(words: tuple[int, str], said: str) -> None:
    assert plural(*words) == said
