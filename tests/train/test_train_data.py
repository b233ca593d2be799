"""From folders to batches: pairing, splits, and tiles that depend on nothing but their index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cellseg_deploy.errors import CellsegError, DataError, UsageError
from cellseg_deploy.images.read import Pair
from cellseg_train import augment, data
from cellseg_train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from cellseg_train.data import (
    ExampleStore,
    Split,
    TileDataset,
    TileLoader,
    find_pairs,
    make_targets,
    read_pair,
    split_by_image,
)

CONFIG = TrainConfig(
    model=ModelConfig(tile_size=56),
    data=DataConfig(image_scale=1.0, patches_per_image=3, min_object_px=20),
    optim=OptimConfig(batch_size=4),
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four images with two discs each and their label images."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(4):
        labels = np.zeros((80, 100), np.uint16)
        cv2.circle(labels, (30, 40), 15, 1, -1)
        cv2.circle(labels, (70, 40), 20, 2, -1)
        image = np.where(labels[..., None] > 0, (120, 40, 90), (230, 230, 230)) + rng.integers(-5, 5, (80, 100, 3))
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), image.astype(np.uint8)[..., ::-1])
        cv2.imwrite(str(tmp_path / f"masks/{i}.png"), labels)
    return tmp_path / "images", tmp_path / "masks"


@pytest.fixture
def dataset(folders) -> TileDataset:
    store = ExampleStore(find_pairs([folders[0]], [folders[1]]), CONFIG)
    store.check_and_fill()
    return TileDataset(store, CONFIG)


def test_an_image_without_mask_is_named(folders):
    (folders[1] / "2.png").unlink()
    with pytest.raises(CellsegError, match=r"2\.png"):
        find_pairs([folders[0]], [folders[1]])


def test_a_mask_without_image_is_named(folders):
    (folders[0] / "3.png").unlink()
    with pytest.raises(CellsegError, match=r"3\.png"):
        find_pairs([folders[0]], [folders[1]])


def test_a_mask_of_another_size_is_named_before_training(folders):
    cv2.imwrite(str(folders[1] / "1.png"), np.zeros((80, 99), np.uint16))
    store = ExampleStore(find_pairs([folders[0]], [folders[1]]), CONFIG)
    with pytest.raises(DataError, match=r"1\.png"):
        store.check_and_fill()


def test_masks_without_any_cell_are_no_masks(folders):
    for path in folders[1].iterdir():
        cv2.imwrite(str(path), np.zeros((80, 100), np.uint16))
    with pytest.raises(DataError, match="hold no object"):
        ExampleStore(find_pairs([folders[0]], [folders[1]]), CONFIG).check_and_fill()


def test_folders_come_in_pairs(folders):
    with pytest.raises(UsageError, match="2 image folders and 1 mask"):
        find_pairs([folders[0], folders[0]], [folders[1]])


def test_median_diameter_is_that_of_the_discs(dataset):
    # Discs of radius 15 and 20 px in equal number: the median lies between 31 and 41 px.
    assert ExampleStore(dataset.store.pairs, CONFIG).check_and_fill().diameter_px == pytest.approx(36, abs=1)


def test_specks_are_dropped_and_cells_kept(folders):
    labels = cv2.imread(str(folders[1] / "0.png"), cv2.IMREAD_UNCHANGED)
    labels[0:2, 0:2] = 3
    cv2.imwrite(str(folders[1] / "0.png"), labels)
    kept = read_pair(find_pairs([folders[0]], [folders[1]])[0], min_object_px=20)[1].labels_hw
    assert kept[0, 0] == 0
    assert len(np.unique(kept)) == 3


def pairs_of(n: int) -> list[Pair]:
    return [Pair(str(i), Path(f"{i}.png"), Path(f"{i}.tif")) for i in range(n)]


def test_split_holds_out_a_quarter_of_the_images_by_seed():
    split = split_by_image(pairs_of(20), 0.25, seed=1)
    assert (len(split.train), len(split.val)) == (15, 5)
    assert not {p.stem for p in split.train} & {p.stem for p in split.val}
    assert split == split_by_image(pairs_of(20), 0.25, seed=1)
    assert split != split_by_image(pairs_of(20), 0.25, seed=2)
    assert len(split_by_image(pairs_of(2), 0.01, seed=0).val) == 1
    with pytest.raises(UsageError, match="two are needed"):
        split_by_image(pairs_of(1), 0.25, seed=0)


def test_fingerprint_is_of_contents_and_of_the_division(folders):
    pairs = find_pairs([folders[0]], [folders[1]])
    first = Split(pairs[:3], pairs[3:])
    assert first.sha256 == Split(pairs[:3], pairs[3:]).sha256
    assert first.sha256 != Split(pairs[:2], pairs[2:]).sha256
    cv2.imwrite(str(pairs[0].mask), np.ones((80, 100), np.uint16))
    assert first.sha256 != Split(pairs[:3], pairs[3:]).sha256


def test_an_image_under_two_names_on_both_sides_is_found(folders, tmp_path):
    pairs = find_pairs([folders[0]], [folders[1]])
    copied = tmp_path / "copy.png"
    copied.write_bytes(pairs[0].image.read_bytes())
    with pytest.raises(UsageError, match=r"also a training image \(copy\)"):
        Split(pairs, (Pair("copy", copied, pairs[0].mask),)).check_apart()
    Split(pairs[:3], pairs[3:]).check_apart()


def test_a_tile_depends_on_its_index_alone(dataset):
    first = dataset[(5, 1, 2)]
    dataset[(0, 3, 0)]
    again = dataset[(5, 1, 2)]
    for name in ("image", "targets", "gap"):
        assert torch.equal(first[name], again[name])
    others = (dataset[index]["image"] for index in ((6, 1, 2), (5, 2, 2), (5, 1, 1)))
    assert not any(torch.equal(first["image"], other) for other in others)
    reseeded = TileDataset(dataset.store, replace(CONFIG, seed=1))
    assert not torch.equal(first["image"], reseeded[(5, 1, 2)]["image"])


def test_tile_has_the_shapes_and_types_it_promises(dataset):
    tile = dataset[(0, 0, 0)]
    assert (tile["image"].shape, tile["image"].dtype) == ((3, 56, 56), torch.uint8)
    assert (tile["targets"].shape, tile["targets"].dtype) == ((2, 56, 56), torch.float32)
    assert (tile["gap"].shape, tile["gap"].dtype) == ((56, 56), torch.float32)
    assert set(tile["targets"].unique().tolist()) <= {0, 1}
    assert "surface" not in tile


def test_other_variants_and_losses_bring_their_planes(dataset):
    config = replace(CONFIG, model=replace(CONFIG.model, variant="distance"))
    depth = TileDataset(dataset.store, config)[(0, 0, 0)]["targets"][1]
    assert depth.max() == 1
    assert len(depth.unique()) > 5
    config = replace(CONFIG, loss=replace(CONFIG.loss, surface_weight=1.0))
    tile = TileDataset(dataset.store, config)[(0, 0, 0)]
    assert (tile["surface"].shape, tile["surface"].dtype) == ((56, 56), torch.float32)
    assert torch.equal(tile["surface"] < 0, tile["targets"][1] > 0)


@pytest.mark.parametrize("cache_gb", [4.0, 0.0])
def test_batches_are_the_same_for_any_number_of_threads_and_cache(folders, cache_gb):
    def batches(workers: int, cache: float) -> list[torch.Tensor]:
        config = replace(CONFIG, workers=workers, data=replace(CONFIG.data, cache_gb=cache))
        store = ExampleStore(find_pairs([folders[0]], [folders[1]]), config)
        store.check_and_fill()
        return [batch["image"] for batch in TileLoader(TileDataset(store, config)).epoch(3)]

    expected, got = batches(0, 4.0), batches(3, cache_gb)
    assert [len(batch) for batch in expected] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_each_epoch_visits_every_image_in_another_order(dataset):
    loader = TileLoader(dataset)
    first, second = loader.order(0), loader.order(1)
    assert sorted((i, p) for _, i, p in first) == [(i, p) for i in range(4) for p in range(3)]
    assert [index[1:] for index in first] != [index[1:] for index in second]
    assert len(loader) == 3


def test_the_distance_in_a_cell_that_the_tile_cuts_is_that_of_the_whole_cell() -> None:
    """A disc of radius 50 px of which the tile sees the outer 10 px: nowhere more than a fifth of the way in."""
    disc = np.zeros((300, 300), np.int32)
    cv2.circle(disc, (150, 150), 50, 1, -1)
    image = np.zeros((300, 300, 3), np.uint8)
    matrix = np.array([[1.0, 0.0, 190.0], [0.0, 1.0, 100.0]])  # the tile begins 40 px right of the middle
    config = TrainConfig(model=ModelConfig(variant="distance", tile_size=112))
    _, wide = augment.cut(image, disc, 1.0, matrix, 112, 60)
    _, narrow = augment.cut(image, disc, 1.0, matrix, 112)
    assert wide.shape == (232, 232)
    assert np.array_equal(wide[60:-60, 60:-60], narrow)
    depth = make_targets(wide, config, margin=60)["targets"][1]
    assert depth.shape == (112, 112)
    assert 0.15 < depth.max() < 0.25
    assert make_targets(narrow, config)["targets"][1].max() == 1  # what would be learned without the margin


def test_a_folder_given_twice_is_read_once_and_counts_twice(folders, monkeypatch):
    pairs = find_pairs([folders[0]], [folders[1]])
    read = []
    whole = data.read_pair
    monkeypatch.setattr(data, "read_pair", lambda pair, *more: (read.append(pair), whole(pair, *more))[1])
    store = ExampleStore(pairs + pairs, CONFIG)
    found = store.check_and_fill()
    assert read == list(pairs)
    assert found.summary.n_images == 2 * len(pairs)
    assert store[0] is store[len(pairs)]
    assert read == list(pairs)
