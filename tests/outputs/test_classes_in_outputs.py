"""What formats say of classes, and pictures show; the formats read back with classes: tests/run/test_classes_run.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from segmented_images import classified, odd_labels, segmented, smear
from skimage.color import rgb2lab

from cellseg_deploy.outputs import coco, geojson, overlay
from cellseg_deploy.outputs.legend import line_of, with_legend
from cellseg_deploy.outputs.palette import CLASS_RGB, COUNTED_RGB, NOT_COUNTED_RGB, class_rgb

GROUND = 200


def two_discs() -> np.ndarray:
    """Labels (700, 900) of two discs of 100 px radius."""
    y, x = np.mgrid[:700, :900]
    labels = np.zeros((700, 900), np.int32)
    for number, centre in enumerate((250, 650), start=1):
        labels[(x - centre) ** 2 + (y - 350) ** 2 < 100**2] = number
    return labels


def colours_in(picture: np.ndarray) -> dict[tuple[int, ...], int]:
    """Colours and how many pixels have each."""
    found, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return dict(zip((tuple(colour) for colour in found.tolist()), counts.tolist(), strict=True))


def test_outlines_have_the_colour_of_the_class_and_are_dashed_where_a_cell_does_not_count() -> None:
    image = classified(two_discs(), ("a", "b"))
    assert image.classes is not None
    shown = overlay.draw(image.pixels_hwc, image.labels, counted=image.counted, classes=image.classes)
    found = colours_in(shown)
    solid, dashed = found[class_rgb(0)], found[class_rgb(1)]
    assert 0.35 * solid < dashed < 0.65 * solid
    assert COUNTED_RGB not in found
    every = overlay.draw(image.pixels_hwc, image.labels, counted=np.ones(2, bool), classes=image.classes)
    assert colours_in(every)[class_rgb(1)] == solid


def test_bands_do_not_break_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    image = classified(two_discs(), ("a", "b"))
    whole = overlay.draw(image.pixels_hwc, image.labels, counted=image.counted, classes=image.classes)
    monkeypatch.setattr("cellseg_deploy.cells.label_runs.BAND_PIXELS", 20_000)
    assert np.array_equal(
        overlay.draw(image.pixels_hwc, image.labels, counted=image.counted, classes=image.classes), whole
    )


@pytest.mark.parametrize("hw", [(1, 1), (13, 5000), (400, 60), (300, 400), (640, 480), (1200, 1600)])
def test_a_legend_fits_any_picture(hw: tuple[int, int]) -> None:
    picture = np.full((*hw, 3), GROUND, np.uint8)
    classes = classified(np.ones(hw, np.int32)).classes
    assert classes is not None
    shown = with_legend(picture, classes, {"red": 1, "white": 0, "platelet": 0})
    assert {class_rgb(0), class_rgb(1), class_rgb(2), (255, 255, 255)} <= set(colours_in(shown))
    if min(hw) > 1000:
        assert shown.shape == picture.shape
        assert (shown[:1000] == GROUND).all()
    else:  # nothing of a small field is hidden
        assert shown.shape[0] <= hw[0] + (40 if hw[1] > 400 else 90)
        assert (shown[: hw[0], : hw[1]] == GROUND).all()


def test_a_legend_line() -> None:
    assert line_of("red", 95, ("red",)) == "red 95"
    assert line_of("platelet", 19, ("red",)) == "platelet 19, not counted"


# Machado, Oliveira and Fernandes, A physiologically-based model for simulation of color vision deficiency, IEEE Trans.
# Vis. Comput. Graph. 15 (2009) 1291-1298: linear RGB as seen without red, green or blue cones.
SIGHT = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_classes_stay_apart_for_all_eyes(sight: str) -> None:
    values = np.array(CLASS_RGB) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHT[sight]).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[np.newaxis])[0]
    away = np.linalg.norm(lab[:, np.newaxis] - lab, axis=2) + 1e3 * np.eye(len(lab))
    assert away.min() > 11
    assert away[:3, :3].min() > 29


def test_cells_without_classes_say_nothing_of_them() -> None:
    image = smear()
    content = json.loads(coco.encode(image))
    assert [category["name"] for category in content["categories"]] == ["cell"]
    assert all("class_probability" not in annotation for annotation in content["annotations"])
    features = json.loads(geojson.encode(image))["features"]
    assert {feature["properties"]["classification"]["name"] for feature in features} == {"Cell", "Cell not counted"}
    assert not {"class", "class_probability", "left_out_by"} & set(image.columns)
    assert image.by_class == {}


def test_why_a_cell_is_left_out() -> None:
    labels = np.arange(1, 25).reshape(4, 6)
    image = classified(labels)
    assert image.columns["left_out_by"][:9].tolist() == ["", "", "class", "", "", "class", "border", "", "class"]
    assert (image.columns["left_out_by"] == "").tolist() == image.counted.tolist()
    assert image.by_class == {"red": 7, "white": 7, "platelet": 7}  # numbers 7, 14 and 21 are left out by the rule
    assert sum(image.by_class[name] for name in ("red", "white")) == image.counted.sum()
    assert image.classifications[:7] == [
        *(("red", class_rgb(0)), ("white", class_rgb(1)), ("platelet", class_rgb(2))) * 2,
        ("red not counted", NOT_COUNTED_RGB),
    ]


def test_classes_need_the_count_rules_word() -> None:
    image = classified(odd_labels())
    changes: dict[str, Any] = {"classes": image.classes}
    with pytest.raises(ValueError, match="belong together"):
        segmented(odd_labels(), **changes)
