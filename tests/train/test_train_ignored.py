"""Foreground of unknown instance (65535 in a label image): taught as foreground, and nothing of instances."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.images.read import Pair
from cellseg_train import overlaps
from cellseg_train.config import DataConfig, LossConfig, ModelConfig, OverlapConfig, TrainConfig
from cellseg_train.data import ExampleStore, make_targets, read_pair
from cellseg_train.losses import segmentation_loss


def labels_with_unknown() -> np.ndarray:
    labels = np.zeros((64, 96), np.int32)
    cv2.circle(labels, (24, 32), 14, 1, -1)
    labels[20:44, 39:80] = IGNORED  # touches the cell
    return labels


def config(variant: str) -> TrainConfig:
    return TrainConfig(model=ModelConfig(tile_size=56, variant=variant), loss=LossConfig(gap_weight=6.0))


def test_unknown_foreground_is_foreground_without_line_gap_or_depth():
    labels = labels_with_unknown()
    unknown = labels == IGNORED
    made = make_targets(labels, config("distance"))
    assert (made["targets"][0][unknown] == 1).all()
    assert (made["targets"][0] == (labels > 0)).all()  # no line where the cell meets it
    assert (made["targets"][1][unknown] == 0).all()
    assert (made["gap"][labels > 0] == 0).all()
    assert np.array_equal(made["known"] == 0, unknown)


def test_what_the_network_says_of_instances_there_costs_nothing():
    labels = labels_with_unknown()
    unknown = torch.from_numpy(labels == IGNORED)
    for variant in ("boundary", "distance"):
        settings = config(variant)
        made = {name: torch.from_numpy(plane)[None] for name, plane in make_targets(labels, settings).items()}

        def loss(second: torch.Tensor, made=made, settings=settings) -> float:
            logits = torch.stack([torch.zeros(64, 96), second])[None]
            channels = settings.model.channels
            total, _ = segmentation_loss(
                logits, made["targets"], made["gap"], channels, settings.loss, known=made["known"]
            )
            return float(total)

        assert loss(torch.where(unknown, 9.0, 0.0)) == loss(torch.zeros(64, 96))
        assert loss(torch.where(~unknown, 9.0, 0.0)) != loss(torch.zeros(64, 96))


def test_no_pile_is_laid_over_it_and_it_is_no_donor():
    labels = np.zeros((160, 160), np.int32)
    cv2.circle(labels, (40, 80), 16, 1, -1)
    labels[50:110, 70:140] = IGNORED
    tile = np.where(labels[..., None] > 0, 120, 230).repeat(3, axis=2).astype(np.uint8)
    assert len(overlaps.cutouts(tile, labels)) == 1
    before = labels == IGNORED
    for seed in range(8):
        piled, after, _ = overlaps.add_piles(np.random.default_rng(seed), tile, labels, OverlapConfig(share=1.0))
        assert np.array_equal(after == IGNORED, before)
        inside = cv2.erode(before.astype(np.uint8), np.ones((9, 9))) > 0
        assert np.array_equal(piled[inside], tile[inside])


def test_it_is_kept_in_reading_and_in_no_statistic(tmp_path):
    labels = labels_with_unknown()
    labels[60:62, 90:92] = 2  # a speck
    labels[2:4, 2:4] = IGNORED  # as small, but no speck
    labels[50:60, 5:15] = 3
    cv2.imwrite(str(tmp_path / "m.png"), labels.astype(np.uint16))
    cv2.imwrite(str(tmp_path / "i.png"), np.full((64, 96, 3), 200, np.uint8))
    pair = Pair("i", tmp_path / "i.png", tmp_path / "m.png")
    read = read_pair(pair, 20)[1].labels_hw
    assert np.array_equal(read == IGNORED, labels == IGNORED)
    assert sorted(np.unique(read)) == [0, 1, 2, IGNORED]
    settings = replace(config("boundary"), data=DataConfig(image_scale=1.0, min_object_px=20))
    areas = [np.count_nonzero(labels == 1), 100]
    found = ExampleStore([pair], settings).check_and_fill()
    assert found.diameter_px == np.median(np.sqrt(4 / np.pi * np.array(areas)))
