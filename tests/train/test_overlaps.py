"""Piles of overlapping cells made from the cells of a tile."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cellseg_deploy.cells.label_runs import row_runs
from cellseg_deploy.errors import UsageError
from cellseg_train import overlaps
from cellseg_train.config import DataConfig, ModelConfig, OverlapConfig, TrainConfig
from cellseg_train.data import Example, TileDataset

BACKGROUND = np.array([240, 230, 220])
TRANSMITTANCE = np.array([0.6, 0.5, 0.8])


def tile_of(*discs, size=160):
    """Discs (y, x, radius) of equal transmittance on an even background, and their labels."""
    image = np.broadcast_to(BACKGROUND, (size, size, 3)).astype(np.uint8).copy()
    labels = np.zeros((size, size), np.int32)
    for label, (y, x, radius) in enumerate(discs, start=1):
        cv2.circle(labels, (x, y), radius, label, -1)
    image[labels > 0] = np.round(BACKGROUND * TRANSMITTANCE)
    return image, labels


def always(**settings):
    return OverlapConfig(**{"share": 1.0, "distance": (0.6, 0.7), "further_p": 0.0} | settings)


def test_no_share_gives_the_very_arrays_and_draws_no_number():
    image, labels = tile_of((50, 50, 20))
    rng = np.random.default_rng(0)
    same_image, same_labels, _ = overlaps.add_piles(rng, image, labels, OverlapConfig())
    assert same_image is image
    assert same_labels is labels
    assert rng.random() == np.random.default_rng(0).random()


def test_transmittances_multiply_where_two_cells_overlap():
    image, labels = tile_of((80, 80, 22))
    piled, after, _ = overlaps.add_piles(np.random.default_rng(3), image, labels, always())
    assert sorted(np.unique(after)) == [0, 1, 2]
    twice = np.round(BACKGROUND * TRANSMITTANCE**2)
    in_overlap = np.abs(piled.astype(int) - twice).max(axis=2) <= 2
    assert np.count_nonzero(in_overlap) > 100
    assert (labels[in_overlap] == 1).all()  # nowhere but on the first cell
    assert (after[in_overlap] > 0).all()


def test_the_inputs_stay_as_they_were():
    image, labels = tile_of((80, 80, 22))
    copies = image.copy(), labels.copy()
    overlaps.add_piles(np.random.default_rng(3), image, labels, always())
    assert np.array_equal(image, copies[0])
    assert np.array_equal(labels, copies[1])


def test_equal_discs_are_cut_along_their_common_chord():
    image, labels = tile_of((80, 80, 24))
    _, after, _ = overlaps.add_piles(np.random.default_rng(5), image, labels, always())
    first, second = (np.argwhere(after == label) for label in (1, 2))
    # The pixels of each are nearer to its own middle: that of the first disc is known, that of the second follows.
    middle_of_first = np.array([80, 80])
    everything = np.argwhere(after > 0)
    middle_of_second = 2 * everything.mean(axis=0) - middle_of_first
    for points, own, other in ((first, middle_of_first, middle_of_second), (second, middle_of_second, middle_of_first)):
        nearer = np.linalg.norm(points - own, axis=1) <= np.linalg.norm(points - other, axis=1) + 1.5
        assert nearer.mean() > 0.99


@pytest.mark.parametrize("seed", range(8))
def test_every_cell_of_a_crowded_pile_is_one_visible_piece(seed):
    image, labels = tile_of((45, 45, 20), (45, 110, 20), (110, 45, 20), (110, 110, 20))
    config = always(further_p=0.9, distance=(0.3, 0.9))
    _, after, _ = overlaps.add_piles(np.random.default_rng(seed), image, labels, config)
    present = [label for label in np.unique(after) if label]
    assert len(present) > 5
    assert present[:4] == [1, 2, 3, 4]
    whole = np.count_nonzero(labels == 1)
    for label in present:
        mask = after == label
        assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] == 2
        assert np.count_nonzero(mask) >= 0.34 * whole
    assert row_runs(after).label.min() > 0


def test_no_pile_is_larger_than_asked_for():
    image, labels = tile_of((80, 80, 14))
    for seed in range(10):
        _, after, _ = overlaps.add_piles(np.random.default_rng(seed), image, labels, always(further_p=1.0, most=3))
        assert after.max() <= 3


def test_the_cells_of_a_rouleau_lie_in_one_line():
    image, labels = tile_of((160, 160, 16), size=320)
    config = always(further_p=1.0, rouleau_p=1.0, most=5)
    _, after, _ = overlaps.add_piles(np.random.default_rng(1), image, labels, config)
    assert after.max() == 5
    points = np.argwhere(after > 0).astype(float)
    short, long = np.sqrt(np.linalg.eigvalsh(np.cov(points.T)))
    assert long > 2 * short


def test_only_isolated_whole_convex_cells_are_copied():
    image, labels = tile_of((40, 40, 15), (40, 72, 15), (120, 3, 15), (120, 80, 15), (120, 130, 15))
    labels[112:128, 130:150] = 0  # a bite
    found = overlaps.cutouts(image, labels)
    assert len(found) == 1  # of two that nearly touch, one that the border cuts, one with a bite, and one that is fine
    inside = found[0].transmittance[found[0].mask]
    assert np.allclose(inside, TRANSMITTANCE, atol=0.01)


def test_a_tile_without_an_isolated_cell_is_left_alone():
    image, labels = tile_of((40, 40, 15), (40, 70, 15))
    piled, after, _ = overlaps.add_piles(np.random.default_rng(0), image, labels, always())
    assert np.array_equal(piled, image)
    assert np.array_equal(after, labels)


def test_a_turned_cell_keeps_its_pixels():
    image, labels = tile_of((80, 80, 15))
    cell = overlaps.cutouts(image, labels)[0]
    for quarters in range(4):
        turned = cell.turned(quarters, flip=True)
        assert np.count_nonzero(turned.mask) == np.count_nonzero(cell.mask)
        assert np.allclose(turned.transmittance[turned.mask], TRANSMITTANCE, atol=0.01)


@pytest.mark.parametrize("variant", ["boundary", "distance"])
def test_training_tiles_get_piles_and_depend_on_their_index_alone(variant):
    image, labels = tile_of((60, 60, 20), (60, 140, 20), (140, 60, 20), (140, 140, 20), size=200)
    store = type("Store", (), {"pairs": (None,), "__getitem__": lambda self, _: Example(image, labels, 1.0)})()

    def tile(share):
        config = TrainConfig(
            model=ModelConfig(variant=variant, tile_size=112), data=DataConfig(), overlap=OverlapConfig(share=share)
        )
        return TileDataset(store, config)[(0, 0, 0)]

    plain, piled, again = tile(0.0), tile(1.0), tile(1.0)
    assert not np.array_equal(plain["targets"], piled["targets"])
    assert all(np.array_equal(piled[name], again[name]) for name in piled)


@pytest.mark.parametrize(
    "wrong", [{"share": 1.5}, {"most": 1}, {"distance": (0.9, 0.3)}, {"further_p": -0.1}, {"rouleau_p": 2}]
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        OverlapConfig(**wrong)
