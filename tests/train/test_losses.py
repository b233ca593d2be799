"""Losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cellseg_train.config import LossConfig
from cellseg_train.losses import is_finite, segmentation_loss, soft_dice_loss, soft_target_loss, surface_loss

BOTH = ("foreground", "boundary")


def test_soft_dice_by_hand():
    logits = torch.zeros(1, 2, 2)  # probability 0.5 everywhere
    target = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    # 2 * 0.5 + 1 over 2 + 1 + 1
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 - 2 / 4)


def test_soft_dice_of_empty_truth_found_empty_is_nearly_nothing():
    assert soft_dice_loss(torch.full((1, 4, 4), -20.0), torch.zeros(1, 4, 4)).item() < 1e-6


def test_bce_of_an_undecided_network_is_log_two_whatever_the_weights():
    logits, targets = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    targets[:, :, :2] = 1
    gap = torch.rand(2, 4, 4)
    _, parts = segmentation_loss(logits, targets, gap, BOTH, LossConfig())
    assert parts["bce"].item() == pytest.approx(math.log(2))
    assert parts["boundary"].item() == pytest.approx(math.log(2))


def test_a_weighted_gap_pixel_counts_more():
    logits = torch.full((1, 1, 2, 2), -4.0)
    logits[0, 0, 0, 0] = 4.0  # wrong there, right elsewhere
    targets, gap = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2)
    _, plain = segmentation_loss(logits, targets, gap, ("foreground",), LossConfig())
    gap[0, 0, 0] = 6.0
    _, weighted = segmentation_loss(logits, targets, gap, ("foreground",), LossConfig())
    wrong, right = math.log1p(math.exp(4)), math.log1p(math.exp(-4))
    assert plain["bce"].item() == pytest.approx((wrong + 3 * right) / 4)
    assert weighted["bce"].item() == pytest.approx((7 * wrong + 3 * right) / 10)


def test_plain_variant_has_no_boundary_part_and_total_is_the_sum():
    logits, targets, gap = torch.randn(2, 2, 8, 8), torch.rand(2, 2, 8, 8).round(), torch.zeros(2, 8, 8)
    config = LossConfig(dice_weight=0.5, boundary_weight=2.0)
    total, parts = segmentation_loss(logits[:, :1], targets[:, :1], gap, ("foreground",), config)
    assert set(parts) == {"bce", "dice_loss"}
    assert total.item() == pytest.approx(parts["bce"].item() + 0.5 * parts["dice_loss"].item())
    total, parts = segmentation_loss(logits, targets, gap, BOTH, config)
    expected = parts["bce"].item() + 0.5 * parts["dice_loss"].item() + 2 * parts["boundary"].item()
    assert total.item() == pytest.approx(expected)


def test_boundary_channel_is_found_by_name_not_by_place():
    logits, targets, gap = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)
    logits[:, 2] = 10.0
    _, parts = segmentation_loss(logits, targets, gap, ("foreground", "other", "boundary"), LossConfig())
    assert parts["boundary"].item() == pytest.approx(10.0, rel=1e-3)


def test_not_finite_is_noticed():
    assert is_finite(torch.tensor(1.0))
    assert not is_finite(torch.tensor(math.nan))
    assert not is_finite(torch.tensor(math.inf))


def test_surface_loss_by_hand_is_least_where_the_target_is():
    distance = torch.tensor([[[-0.5, -0.5, 0.5, 1.0]]])
    assert surface_loss(torch.zeros(1, 1, 4), distance).item() == pytest.approx(0.5 * 0.5 / 4)
    sure = torch.tensor([[[20.0, 20.0, -20.0, -20.0]]])
    assert surface_loss(sure, distance).item() == pytest.approx(-0.25)
    far = surface_loss(torch.tensor([[[20.0, 20.0, -20.0, 20.0]]]), distance)
    near = surface_loss(torch.tensor([[[20.0, 20.0, 20.0, -20.0]]]), distance)
    assert far > near


def test_surface_loss_is_of_the_boundary_channel_with_its_weight():
    logits, targets, gap = torch.randn(2, 2, 8, 8), torch.rand(2, 2, 8, 8).round(), torch.zeros(2, 8, 8)
    distance = torch.rand(2, 8, 8) - 0.5
    plain, _ = segmentation_loss(logits, targets, gap, BOTH, LossConfig(), distance)
    total, parts = segmentation_loss(logits, targets, gap, BOTH, LossConfig(surface_weight=3.0), distance)
    assert parts["surface"].item() == pytest.approx(surface_loss(logits[:, 1], distance).item())
    assert total.item() == pytest.approx(plain.item() + 3 * parts["surface"].item(), rel=1e-5)
    with pytest.raises(ValueError, match="no signed distances"):
        segmentation_loss(logits, targets, gap, BOTH, LossConfig(surface_weight=3.0))


def test_soft_targets_are_met_at_zero_loss():
    target = torch.tensor([[[0.0, 0.2, 0.5, 1.0]]])
    met = torch.logit(target.double(), eps=1e-9).float()
    assert soft_target_loss(met, target).item() == pytest.approx(0, abs=1e-6)
    # Undecided: log 2 less the entropies 0, 0.5004, log 2, 0.
    expected = (3 * math.log(2) - 0.500402) / 4
    assert soft_target_loss(torch.zeros(1, 1, 4), target).item() == pytest.approx(expected, rel=1e-4)
    logits = torch.randn(1, 1, 4, requires_grad=True)
    soft_target_loss(logits, target).backward()
    assert torch.allclose(logits.grad, (logits.detach().sigmoid() - target) / 4, atol=1e-6)


def test_distance_channel_has_its_own_part():
    logits, targets, gap = torch.randn(2, 2, 8, 8), torch.rand(2, 2, 8, 8), torch.zeros(2, 8, 8)
    config = LossConfig(distance_weight=2.0)
    total, parts = segmentation_loss(logits, targets, gap, ("foreground", "distance"), config)
    assert set(parts) == {"bce", "dice_loss", "distance"}
    assert parts["distance"].item() == pytest.approx(soft_target_loss(logits[:, 1], targets[:, 1]).item())
    assert total.item() == pytest.approx(sum(p.item() for p in parts.values()) + parts["distance"].item(), rel=1e-5)
