"""Reading masks and label images: what becomes a cell, what is refused. Every file is built here."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from corpus import turned_png
from made_images import H, W, encoded, picture, save, tiff, write
from PIL import Image

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.read import read_image, read_labels


def test_binary_mask_becomes_four_connected_components(tmp_path: Path) -> None:
    mask = np.zeros((6, 6), np.uint8)
    mask[0, 4] = mask[1, 0] = mask[2, 1] = mask[2, 2] = 255  # (1, 0) and (2, 1) touch only at a corner
    labels = read_labels(save(tmp_path / "m.png", Image.fromarray(mask)))
    assert labels.dtype == np.int32
    assert (labels[0, 4], labels[1, 0], labels[2, 1], labels[2, 2], labels.max()) == (1, 2, 3, 3, 3)


def test_label_image_is_kept_and_renumbered(tmp_path: Path) -> None:
    values = np.zeros((5, 5), np.uint16)
    values[0, 0], values[0, 4], values[4, 4], values[2, 2] = 900, 7, 7, 65534
    expected = np.zeros((5, 5), np.int32)
    expected[0, 0], expected[0, 4], expected[4, 4], expected[2, 2] = 1, 2, 2, 3
    for data in (
        encoded(Image.fromarray(values), "PNG"),
        tiff(values),
        tiff(values.astype(np.uint32) * 60_000),
        tiff(values.astype(np.int32)),
        tiff(values.astype(np.float32)),
    ):
        assert np.array_equal(read_labels(write(tmp_path / "l", data)), expected)


def test_palette_mask_is_read_by_index(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8), mode="P")
    image.putpalette([0, 0, 0, 0, 0, 0, 9, 9, 9])  # two indices of one colour
    assert np.array_equal(read_labels(save(tmp_path / "p.png", image)), [[0, 1], [2, 2]])


def test_empty_and_full_masks(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path / "e", tiff(np.zeros((3, 3), np.uint8)))).max() == 0
    assert (read_labels(write(tmp_path / "f", tiff(np.full((3, 3), 255, np.uint8)))) == 1).all()
    one_bit = np.eye(3, dtype=bool)
    assert read_labels(save(tmp_path / "b.png", Image.fromarray(one_bit))).max() == 3


def test_masks_that_could_mean_anything(tmp_path: Path) -> None:
    soft = np.full((64, 64), 255, np.uint8)
    soft[0] = 0
    soft[1] = np.arange(64) * 3 + 1
    colour = picture()
    cases = {
        "no background": (np.array([[1, 2]], np.uint8), "no 0"),
        "soft edges": (soft, "soft"),
        "colour": (colour, "colour"),
        "negative": (np.array([[-1, 0, 1]], np.int16), "negative"),
        "fraction": (np.array([[0, 0.5, 1]], np.float32), "fraction"),
    }
    for name, (values, words) in cases.items():
        data = tiff(values, photometric="rgb" if values.ndim == 3 else "minisblack")
        with pytest.raises(DataError, match=words):
            read_labels(write(tmp_path / name, data))


def grid_of_cells(shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    """12 separate squares of 15 px as a mask 0 and 255."""
    mask = np.zeros(shape, np.uint8)
    for top in range(5, shape[0] - 15, 40):
        for left in range(5, shape[1] - 15, 40):
            mask[top : top + 15, left : left + 15] = 255
    return mask


@pytest.mark.parametrize("case", ["halved by area", "classes", "stray pixel"])
def test_a_few_values_over_many_objects_are_no_labels(tmp_path: Path, case: str) -> None:
    mask = grid_of_cells()
    if case == "halved by area":
        mask = (mask.reshape(60, 2, 80, 2).astype(np.uint16).sum(axis=(1, 3)) // 4).astype(np.uint8)
        assert len(np.unique(mask)) == 5 - 1
    elif case == "classes":
        mask[:, :80] //= 255
        mask[:, 80:] //= 127
    else:
        mask[0, 0] = 3
    values = len(np.unique(mask))
    with pytest.raises(DataError, match=f"{values} values but 12 separate objects.*0 and 255.*one value per cell"):
        read_labels(write(tmp_path / "m.tif", tiff(mask)))


def test_label_image_with_broken_labels_is_kept(tmp_path: Path) -> None:
    """Three of twelve cells are cut in two, and one has crumbs."""
    labels = np.zeros((120, 160), np.uint16)
    for number, (top, left) in enumerate(((t, x) for t in (5, 45, 85) for x in (5, 45, 85, 125)), start=1):
        labels[top : top + 15, left : left + 15] = number
        if number <= 3:
            labels[top + 7, left : left + 15] = 0
    labels[0, ::4] = 12
    assert read_labels(write(tmp_path / "l.tif", tiff(labels))).max() == 12


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_is_turned_like_its_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = np.zeros((H, W), np.uint8)
    mask[2:9, 3:30] = mask[20:35, 40:50] = 255
    image = save(tmp_path / f"i.{suffix}", Image.fromarray(np.dstack([mask] * 3)), exif=exif)
    labels = read_labels(save(tmp_path / f"m.{suffix}", Image.fromarray(mask), exif=exif))
    assert labels.max() == 2
    assert np.array_equal(labels > 0, read_image(image).pixels_hwc[..., 0] == 255)


def test_a_label_image_of_16_bits_is_turned_like_its_image(tmp_path: Path) -> None:
    labels = np.zeros((H, W), np.uint16)
    labels[2:9, 3:30], labels[20:35, 40:50] = 1, 300
    image = write(tmp_path / "i.png", turned_png(np.dstack([(labels > 0).astype(np.uint8) * 255] * 3), 8))
    found = read_labels(write(tmp_path / "m.png", turned_png(labels, 8)))
    assert found.shape == (W, H)
    assert np.array_equal(found > 0, read_image(image).pixels_hwc[..., 0] == 255)


@pytest.mark.real
def test_label_images_of_another_data_set(real_data: Path) -> None:
    masks = sorted((real_data / "dsb2018_sample" / "masks").glob("*.png"))
    if not masks:
        pytest.skip("no dsb2018_sample beside the photographs")
    assert all(read_labels(mask).max() > 0 for mask in masks)


def test_jpeg_mask(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:24, 8:24] = mask[40:56, 40:56] = 255
    labels = read_labels(save(tmp_path / "m.jpg", Image.fromarray(mask), quality=70))
    assert labels.max() == 2
    assert abs(int((labels > 0).sum()) - 512) < 20
    with pytest.raises(DataError, match="lossy"):
        read_labels(save(tmp_path / "photo.jpg", Image.fromarray(picture(1))))


# ------------------------------------------------------------------------------------------- which numbers are cells


def discs(n: int = 9) -> np.ndarray:
    """``n`` x ``n`` separate discs of radius 8 px as a boolean mask; those in the first row are cut by the border."""
    rows, columns = np.mgrid[: n * 24, : n * 24]
    return np.hypot((rows + 4) % 24 - 12, columns % 24 - 12) <= 8


def inverting_tiff(values: np.ndarray) -> bytes:
    """A TIFF that holds ``values`` and is shown as their negative, as ImageJ writes with its inverting LUT."""
    return tiff(values, photometric="miniswhite")


def white_palette(indices: np.ndarray) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    return encoded(image, "PNG")


def framed(mask: np.ndarray) -> np.ndarray:
    """``mask`` with its outermost rows and columns black, as programs leave them that draw a frame or crop."""
    return np.pad(mask[1:-1, 1:-1], 1)


LABELS_32 = np.arange(81, dtype=np.uint32).reshape(9, 9).repeat(24, 0).repeat(24, 1) + 1
STORED_RIGHT = {
    "inverting LUT": lambda: inverting_tiff(discs().astype(np.uint8) * 255),
    "1-bit white is zero": lambda: inverting_tiff(discs()),
    "palette with white first": lambda: white_palette(discs()),
    "16-bit labels": lambda: inverting_tiff((LABELS_32 * discs()).astype(np.uint16)),
    "32-bit labels": lambda: inverting_tiff((LABELS_32 * discs()).astype(np.uint32)),
    "float labels": lambda: inverting_tiff((LABELS_32 * discs()).astype(np.float32)),
}
STORED_WRONG = {
    "inverting LUT": lambda: inverting_tiff(~discs() * np.uint8(255)),
    "1-bit white is zero": lambda: inverting_tiff(~discs()),
    "palette with white first": lambda: white_palette(~discs()),
    "black on white": lambda: encoded(Image.fromarray(~discs() * np.uint8(255)), "PNG"),
    "black on white, 1 bit": lambda: encoded(Image.fromarray(~discs()), "PNG"),
    "black on white, JPEG": lambda: encoded(Image.fromarray(~discs() * np.uint8(255)), "JPEG", quality=95),
    "16-bit labels": lambda: tiff((65535 - LABELS_32 * discs()).astype(np.uint16)),
    "black on white, RGB": lambda: encoded(Image.fromarray(~discs() * np.uint8(255)).convert("RGB"), "PNG"),
    "with a black frame": lambda: encoded(Image.fromarray(framed(~discs() * np.uint8(255))), "PNG"),
    "few cells": lambda: encoded(Image.fromarray(~np.pad(discs(2), 200) * np.uint8(255)), "PNG"),
}


@pytest.mark.reliability
@pytest.mark.parametrize("case", STORED_RIGHT)
def test_stored_numbers_count_however_they_are_shown(tmp_path: Path, case: str) -> None:
    labels = read_labels(write(tmp_path / "m", STORED_RIGHT[case]()))
    assert labels.max() == 81
    assert np.array_equal(labels > 0, discs())


@pytest.mark.reliability
@pytest.mark.parametrize("case", STORED_WRONG)
def test_a_negative_is_refused_and_read_where_it_is_said(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "m", STORED_WRONG[case]())
    with pytest.raises(DataError, match=r"m: one object touches all four sides.*`mask_foreground='dark'`"):
        read_labels(path)
    labels = read_labels(path, foreground="dark")
    assert labels.max() == (4 if case == "few cells" else 81)
    assert read_labels(path, foreground="light").max() >= 1


@pytest.mark.reliability
def test_labels_counted_down_from_255_are_read_where_it_is_said(tmp_path: Path) -> None:
    stored = (255 - LABELS_32 * discs()).astype(np.uint8)
    path = write(tmp_path / "m", encoded(Image.fromarray(stored), "PNG"))
    with pytest.raises(DataError, match=r"softened edges.*mask_foreground='dark'"):
        read_labels(path)
    assert np.array_equal(read_labels(path, foreground="dark") > 0, discs())


def test_a_mask_that_is_no_negative_is_refused_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "m.tif", tiff(discs().astype(np.uint8)))
    with pytest.raises(DataError, match="leave that argument out, and keep masks of both kinds"):
        read_labels(path, foreground="dark")


def layer(gaps: str) -> np.ndarray:
    rows, columns = np.mgrid[:240, :240]
    if gaps == "between round cells":  # discs in rows and columns that touch
        return np.hypot(rows % 60 - 30, columns % 60 - 30) <= 30.5
    if gaps == "slits":
        return (rows % 40 != 20) | (columns % 40 < 6)
    return np.ones((240, 240), bool)


@pytest.mark.reliability
@pytest.mark.parametrize("gaps", ["between round cells", "slits", "none"])
def test_a_confluent_layer_is_taken_with_a_warning(
    tmp_path: Path, gaps: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cellseg_deploy"), "propagate", True)
    path = write(tmp_path / f"{gaps}.tif", tiff(layer(gaps).astype(np.uint8)))
    assert read_labels(path).max() == 1
    read_labels(path)  # said once, though training reads it in each epoch
    assert [record.message.count("taken as a confluent layer") for record in caplog.records] == [1]


def test_an_inverting_photograph_is_still_shown_as_meant(tmp_path: Path) -> None:
    loaded = read_image(write(tmp_path / "i.tif", inverting_tiff(picture(1))))
    assert np.array_equal(loaded.pixels_hwc[..., 0], 255 - picture(1))
    assert any("white is zero" in note for note in loaded.notes)


@pytest.mark.real
def test_true_masks_are_taken_and_their_negatives_are_not(real_data: Path, tmp_path: Path) -> None:
    masks = sorted(real_data.glob("bbbc041seg/*/masks/*")) + sorted(real_data.glob("dsb2018_sample/masks/*"))
    if not masks:
        pytest.skip("no masks beside the photographs")
    for mask in masks:
        cells = read_labels(mask) > 0
        path = write(tmp_path / "negative.tif", tiff(~cells))
        with pytest.raises(DataError, match="`mask_foreground='dark'`"):
            read_labels(path)
        assert np.array_equal(read_labels(path, foreground="dark") > 0, cells)


def test_65535_beside_other_numbers_is_foreground_of_unknown_instance(tmp_path):
    stored = np.zeros((40, 60), np.uint16)
    stored[5:15, 5:15], stored[20:30, 5:15], stored[5:30, 30:50] = 3, 8, 65535
    path = write(tmp_path / "l", tiff(stored))
    assert read_labels(path).max() == 2
    assert (read_labels(path)[stored == 65535] == 0).all()
    kept = read_labels(path, keep_ignored=True)
    assert np.array_equal(kept == 65535, stored == 65535)
    assert np.array_equal(np.where(kept == 65535, 0, kept), read_labels(path))


def test_a_mask_of_0_and_65535_and_more_cells_than_that_are_no_unknown_foreground(tmp_path):
    mask = np.zeros((40, 60), np.uint16)
    mask[5:15, 5:15] = mask[20:30, 5:15] = 65535
    assert read_labels(write(tmp_path / "m", tiff(mask)), keep_ignored=True).max() == 2
    many = np.zeros((600, 600), np.uint32)
    many[::2, ::2] = np.arange(1, 90_001).reshape(300, 300)
    labels = read_labels(write(tmp_path / "l", tiff(many)), keep_ignored=True)
    assert len(np.unique(labels)) == 90_001
    assert not (labels == 65535).any()
