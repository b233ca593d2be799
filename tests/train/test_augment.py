"""Cutting and recolouring of training tiles."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_train import augment
from cellseg_train.config import AugmentConfig


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_plain_crop_is_the_image_itself(rng):
    image = rng.integers(0, 256, (90, 120, 3), np.uint8)
    labels = rng.integers(0, 5, (90, 120)).astype(np.int32)
    matrix = augment.plain_crop(rng, image.shape[:2], 56)
    tile, tile_labels = augment.cut(image, labels, 1.0, matrix, 56)
    left, top = (int(v) for v in matrix[:, 2])
    assert np.array_equal(tile, image[top : top + 56, left : left + 56])
    assert np.array_equal(tile_labels, labels[top : top + 56, left : left + 56])


def test_labels_at_full_size_fall_on_the_same_pixels_as_at_model_size(rng):
    coarse = rng.integers(0, 9, (60, 80)).astype(np.int32)
    fine = coarse.repeat(2, axis=0).repeat(2, axis=1)
    image = np.zeros((60, 80, 3), np.uint8)
    matrix = augment.plain_crop(rng, (60, 80), 56)
    _, from_fine = augment.cut(image, fine, 2.0, matrix, 56)
    _, from_coarse = augment.cut(image, coarse, 1.0, matrix, 56)
    assert np.array_equal(from_fine, from_coarse)


def test_finer_labels_are_read_at_the_middle_of_an_image_pixel(rng):
    fine = np.tile(np.arange(1, 241, dtype=np.int32), (180, 1))
    matrix = augment.plain_crop(rng, (60, 80), 56)
    _, labels = augment.cut(np.zeros((60, 80, 3), np.uint8), fine, 3.0, matrix, 56)
    left = int(matrix[0, 2])
    assert labels[0].tolist() == [3 * (left + x) + 1 + 1 for x in range(56)]


def test_image_and_labels_move_together_under_any_affine(rng):
    y, x = np.mgrid[:200, :240]
    labels = ((x - 120) ** 2 + (y - 100) ** 2 < 50**2).astype(np.int32)
    image = np.repeat((labels * 255).astype(np.uint8)[..., None], 3, axis=2)
    for _ in range(20):
        matrix = augment.random_affine(rng, (200, 240), 112, (0.6, 1.6))
        tile, tile_labels = augment.cut(image, labels, 1.0, matrix, 112)
        # Only edge pixels, where one is interpolated and the other is not, may differ.
        assert ((tile[..., 0] > 127) != (tile_labels > 0)).mean() < 0.005


def test_scale_of_the_affine_is_within_its_range(rng):
    for _ in range(50):
        matrix = augment.random_affine(rng, (300, 300), 56, (0.5, 2.0))
        zoom = 1 / np.sqrt(abs(np.linalg.det(matrix[:, :2])))
        assert 0.5 <= zoom <= 2.0
    assert {bool(np.linalg.det(augment.random_affine(rng, (99, 99), 56, (1, 1))[:, :2]) > 0) for _ in range(30)} == {
        True,
        False,
    }


@pytest.mark.parametrize("hw", [(10, 13), (56, 56), (57, 400), (1, 1)])
def test_images_smaller_than_a_tile_are_mirrored_not_black(rng, hw):
    image = np.full((*hw, 3), 200, np.uint8)
    labels = np.ones(hw, np.int32)
    for matrix in (augment.random_affine(rng, hw, 56, (0.7, 1.4)), augment.plain_crop(rng, hw, 56)):
        tile, tile_labels = augment.cut(image, labels, 1.0, matrix, 56)
        assert (tile == 200).all()
        assert (tile_labels == 1).all()


def test_recolour_is_uint8_deterministic_and_really_changes_colours(rng):
    tile = rng.integers(60, 250, (56, 56, 3), np.uint8)
    config = AugmentConfig()
    first = augment.recolour(np.random.default_rng(3), tile, config)
    again = augment.recolour(np.random.default_rng(3), tile, config)
    other = augment.recolour(np.random.default_rng(4), tile, config)
    assert first.dtype == np.uint8
    assert first.shape == tile.shape
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_recolour_with_everything_off_changes_nothing(rng):
    off = AugmentConfig(
        stain=0, hue=0, saturation=0, brightness=0, contrast=0, gamma=0, grey_p=0, blur_p=0, sharpen_p=0, noise_p=0,
        jpeg_p=0, illumination=0,
    )  # fmt: skip
    tile = rng.integers(0, 256, (56, 56, 3), np.uint8)
    assert np.abs(augment.recolour(rng, tile, off).astype(int) - tile).max() <= 1


def test_stain_of_no_spread_and_hue_of_no_turn_are_identities(rng):
    image = rng.random((8, 8, 3)).astype(np.float32) * 0.9 + 0.05
    assert augment.vary_stain(rng, image, 0.0) == pytest.approx(image, abs=1e-4)
    grey = np.full((1, 3), 0.4, np.float32)
    assert grey @ augment._hue_matrix(1.0) == pytest.approx(grey, abs=1e-6)
    third = 2 * np.pi / 3
    assert np.array([[1, 0, 0]], np.float32) @ augment._hue_matrix(third) == pytest.approx(
        np.array([[0, 1, 0]]), abs=1e-6
    )


def test_light_field_stays_in_its_range(rng):
    field = augment.light_field(rng, (40, 60), 0.3)
    assert field.max() == pytest.approx(1.0)
    assert field.min() >= 0.7
