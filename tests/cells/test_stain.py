"""Light and stain as numbers: known colours, and what does not depend on what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.cells.stain import CELL, FIELD, colours, negative_note, optical_density
from cellseg_deploy.samples import SmearParams, make_smear

INSIDE = np.zeros((60, 80), np.bool_)
INSIDE[20:40, 20:50] = True


def smear(field: tuple[int, int, int], cell: tuple[int, int, int]) -> np.ndarray:
    return np.where(INSIDE[..., None], cell, field).astype(np.uint8)


def test_known_colours() -> None:
    """Mid grey of sRGB (119) has L* 50, pure red L* 53, a* 80, b* 67 (CIE 1976, D65)."""
    for field, lab in (
        ((119, 119, 119), (50, 0, 0)),
        ((255, 0, 0), (53.2, 80.1, 67.2)),
        ((255, 255, 255), (100, 0, 0)),
    ):
        found = colours(smear(field, (0, 0, 0)), INSIDE)
        assert [found[name] for name in FIELD[:3]] == pytest.approx(lab, abs=0.5)
        assert (found["field_od_spread"], found["cell_od_spread"]) == (0, 0)
        assert set(found) == {*FIELD, *CELL}


def test_optical_density_adds_up_and_knows_black() -> None:
    table = optical_density(np.array([255, 127, 63, 0], np.uint8))
    assert table == pytest.approx([0, np.log10(2), np.log10(4), np.log10(256)], abs=1e-6)


def test_the_strength_of_the_stain_does_not_depend_on_the_light() -> None:
    bright = colours(smear((239, 239, 239), (119, 59, 119)), INSIDE)
    dim = colours(smear((119, 119, 119), (59, 29, 59)), INSIDE)
    strengths = [bright[name] for name in ("stain_red", "stain_green", "stain_blue")]
    assert strengths == pytest.approx([np.log10(2), np.log10(4), np.log10(2)], abs=1e-3)
    assert [dim[name] for name in CELL] == pytest.approx([bright[name] for name in CELL], abs=1e-3)
    assert dim["field_lightness"] < bright["field_lightness"] - 30


def test_spread_is_that_of_a_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    values = 10 ** -rng.normal(0.3, 0.05, (200, 200))
    grey = np.repeat((values * 256 - 1).round().astype(np.uint8)[..., None], 3, axis=2)
    found = colours(grey, np.zeros((200, 200), np.bool_))
    assert found["field_od_spread"] == pytest.approx(0.05, abs=0.002)


def test_what_is_not_there_has_no_figure() -> None:
    picture = smear((200, 200, 200), (100, 100, 100))
    assert set(colours(picture, np.zeros_like(INSIDE))) == set(FIELD)
    assert set(colours(picture, np.ones_like(INSIDE))) == {"cell_od_spread"}


def test_a_large_image_is_looked_at_in_a_grid() -> None:
    inside = np.kron(INSIDE, np.ones((20, 20), np.bool_))
    picture = np.where(inside[..., None], (90, 60, 140), (220, 225, 230)).astype(np.uint8)
    assert colours(picture, inside) == pytest.approx(colours(smear((220, 225, 230), (90, 60, 140)), INSIDE))


@pytest.mark.parametrize(
    ("field", "cell", "seen"),
    [
        ((240, 235, 230), (160, 90, 140), ""),  # a smear
        ((68, 68, 78), (40, 20, 50), "the background is dark"),
        ((5, 5, 5), (60, 200, 90), "cells are brighter than the background"),  # fluorescence
        ((120, 120, 120), (230, 230, 230), "cells are brighter than the background"),  # dark field, exposed long
        ((240, 235, 230), (235, 225, 225), ""),  # pale cells
    ],
)
def test_negatives_are_told_from_smears(field: tuple[int, int, int], cell: tuple[int, int, int], seen: str) -> None:
    note = negative_note(smear(field, cell), INSIDE)
    assert note.startswith(seen) if seen else note == ""
    assert kind_of(note) == ("negative" if seen else "conversion")


def test_an_image_without_cells_or_full_of_them_is_judged_as_well() -> None:
    nothing = np.zeros_like(INSIDE)
    assert negative_note(smear((240, 240, 240), (240, 240, 240)), nothing) == ""
    assert "the background is dark" in negative_note(smear((3, 3, 3), (3, 3, 3)), nothing)
    assert "the background is dark" in negative_note(smear((3, 3, 3), (3, 3, 3)), ~nothing)
    assert negative_note(smear((240, 240, 240), (90, 60, 120)), ~nothing) == ""


def fluorescence(smear: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a dye in the cells would show them: light where the smear is dense, photons counted, on a black offset."""
    photons = rng.poisson(optical_density(smear).mean(axis=2) / 0.5 * 60)
    green = (photons * 3 + rng.normal(6, 2, photons.shape)).clip(0, 255)
    return np.stack([green * 0.1, green, green * 0.15], axis=2).astype(np.uint8)


def dark_field(smear: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As light that edges scatter: bright rims, faint bodies, black between."""
    density = optical_density(smear).mean(axis=2)
    rims = np.hypot(*np.gradient(density)) * 900
    light = rng.poisson((rims + density * 40).clip(0, 250)) + rng.normal(8, 2, density.shape)
    return light.clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def exposed_long(smear: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fluorescence at automatic contrast: the background is lifted to a middle grey."""
    return (fluorescence(smear, rng).max(axis=2) * 0.6 + 90).astype(np.uint8)[..., None].repeat(3, axis=2)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "kind", [fluorescence, dark_field, exposed_long, None], ids=["fluorescence", "dark field", "grey", "inverted"]
)
def test_negatives_of_a_smear_are_seen_whatever_is_found_in_them(
    kind: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None,
) -> None:
    smear = make_smear(SmearParams(size_hw=(300, 400), n_cells=20, cell_diameter_px=50), 7)
    image = 255 - smear.image_hwc if kind is None else kind(smear.image_hwc, np.random.default_rng(0))
    cells = smear.labels_hw > 0
    assert negative_note(smear.image_hwc, cells) == ""
    nothing = np.zeros_like(cells)
    is_black = kind in (fluorescence, dark_field)  # seen even where the background was taken for cells
    for inside in (cells, nothing, ~cells) if is_black else (cells,) if kind is None else (cells, nothing):
        assert kind_of(negative_note(image, inside)) == "negative"
