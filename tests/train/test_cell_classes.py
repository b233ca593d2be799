"""Classes of cells: read from CSV, painted into tiles, copied with the cells of piles, learned, scored."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.images.read import Pair, read_numbered_labels
from cellseg_deploy.models.spec import ThresholdParams
from cellseg_train import overlaps
from cellseg_train.cell_classes import UNKNOWN, read_classes
from cellseg_train.config import DataConfig, LossConfig, ModelConfig, OverlapConfig, TrainConfig
from cellseg_train.data import (
    ExampleStore,
    Split,
    TileDataset,
    TrainingCells,
    cell_areas,
    make_targets,
    read_pair,
    with_copies,
)
from cellseg_train.losses import class_loss, segmentation_loss
from cellseg_train.model import CellSegNet, probabilities
from cellseg_train.overlaps import UNTAUGHT
from cellseg_train.run import folder_scales
from cellseg_train.validate import ClassScores, Prediction

RED, WHITE = 0, 1


def written(folder: Path, text: str, name: str = "classes.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def images(*names: str) -> list[Path]:
    return [Path("/data") / name for name in names]


def test_classes_keep_the_order_in_which_they_are_named(tmp_path):
    file = written(
        tmp_path, "label,image,class\n3,a.png,white\n1,a.png,red\n2,lab/b,red\n4,a,ignore\n5,a,\n9,other.png,red\n"
    )
    found = read_classes([file], images("lab/a.png", "lab/b.tif"))
    assert found.names == ("white", "red")
    numbers = np.array([0, 1, 3, 4, 5, 6])
    assert found.of_labels(Path("/data/lab/a.png"), numbers).tolist() == [UNKNOWN, 1, 0, -2, UNKNOWN, UNKNOWN]
    assert found.of_labels(Path("/data/lab/b.tif"), np.array([0, 2])).tolist() == [UNKNOWN, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,class\na,red\n", r"line 1: the columns are image,class; expected image,label,class \(missing: label\)"),
        ("image,label,class\na,0,red\n", "line 2: label '0'; expected the cell's number"),
        ("image,label,class\na,x,red\n", "line 2: label 'x'; expected the cell's number"),
        ("image,label,class\na,1\n", "line 2: the number of fields differs from the header's 3"),
        ("image,label,class\na,1,red\na,1,white\n", "line 3: cell 1 of a has another class at .*line 2"),
        ("image,label,class\nz,1,red\nz,2,white\n", "names none of the 3 images; expected names such as a.png"),
        ("image,label,class\nc.png,1,red\n", "line 2: c.png may be /data/x/c.png or /data/y/c.png; write more of"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_line(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_classes([written(tmp_path, text)], images("a.png", "x/c.png", "y/c.png"))


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected two or more classes, got only 'red'"):
        read_classes([written(tmp_path, "image,label,class\na,1,red\na,2,ignore\n")], images("a.png"))


def test_a_cell_that_the_mask_does_not_have_is_named(tmp_path):
    file = written(tmp_path, "image,label,class\na,1,red\na,7,white\n")
    found = read_classes([file], images("a.png"))
    with pytest.raises(
        DataError, match=r"line 3: the mask of /data/a.png has no cell 7; it has 2 cells, numbered 1 to 5"
    ):
        found.of_labels(Path("/data/a.png"), np.array([0, 1, 5]))


@pytest.mark.parametrize(
    ("stored", "numbers"),
    [
        ([[0, 40, 40], [0, 0, 0], [7, 0, 9]], [0, 40, 7, 9]),
        ([[0, 255, 0], [0, 0, 0], [255, 0, 255]], [0, 1, 2, 3]),  # a binary mask: in raster order
        ([[0, 7, 7], [0, 0, 0], [0, 0, 0]], [0, 7]),
    ],
)
def test_labels_keep_the_numbers_of_the_file(tmp_path, stored, numbers):
    cv2.imwrite(str(tmp_path / "m.png"), np.array(stored, np.uint8))
    labels, found = read_numbered_labels(tmp_path / "m.png")
    assert found.tolist() == numbers
    assert labels.max() == len(numbers) - 1


def test_unknown_foreground_has_no_number(tmp_path):
    cv2.imwrite(str(tmp_path / "m.png"), np.array([[0, 3], [IGNORED, 500]], np.uint16))
    labels, numbers = read_numbered_labels(tmp_path / "m.png", keep_ignored=True)
    assert numbers[labels].tolist() == [[0, 3], [-1, 500]]
    assert sorted(numbers[numbers >= 0]) == [0, 3, 500]


@pytest.fixture
def pair(tmp_path) -> Pair:
    """A red cell (number 5), a white one (8), one left out (9) and one of which nobody knows the class (2)."""
    labels = np.zeros((120, 160), np.uint16)
    for number, centre, radius in ((5, (30, 30), 14), (8, (100, 40), 24), (9, (30, 90), 10), (2, (100, 95), 12)):
        cv2.circle(labels, centre, radius, number, -1)
    cv2.imwrite(str(tmp_path / "i.png"), np.where(labels[..., None] > 0, 120, 230).repeat(3, axis=2).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "m.png"), labels)
    return Pair("i", tmp_path / "i.png", tmp_path / "m.png")


def classes_of(pair: Pair):
    file = written(pair.image.parent, "image,label,class\ni,5,red\ni,8,white\ni,9,ignore\n")
    return read_classes([file], [pair.image])


def settings(**changes) -> TrainConfig:
    model = ModelConfig(tile_size=112, tiny_width=48, tiny_depth=1, classes=("red", "white"))
    return TrainConfig(model=model, data=DataConfig(image_scale=1.0, min_object_px=20), **changes)


def test_each_pixel_of_a_tile_is_of_its_cells_class(pair):
    stored = cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED)
    _, truth = read_pair(pair, 20, classes=classes_of(pair))
    made = make_targets(truth.labels_hw, settings(), class_of=truth.class_of)
    expected = np.where(stored == 5, RED, np.where(stored == 8, WHITE, -1))
    assert np.array_equal(made["class_map"], expected)
    assert made["targets"].shape == (2, 120, 160)


def test_a_cell_that_is_left_out_teaches_nothing(pair):
    stored = cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED)
    _, truth = read_pair(pair, 20, classes=classes_of(pair))
    assert np.array_equal(truth.labels_hw == UNTAUGHT, stored == 9)
    made = make_targets(truth.labels_hw, settings(), class_of=truth.class_of)
    taught = made["taught"] > 0
    assert not taught[stored == 9].any()
    assert taught[cv2.dilate((stored == 9).astype(np.uint8), np.ones((7, 7))) == 0].all()
    batch = {name: torch.from_numpy(plane)[None] for name, plane in made.items()}

    def loss(where: np.ndarray) -> float:
        logits = torch.zeros(1, 2, 120, 160)
        logits[0, :, torch.from_numpy(where)] = 3.0
        return float(
            segmentation_loss(
                logits,
                batch["targets"],
                batch["gap"],
                ("foreground", "boundary"),
                LossConfig(),
                known=batch["known"],
                taught=batch["taught"],
            )[0]
        )

    assert loss(stored == 9) == loss(np.zeros_like(taught))
    assert loss(stored == 2) != loss(np.zeros_like(taught))


def test_training_images_say_how_common_each_class_is(pair):
    store = ExampleStore([pair], settings(), classes_of(pair))
    cells = store.check_and_fill()
    stored = cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED)
    assert cells.class_cells == (1, 1)
    assert cells.class_px == (np.count_nonzero(stored == 5), np.count_nonzero(stored == 8))
    areas = [np.count_nonzero(stored == number) for number in (2, 5, 8)]  # not of what was left out
    assert cells.diameter_px == pytest.approx(np.median(np.sqrt(4 / np.pi * np.array(areas))))


def test_rare_classes_weigh_the_root_of_their_rarity():
    weights = TrainingCells(1.0, None, (9, 1), (900.0, 100.0)).class_weights()
    assert weights[1] / weights[0] == pytest.approx(3)
    assert (weights**2 * np.array([0.9, 0.1])).sum() == pytest.approx(1)
    assert TrainingCells(1.0, None).class_weights().shape == (0,)


def test_a_tile_of_the_training_is_the_class_of_its_pixels(pair):
    store = ExampleStore([pair], settings(), classes_of(pair))
    dataset = TileDataset(store, settings(overlap=OverlapConfig(share=1.0)))
    seen = set()
    for epoch in range(4):
        tile = dataset[epoch, 0, 0]
        assert tile["class_map"].dtype == torch.int64
        assert (tile["targets"][0][tile["class_map"] >= 0].mean()) > 0.9  # but for lines between cells
        seen |= set(tile["class_map"].unique().tolist())
    assert seen == {-1, RED, WHITE}


def test_a_cell_laid_on_a_pile_has_the_class_of_its_original():
    labels = np.zeros((200, 200), np.int32)
    for number, centre in ((1, (50, 50)), (2, (140, 60)), (3, (60, 150))):
        cv2.circle(labels, centre, 20, number, -1)
    cv2.circle(labels, (150, 150), 12, UNTAUGHT, -1)
    image = np.where(labels[..., None] > 0, 120, 230).repeat(3, axis=2).astype(np.uint8)
    class_of = np.array([UNKNOWN, RED, WHITE, UNKNOWN], np.int16)
    config = OverlapConfig(share=1.0)
    made = set()
    for seed in range(6):
        _, after, copy_of = overlaps.add_piles(np.random.default_rng(seed), image, labels, config)
        assert copy_of.keys() == set(np.unique(after).tolist()) - {0, 1, 2, 3, UNTAUGHT}
        assert np.array_equal(after == UNTAUGHT, labels == UNTAUGHT)  # nothing is laid over it
        assert set(copy_of.values()) <= {1, 2, 3}
        longer = with_copies(class_of, copy_of)
        assert all(longer[label] == class_of[original] for label, original in copy_of.items())
        assert longer[:4].tolist() == class_of.tolist()
        made |= {int(longer[label]) for label in copy_of}
    assert made == {UNKNOWN, RED, WHITE}


def test_the_class_loss_is_of_known_pixels_alone_and_weighs_them():
    class_map = torch.tensor([[[0, 1], [-1, -1]]])
    logits = torch.zeros(1, 2, 2, 2)
    weights = torch.tensor([1.0, 3.0])
    assert float(class_loss(logits, class_map, weights)) == pytest.approx(np.log(2))
    logits[0, 0, 1] = 9.0  # where no class is known
    assert float(class_loss(logits, class_map, weights)) == pytest.approx(np.log(2))
    logits[0, 1, 0, 0] = 2.0  # wrong where the common class is
    common = float(class_loss(logits, class_map, weights))
    logits[0, :, 0, 0] = 0.0
    logits[0, 0, 0, 1] = 2.0  # as wrong where the rare one is
    assert float(class_loss(logits, class_map, weights)) - np.log(2) == pytest.approx(3 * (common - np.log(2)))
    assert float(class_loss(logits, torch.full_like(class_map, -1), weights)) == 0


def test_probabilities_of_classes_sum_to_one():
    config = settings().model
    net = CellSegNet(config).eval()
    with torch.inference_mode():
        logits = net(torch.randn(1, 3, 112, 112))
    assert logits.shape == (1, 4, 112, 112)
    made = probabilities(logits, config)
    assert torch.allclose(made[:, 2:].sum(dim=1), torch.ones(1, 112, 112), atol=1e-6)
    assert torch.equal(made[:, :2], logits[:, :2].sigmoid())


def test_scores_by_class_take_the_class_from_the_whole_cell():
    true = np.zeros((60, 160), np.int32)
    for number, x in ((1, 20), (2, 60), (3, 100), (4, 140)):
        cv2.circle(true, (x, 30), 14, number, -1)
    cells = true > 0
    planes = np.zeros((3, 60, 160), np.float32)
    planes[0] = cells & (true != 2)  # cell 2 is not found
    planes[1] = 0.3
    planes[2] = 0.7
    planes[1:, true == 1] = np.array([[0.9], [0.1]])
    planes[1:, 30:32] = np.array([0.1, 0.9])[:, None, None]  # a stripe of the wrong class in it
    planes[1:, true == 4] = np.array([[0.9], [0.1]])
    item = Prediction(
        np.zeros((60, 160, 3), np.uint8),
        planes.astype(np.float16),
        true,
        np.array([UNKNOWN, RED, WHITE, WHITE, UNKNOWN], np.int16),
    )
    scores = ClassScores.of(("red", "white"))
    scores.add(item, ("foreground", "red", "white"), ThresholdParams(), 28.0)
    assert scores.counts.tolist() == [[1, 0, 0], [1, 0, 1]]  # of cell 4 nobody knows the class
    assert scores.f1() == {"red": 1.0, "white": pytest.approx(2 / 3)}
    assert np.isnan(ClassScores.of(("red",)).f1()["red"])


def test_cells_of_the_class_ignore_have_no_part_in_the_scale_of_a_folder(pair):
    stored = cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED)
    area = {number: np.count_nonzero(stored == number) for number in (2, 5, 8, 9)}
    assert sorted(cell_areas([pair])) == sorted(area.values())
    assert sorted(cell_areas([pair], classes=classes_of(pair))) == sorted(area[number] for number in (2, 5, 8))
    data = DataConfig(cell_diameter_px=30.0, min_object_px=20)
    (scale,) = folder_scales(Split((pair,), (pair,)), data, classes_of(pair)).values()
    assert scale == pytest.approx(30 / np.sqrt(4 / np.pi * area[5]))  # the median of 2, 5 and 8
