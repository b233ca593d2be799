"""When images are unlike those that a model was trained on, and when that cannot be said."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from conftest import make_spec
from test_image_statistics import GREY
from test_metrics_apart import image

from cellseg_deploy.evaluate.image_statistics import ImageFacts, look_at, summarise
from cellseg_deploy.evaluate.training_match import (
    QUANTITIES,
    Comparison,
    compare,
    summary,
    training_summary,
    values_of,
    warnings,
)
from cellseg_deploy.images.resolution import Resolution
from cellseg_deploy.models.spec import DATA_SUMMARY_VERSION, ModelSpec, TrainingInfo

TEN_PX = 10 * math.sqrt(4 / math.pi)  # diameter of the disc of a square of 10 px


def grid(side: int, name: str = "a", step: int = 40, shade: int = 100, field: int = 200) -> ImageFacts:
    squares = [[(top, left, side, side)] for top in range(5, 90 - side, step) for left in range(5, 150 - side, step)]
    labels = image(*squares)
    photo = np.where(labels[..., None] > 0, shade, np.full_like(GREY, field)).astype(np.uint8)
    return look_at(name, photo, labels, min_area_px=5)


def spec_of(*images: ImageFacts) -> ModelSpec:
    """A model trained on ``images``, at half scale."""
    training = TrainingInfo(data_summary=summary(images)) if images else TrainingInfo()
    return make_spec(image_scale=0.5, cell_diameter_px=TEN_PX / 2, training=training)


def said(images: list[ImageFacts], spec: ModelSpec) -> list[str]:
    return warnings(images, summarise(images), compare(images, spec), spec)


def of(found: list[Comparison], name: str) -> Comparison:
    return next(one for one in found if one.quantity.name == name)


def test_a_summary_is_small_and_comes_back() -> None:
    images = [grid(10, step=15, shade=shade) for shade in range(80, 121)]
    found = summary(images)
    assert (found.version, found.n_images, found.n_cells) == (DATA_SUMMARY_VERSION, 41, 41 * images[0].n_cells)
    assert set(found.values) == {"diameter_px", *(q.name for q in QUANTITIES)}
    strength = found.values["stain_green"]
    low, median, high = (values_of(images[i])["stain_green"] for i in (2, 20, 38))
    assert (strength.p95, strength.median, strength.p05) == pytest.approx((low, median, high), rel=1e-3)
    assert len(msgspec.json.encode(found)) < 1500
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def test_images_without_cells_have_a_summary_too() -> None:
    found = summary([look_at("n", GREY, image(), min_area_px=5)])
    assert found.n_cells == 0
    assert "stain_green" not in found.values
    assert "diameter_px" not in found.values
    assert found.values["covered"].median == 0


def test_the_training_images_are_like_themselves() -> None:
    images = [grid(10, str(shade), step=15, shade=shade) for shade in (80, 100, 120)]
    spec = spec_of(*images)
    assert all(one.outside is False and not one.odd_images for one in compare(images, spec))
    assert said(images, spec) == []


@pytest.mark.parametrize(
    ("other", "quantity", "sentence"),
    [
        (grid(10, "x", step=21, field=120, shade=59), "field_lightness", "the background, so light or camera, differs"),
        (grid(10, "x", step=21, shade=30), "stain_green", "the stain of the cells differs"),
        (grid(10, "x", step=11), "covered", "more or less densely"),
        (grid(10, "x", step=11), "crowded_share", "share of crowded cells 1 (training 0, usually 0 to 0)"),
    ],
)
def test_a_difference_is_said_in_one_sentence(other: ImageFacts, quantity: str, sentence: str) -> None:
    spec = spec_of(*[grid(10, step=21) for _ in range(3)])
    found = of(compare([other], spec), quantity)
    assert found.outside
    assert found.odd_images == ("x",)
    told = said([other], spec)
    assert len(told) == 1
    assert sentence in told[0]


def test_tolerance_and_a_quarter_of_the_spread() -> None:
    """Training images all alike: five units of lightness are let pass. With a spread, a quarter of it beyond."""
    alike = spec_of(*[grid(10, step=15)] * 3)
    for field, outside in ((214, False), (220, True)):
        assert of(compare([grid(10, step=15, field=field)], alike), "field_lightness").outside is outside
    spread = [grid(10, step=15, field=field) for field in range(120, 221)]
    found = of(compare([grid(10, step=15, field=110)], spec_of(*spread)), "field_lightness")
    known = found.training
    assert known is not None
    assert found.range is not None
    quarter = (known.p95 - known.p05) / 4
    assert quarter > 5
    assert found.range == pytest.approx((known.p05 - quarter, known.p95 + quarter))
    assert found.outside is False  # below the 5th percentile, but not by that much


def test_a_few_odd_images_are_named_and_not_called_the_rule() -> None:
    spec = spec_of(*[grid(10, step=15)] * 3)
    images = [grid(10, name, step=15) for name in "abcdef"] + [grid(10, n, step=15, field=140) for n in "uvwx"]
    (light, stain) = said(images, spec)
    assert light == ("4 of 10 images unlike the training images (lightness of the background): u, v, w and 1 more")
    assert stain.startswith("4 of 10 images unlike the training images (stain in red light, ")


def test_what_a_model_does_not_say_is_not_compared() -> None:
    images = [grid(10, step=15, field=90)]
    silent = spec_of()
    assert all((one.training, one.outside) == (None, None) for one in compare(images, silent))
    assert said(images, silent) == []
    assert "has no description of its training images" in training_summary(silent)[1]
    newer = summary([grid(10, step=15)])
    newer = msgspec.structs.replace(newer, version=DATA_SUMMARY_VERSION + 1)
    spec = make_spec(training=TrainingInfo(data_summary=newer))
    assert all(one.outside is None for one in compare(images, spec))
    assert f"in version {DATA_SUMMARY_VERSION + 1}" in training_summary(spec)[1]
    known = spec_of(*images)
    assert training_summary(known) == (known.training.data_summary, "")


def test_crowding_is_not_compared_at_another_magnification() -> None:
    spec = spec_of(*[grid(10, step=21)] * 3)
    large = [grid(20, step=22)]
    assert of(compare(large, spec), "crowded_share").outside is None
    assert of(compare(large, spec), "covered").outside is True


def test_size_is_compared_with_the_model_s() -> None:
    spec = spec_of()
    same = [grid(10, step=15)]
    assert said(same, spec) == []
    large = [grid(14, step=18)]
    (told,) = said(large, spec)
    assert "1.40 times" in told
    assert "`cell_diameter_px=16`" in told
    mixed = [*same, grid(10, "b", step=15), grid(20, "c", step=30)]
    (told,) = said(mixed, spec)
    assert "cells of c differ" in told
    few = [grid(10, step=60)]
    assert "uncertain" in said(few, spec)[0]
    none = [look_at("n", GREY, image(), min_area_px=5)]
    assert "no whole cell" in said(none, spec)[0]


def test_clues_to_the_magnification_are_said() -> None:
    barred = GREY.copy()
    barred[95:97, 100:150] = 0
    labels = image(*[[(top, left, 10, 10)] for top in range(5, 80, 15) for left in range(5, 140, 15)])
    with_bar = [look_at("bar", barred, labels, min_area_px=5)]
    assert "scale bar" in said(with_bar, spec_of())[0]
    plain = grid(10, step=15)
    for sizes, n in (((0.1, 0.1), 0), ((0.1, 0.2), 1), ((0.1, 350.0), 0)):
        images = [replace(plain, resolution=(Resolution("TIFF", (um, um)),)) for um in sizes]
        told = said(images, spec_of())
        assert len(told) == n
        assert all("several pixel sizes" in sentence for sentence in told)


def test_negatives_of_smears_are_named() -> None:
    usual, dark = grid(10), grid(10, "dark", shade=120, field=8)
    (sentence,) = (words for words in said([usual, dark], spec_of()) if "1 of 2 images (dark)" in words)
    assert "dark field, fluorescence or a negative?" in sentence
    assert not any("fluorescence" in words for words in said([usual], spec_of()))
