"""Photographs of the same field stay on one side of the split."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.read import Pair
from cellseg_deploy.samples import write_samples
from cellseg_train import same_content
from cellseg_train.data import split_by_image


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    """Six fields, and the first once more: brightened, resized and compressed."""
    write_samples(tmp_path, 6, 3, (300, 400))
    paths = sorted((tmp_path / "images").iterdir())
    image = cv2.imread(str(paths[0]))
    bright = np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8)
    copy = tmp_path / "images" / "copy.jpg"
    cv2.imwrite(str(copy), cv2.resize(bright, (300, 210)), [cv2.IMWRITE_JPEG_QUALITY, 70])
    return [*paths, copy]


def test_a_brightened_resized_copy_is_the_same_field_and_no_other_is(photographs):
    groups = same_content.groups_of(photographs)
    assert groups == [[0, 6], [1], [2], [3], [4], [5]]
    assert same_content.words(groups).startswith("2 images show the same content as another (1 group)")
    assert same_content.words(groups[1:]) == ""


def test_even_images_are_not_alike(tmp_path):
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 50, 3), 200, np.uint8))
    assert same_content.groups_of([tmp_path / "a.png", tmp_path / "b.png"]) == [[0], [1]]


def test_groups_are_held_out_whole_at_any_seed(photographs):
    pairs = [Pair(path.stem, path, path) for path in photographs]
    groups = same_content.groups_of(photographs)
    sides = set()
    for seed in range(12):
        split = split_by_image(pairs, 0.3, seed, groups)
        held_out = {pair.image for pair in split.val}
        assert (photographs[0] in held_out) == (photographs[6] in held_out)
        assert split.train
        assert split.val
        sides.add(photographs[0] in held_out)
    assert sides == {True, False}
    assert split_by_image(pairs, 0.3, 1, [[i] for i in range(7)]) == split_by_image(pairs, 0.3, 1)


def test_one_field_alone_cannot_be_divided(photographs):
    pairs = [Pair(path.stem, path, path) for path in photographs]
    with pytest.raises(UsageError, match="all 7 images show the same content"):
        split_by_image(pairs, 0.3, 0, [list(range(7))])
